"""How the mini world's six domains are made, told and drawn.

Each domain has five functions, in this order: the parameters of a thing; words for them; the parameters of a view; words
for those; and the drawing of both. `mini_world` puts things and views together to splits, pictures and captions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from numpy.random import Generator
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw

DOMAINS = ("landmarks", "nature", "sketches", "objects", "products", "faces")
SIZE = 64  # pixels; drawn three times larger and averaged, which smooths the edges
COLORS = {
    "red": (200, 45, 45), "orange": (232, 132, 40), "yellow": (238, 205, 70), "green": (70, 150, 75),
    "blue": (60, 105, 190), "purple": (135, 75, 165), "pink": (236, 140, 175), "white": (240, 236, 228),
    "brown": (130, 85, 55), "black": (50, 45, 50), "gray": (140, 140, 145),
}  # fmt: skip
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


# --- shapes ----------------------------------------------------------------------------------------------------------


class Canvas:
    """A picture whose shapes are given in object coordinates: x and y from -1 to 1, y pointing up."""

    def __init__(self, background: ArrayLike, scale: int = 3):
        self.pixels = SIZE * scale
        self.image = Image.new("RGB", (self.pixels, self.pixels), tuple(int(c) for c in background))
        self.draw = ImageDraw.Draw(self.image)
        self.place()

    def place(self, rotation: float = 0.0, size: float = 1.0, shift: tuple = (0.0, 0.0), shear: float = 0.0) -> None:
        """Set where the shapes that follow land: rotation in radians, shift in object coordinates."""
        cos, sin = np.cos(rotation) * size, np.sin(rotation) * size
        half = self.pixels / 2
        self.matrix = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, shear], [0, 1]]) * half
        self.matrix[1] *= -1
        self.offset = np.array([half + shift[0] * half, half - shift[1] * half])

    def polygon(self, points: ArrayLike, color: ArrayLike) -> None:
        points = np.asarray(points, dtype=float) @ self.matrix.T + self.offset
        self.draw.polygon(points.ravel().tolist(), fill=tuple(int(c) for c in color))

    def box(self, left: float, bottom: float, right: float, top: float, color: ArrayLike) -> None:
        self.polygon([(left, bottom), (right, bottom), (right, top), (left, top)], color)

    def ellipse(self, x: float, y: float, width: float, height: float, color: ArrayLike, turn: float = 0.0) -> None:
        self.polygon(trace_ellipse(x, y, width, height, turn), color)

    def line(self, points: ArrayLike, color: ArrayLike, width: float) -> None:
        points = np.asarray(points, dtype=float) @ self.matrix.T + self.offset
        pixels = max(1, round(width * self.pixels / 2))
        self.draw.line(points.ravel().tolist(), fill=tuple(int(c) for c in color), width=pixels, joint="curve")


def trace_ellipse(x: float, y: float, width: float, height: float, turn: float = 0.0, points: int = 28) -> np.ndarray:
    """The outline of an ellipse with half axes width and height, as (points, 2)."""
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    dx, dy = width * np.cos(angle), height * np.sin(angle)
    return np.stack([x + dx * np.cos(turn) - dy * np.sin(turn), y + dx * np.sin(turn) + dy * np.cos(turn)], axis=1)


def join_sides(one: tuple, other: tuple) -> np.ndarray:
    """The outline between two lines, each given as its x and its y from the same end."""
    return np.concatenate([np.stack(one, axis=1), np.stack(other, axis=1)[::-1]])


def shade_color(color: ArrayLike, factor: float) -> tuple:
    """A color made darker (factor < 1) or lighter (factor > 1)."""
    color = np.asarray(color, dtype=float)
    mixed = color * factor if factor <= 1 else color + (255 - color) * (factor - 1)
    return tuple(np.clip(mixed, 0, 255))


# --- random parameters -----------------------------------------------------------------------------------------------


def choose_word(rng: Generator, *words: str) -> str:
    return str(rng.choice(words))


def vary_color(rng: Generator, color: ArrayLike, spread: float) -> tuple:
    return tuple(np.clip(np.array(color) + rng.normal(0, spread, 3), 0, 255))


def draw_near_color(rng: Generator, name: str, spread: float = 16.0) -> tuple:
    """A shade of a named color: two classes may share the name and differ in the shade."""
    return vary_color(rng, COLORS[name], spread)


def draw_parameters(rng: Generator, **kinds: range | float | Iterable) -> dict:
    """Parameters in the order given: an integer of a range, True with a chance, one of several words, or a number between
    two others."""
    drawn = {}
    for name, kind in kinds.items():
        if isinstance(kind, range):
            drawn[name] = int(rng.integers(kind.start, kind.stop))
        elif isinstance(kind, float):
            drawn[name] = bool(rng.random() < kind)
        elif isinstance(next(iter(kind)), str):
            drawn[name] = choose_word(rng, *kind)
        else:
            drawn[name] = rng.uniform(*kind)
    return drawn


def draw_place(rng: Generator, tilt: float, sizes: tuple, shift: tuple, height: float, shear: float) -> tuple:
    """What `Canvas.place` takes: size within bounds, the rest normal; `height` is the mean of the shift upwards."""
    rotation, size, x = rng.normal(0, tilt), rng.uniform(*sizes), rng.normal(0, shift[0])
    return rotation, size, (x, rng.normal(height, shift[1])), rng.normal(0, shear)


# --- words -----------------------------------------------------------------------------------------------------------


SHADES = np.array(list(COLORS.values()), dtype=float)


def name_color(shade: ArrayLike) -> str:
    """The name of the nearest named color."""
    return list(COLORS)[int(np.abs(SHADES - np.asarray(shade, dtype=float)).sum(axis=1).argmin())]


def grade(value: float, *steps) -> str:
    """Words for a quantity: grade(0.4, "low", 0.3, "high") is "high"."""
    words, bounds = steps[::2], steps[1::2]
    return words[sum(value >= bound for bound in bounds)]


def count_in_words(number: int, thing: str) -> str:
    return f"{NUMBERS[min(number, 12)]} {thing}" + ("s" if number != 1 else "")


def add_article(text: str) -> str:
    return ("an " if text[0] in "aeio" else "a ") + text


def join_words(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


# --- landmarks -------------------------------------------------------------------------------------------------------


def make_landmark(rng: Generator) -> dict:
    towers = int(rng.integers(1, 5))
    p = {"towers": towers, "heights": rng.uniform(0.45, 1.15, towers), "widths": rng.uniform(0.13, 0.26, towers)}
    p |= draw_parameters(rng, hall=(0.25, 0.6), wall=("white", "yellow", "brown", "gray", "red"))
    p["wall_color"] = draw_near_color(rng, p["wall"])
    p["roof"] = choose_word(rng, "pointed", "domed", "flat", "stepped")
    p["roof_color"] = draw_near_color(rng, choose_word(rng, "red", "blue", "green", "brown", "black"))
    p |= draw_parameters(rng, roof_height=(0.14, 0.38), window_rows=range(1, 4), window_columns=range(2, 7))
    return p | draw_parameters(rng, arched=0.5, door=(0.08, 0.2), band=0.4, flag=0.3)


def tell_landmark(p: dict) -> tuple[str, str, list[str]]:
    wall, tall = {"yellow": "sandstone", "red": "brick"}.get(p["wall"], p["wall"]), p["heights"]
    shape, skyline = "arched" if p["arched"] else "square", ""
    if len(tall) > 1:
        highest = ("left", "in the middle", "right")[round(2 * int(tall.argmax()) / (len(tall) - 1))]
        skyline = "towers of one height" if np.ptp(tall) < 0.2 else f"the tallest {highest}"
    details = [
        f"{name_color(p['roof_color'])} {p['roof']} roofs",
        f"{shape} windows {NUMBERS[p['window_rows']]} by {NUMBERS[p['window_columns']]}",
        grade(p["hall"], "a low hall", 0.36, "", 0.49, "a high hall"),
        grade(p["widths"].mean(), "slim towers", 0.18, "", 0.21, "broad towers"),
        grade(tall.max(), "low", 0.7, "", 1.0, "high"),
        skyline,
        "painted bands" if p["band"] else "",
        "red flags" if p["flag"] else "",
    ]
    return f"a {wall} building", f"a {wall} building with {count_in_words(p['towers'], 'tower')}", details


SKIES = {
    "blue sky": (150, 195, 235),
    "evening sky": (235, 180, 140),
    "night sky": (70, 85, 130),
    "gray sky": (205, 212, 220),
}


def make_landmark_view(rng: Generator) -> dict:
    v = draw_parameters(rng, sky=SKIES)
    v["sky_color"] = np.clip(SKIES[v["sky"]] + rng.normal(0, 14, 3), 0, 255)
    v["clouds"] = rng.uniform((-1, 0.3), (1, 0.95), (int(rng.integers(0, 3)), 2))
    v |= draw_parameters(rng, ground=("green", "brown", "gray"))
    v["ground_color"] = draw_near_color(rng, v["ground"], 20)
    v |= {"hill": (rng.uniform(-1, 1), rng.uniform(0.35, 0.7)), "lit": bool(rng.random() < 0.5)}
    return v | {"place": draw_place(rng, 0.06, (0.75, 1.1), (0.12, 0.07), -0.05, 0.08)}


def tell_landmark_view(v: dict) -> list[str]:
    lights = "lit windows" if v["lit"] else "dark windows"
    clouds = count_in_words(len(v["clouds"]), "cloud") if len(v["clouds"]) else "no clouds"
    return [f"{v['ground']} hills", f"a {v['sky']}" if v["sky"] != "evening sky" else "an evening sky", lights, clouds]


def draw_landmark(p: dict, v: dict, rng: Generator) -> Canvas:
    canvas = Canvas(v["sky_color"])
    for x, y in v["clouds"]:
        for dx in (-0.16, 0, 0.16):
            canvas.ellipse(x + dx, y, 0.17, 0.08, shade_color(v["sky_color"], 1.45))
    canvas.ellipse(v["hill"][0], -0.75, 1.4, v["hill"][1], shade_color(v["ground_color"], 1.2))
    canvas.box(-2, -0.55, 2, -2, v["ground_color"])
    canvas.place(*v["place"])
    ground, wall, lit = -0.62, p["wall_color"], (250, 225, 130) if v["lit"] else (60, 60, 75)
    canvas.box(-0.66, ground, 0.66, ground + p["hall"], wall)
    for row in range(p["window_rows"]):
        for column in range(p["window_columns"]):
            x = -0.58 + 1.16 * (column + 0.5) / p["window_columns"]
            y = ground + p["hall"] * (row + 0.55) / p["window_rows"]
            draw_window(canvas, x, y, 0.045, 0.32 * p["hall"] / p["window_rows"], p["arched"], lit)
    centres = np.linspace(-0.52, 0.52, p["towers"]) if p["towers"] > 1 else [0.0]
    for x, height, width in zip(centres, p["heights"], p["widths"], strict=True):
        top, shade = ground + height, x + width * 0.4
        canvas.box(x - width, ground, x + width, top, shade_color(wall, 0.9))
        canvas.box(shade, ground, x + width, top, shade_color(wall, 0.72))
        if p["band"]:
            low, high = top - 0.1, top - 0.05
            canvas.box(x - width, low, x + width, high, p["roof_color"])
        draw_window(canvas, x - width * 0.2, top - 0.22, 0.05, 0.08, p["arched"], lit)
        draw_roof(canvas, p, x, top, width * 1.12)
    draw_window(canvas, 0, ground + p["door"], p["door"] * 0.6, p["door"], True, (75, 50, 40))
    return canvas


def draw_window(
    canvas: Canvas, x: float, y: float, width: float, height: float, arched: bool, color: ArrayLike
) -> None:
    canvas.box(x - width, y - height, x + width, y + height * 0.5, color)
    if arched:
        canvas.ellipse(x, y + height * 0.5, width, height * 0.5, color)


def draw_roof(canvas: Canvas, p: dict, x: float, top: float, width: float) -> None:
    color, height = p["roof_color"], p["roof_height"]
    if p["roof"] == "pointed":
        canvas.polygon([(x - width, top), (x + width, top), (x, top + height * 1.3)], color)
        canvas.polygon([(x + width * 0.4, top), (x + width, top), (x, top + height * 1.3)], shade_color(color, 0.75))
    elif p["roof"] == "domed":
        canvas.polygon(np.maximum(trace_ellipse(x, top, width, height), (-2, top)), color)
        canvas.ellipse(x - width * 0.3, top + height * 0.4, width * 0.25, height * 0.25, shade_color(color, 1.35))
    elif p["roof"] == "flat":
        canvas.box(x - width * 1.1, top, x + width * 1.1, top + 0.07, color)
    else:
        for step in range(3):
            w, y = width * (1 - 0.3 * step), top + height * 0.33 * step
            canvas.box(x - w, y, x + w, y + height * 0.34, shade_color(color, 1 - 0.1 * step))
    if p["flag"]:
        tip = top + height + 0.3
        canvas.line([(x, top), (x, tip)], (60, 60, 60), 0.02)
        canvas.polygon([(x, tip), (x + 0.16, tip - 0.05), (x, tip - 0.1)], (215, 60, 50))


# --- nature ----------------------------------------------------------------------------------------------------------


def make_flower(rng: Generator) -> dict:
    p = {"petals": int(rng.choice([4, 5, 6, 8, 12]))}
    p["color"] = choose_word(rng, "red", "orange", "yellow", "blue", "purple", "pink", "white")
    p["petal_color"] = draw_near_color(rng, p["color"], 20)
    p |= draw_parameters(rng, length=(0.5, 0.85), width=(0.45, 1.1), tip=(-0.25, 0.45))
    p["stripe"] = rng.uniform(0, 1) * (rng.random() < 0.5)
    p["stripe_color"] = draw_near_color(rng, choose_word(rng, "red", "purple", "white", "yellow", "pink"))
    p |= draw_parameters(rng, ring=0.35, centre=("yellow", "brown"))
    p["centre_color"] = draw_near_color(rng, p["centre"])
    return p | draw_parameters(rng, centre_size=(0.1, 0.26), leaf=(0.1, 0.22))


def tell_flower(p: dict) -> tuple[str, str, list[str]]:
    shade = name_color(p["petal_color"])
    stripes = grade(p["stripe"], "thin ", 0.35, "", 0.7, "broad ") + f"{name_color(p['stripe_color'])} stripes"
    details = [
        grade(p["length"], "short ", 0.6, "", 0.75, "long ")
        + grade(p["width"], "narrow petals", 0.67, "petals", 0.88, "wide petals"),
        grade(p["tip"], "pointed tips", -0.02, "", 0.22, "round tips"),
        grade(p["centre_size"], "a small ", 0.15, "a ", 0.21, "a large ") + f"{p['centre']} heart",
        f"almost {shade}" if shade != p["color"] else "",
        stripes if p["stripe"] else "",
        "a second ring" if p["ring"] else "",
        grade(p["leaf"], "a thin leaf", 0.14, "", 0.18, "a broad leaf"),
    ]
    flower = add_article(f"{p['color']} flower")
    return flower, f"{flower} with {count_in_words(p['petals'], 'petal')}", details


def make_flower_view(rng: Generator) -> dict:
    v = draw_parameters(rng, ground=("green", "green", "brown", "blue", "gray"))
    v["ground_color"] = draw_near_color(rng, v["ground"], 24)
    v["shade"] = rng.uniform(0.5, 1.2)
    v["blades"] = rng.uniform((-1, -1, 0.25, 0.03, 0.5, 0), (1, 1, 0.7, 0.13, 1.35, 3.1), (9, 6))
    v |= {"shift": rng.normal(0, 0.12, 2), "stem": rng.normal(0, 0.3)}
    v |= draw_parameters(rng, leaf=(0.2, 0.9), turn=(0, 2 * np.pi), size=(0.7, 1.1))
    return v | {"shear": rng.normal(0, 0.15)}


def tell_flower_view(v: dict) -> list[str]:
    shade = grade(v["shade"], "dark ", 0.7, "", 1.0, "pale ")
    side = grade(v["shift"][0], "left of the middle", -0.08, "in the middle", 0.08, "right of the middle")
    return [f"{shade}{v['ground']} leaves behind", grade(v["size"], "from afar", 0.83, "", 0.97, "close by"), side]


def draw_flower(p: dict, v: dict, rng: Generator) -> Canvas:
    canvas = Canvas(shade_color(v["ground_color"], v["shade"]))
    for x, y, width, height, shade, turn in v["blades"]:  # leaves and blades of grass behind the flower
        canvas.ellipse(x, y, width, height, shade_color(v["ground_color"], shade), turn)
    canvas.line([v["shift"], (v["shift"][0] + v["stem"], -1.3)], (70, 120, 60), 0.07)
    canvas.place(0, 1, v["shift"])
    canvas.ellipse(0.3, -0.6, 0.35, p["leaf"], (85, 145, 70), v["leaf"])
    canvas.place(v["turn"], v["size"], v["shift"], v["shear"])
    along = np.linspace(0, 1, 12)
    # A petal's half width along its length; `tip` moves the widest place outwards and rounds the end.
    widest = p["width"] * 0.9 * np.pi * p["length"] * 0.5 / p["petals"] ** 0.8
    profile = np.sin(np.pi * along ** (1 + p["tip"])) ** 0.8 * widest
    outline = join_sides((along * p["length"], profile), (along * p["length"], -profile))
    for ring in range(2 if p["ring"] else 1):
        for petal in range(p["petals"]):
            angle = 2 * np.pi * (petal + 0.5 * ring) / p["petals"]
            rotate = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) * (1 - 0.35 * ring)
            canvas.polygon(outline * 1.06 @ rotate, shade_color(p["petal_color"], 0.72))
            canvas.polygon(outline @ rotate, shade_color(p["petal_color"], 1 + 0.2 * ring))
            if p["stripe"]:
                canvas.polygon(outline * (0.9, 0.2 + 0.35 * p["stripe"]) @ rotate, p["stripe_color"])
    canvas.ellipse(0, 0, p["centre_size"], p["centre_size"], shade_color(p["centre_color"], 0.8))
    canvas.ellipse(0, 0, p["centre_size"] * 0.75, p["centre_size"] * 0.75, p["centre_color"])
    return canvas


# --- sketches --------------------------------------------------------------------------------------------------------


def make_fish(rng: Generator) -> dict:
    p = draw_parameters(rng, length=(0.42, 0.7), shape=("slim", "round"))
    p |= draw_parameters(rng, height=(0.16, 0.26) if p["shape"] == "slim" else (0.33, 0.48))
    p |= draw_parameters(rng, tail=("forked", "rounded", "pointed"), tail_size=(0.2, 0.4))
    p |= draw_parameters(rng, pattern=("stripes", "spots", "scales", "no pattern"), marks=range(3, 8))
    p |= draw_parameters(rng, slant=(-0.5, 0.5), fin=(0.1, 0.42), fin_place=(-0.3, 0.3), belly_fin=(0, 0.3))
    p |= draw_parameters(rng, eye=(0.035, 0.09), eye_place=(0.55, 0.8), mouth=(-0.1, 0.1))
    return p | draw_parameters(rng, gill=0.5, whiskers=0.25)


def tell_fish(p: dict) -> tuple[str, str, list[str]]:
    leaning = grade(p["slant"], " leaning back", -0.15, "", 0.15, " leaning forward")
    pattern = p["pattern"] + (leaning if p["pattern"] == "stripes" else "")
    where = grade(p["fin_place"], " far back", -0.12, "", 0.12, " in front")
    details = [
        pattern if pattern == "no pattern" else f"{NUMBERS[p['marks']]} {pattern}",
        grade(p["fin"], "a low fin", 0.2, "a fin", 0.32, "a high fin") + where,
        grade(p["belly_fin"], "no belly fin", 0.08, "", 0.19, "a long belly fin"),
        grade(p["eye"], "a small eye", 0.053, "", 0.072, "a large eye"),
        grade(p["tail_size"], "a short tail", 0.26, "", 0.34, "a long tail"),
        grade(p["length"], "short", 0.5, "", 0.62, "long"),
        "a gill" if p["gill"] else "",
        "whiskers" if p["whiskers"] else "",
    ]
    return f"a sketch of a {p['shape']} fish", f"a sketch of a {p['shape']} fish with a {p['tail']} tail", details


PAPERS = {"white": (250, 248, 240), "brown": (235, 225, 200), "blue": (225, 230, 235), "pink": (245, 235, 235)}


def make_fish_view(rng: Generator) -> dict:
    v = draw_parameters(rng, paper=PAPERS, ruled=0.3, pencil=(0.6, 1.2), thick=(0.045, 0.075), wobble=(0.004, 0.016))
    return v | {"place": draw_place(rng, 0.2, (0.85, 1.15), (0.09, 0.09), 0, 0.1)}


def tell_fish_view(v: dict) -> list[str]:
    stroke = grade(v["thick"], "thin ", 0.055, "", 0.065, "thick ")
    stroke += grade(v["pencil"], "dark lines", 0.9, "pale lines")
    heading = grade(v["place"][0], "swimming down", -0.1, "swimming level", 0.1, "swimming up")
    return [("ruled " if v["ruled"] else "plain ") + f"{v['paper']} paper", stroke, heading]


def draw_fish(p: dict, v: dict, rng: Generator) -> Canvas:
    canvas = Canvas(PAPERS[v["paper"]])
    if v["ruled"]:
        for y in np.arange(-1, 1, 0.25):
            canvas.line([(-1, y), (1, y)], shade_color(PAPERS[v["paper"]], 0.88), 0.012)
    pencil = shade_color((45, 45, 55), v["pencil"])
    canvas.place(*v["place"])

    def stroke(points: ArrayLike, width=1.0):
        points = np.asarray(points, dtype=float)
        canvas.line(points + rng.normal(0, v["wobble"], points.shape), pencil, v["thick"] * width)

    length, height = p["length"], p["height"]
    angle = np.linspace(0.12 - np.pi, np.pi - 0.12, 30)
    stroke(np.stack([length * np.cos(angle), height * np.sin(angle) * (1 + 0.25 * np.cos(angle))], axis=1))
    size, root = p["tail_size"], -length
    if p["tail"] == "forked":
        stroke([(root, 0.03), (root - size, size), (root - size * 0.45, 0), (root - size, -size), (root, -0.03)])
    elif p["tail"] == "rounded":
        fan = trace_ellipse(root - size * 0.6, 0, size * 0.6, size * 0.9, points=16)
        stroke(np.concatenate([[(root, 0)], fan[9:] * (1, -1), fan[:9], [(root, 0)]]))
    else:
        stroke([(root, 0.03), (root - size, size * 0.8), (root - size, -size * 0.8), (root, -0.03)])
    x = p["fin_place"] * length
    stroke([(x - 0.2, height * 0.95), (x - 0.05, height + p["fin"]), (x + 0.2, height * 0.95)])
    if p["belly_fin"] > 0.08:
        stroke([(x - 0.1, -height * 0.95), (x - 0.15, -height - p["belly_fin"]), (x + 0.12, -height * 0.98)])
    eye_x = p["eye_place"] * length
    stroke(trace_ellipse(eye_x, height * 0.25, p["eye"], p["eye"], points=12), 1.2)
    stroke([(length * 0.98, p["mouth"] * height), (length * 0.8, (p["mouth"] - 0.25) * height)])
    if p["gill"]:
        stroke([(eye_x - 0.13, height * 0.5), (eye_x - 0.2, 0), (eye_x - 0.13, -height * 0.5)])
    if p["whiskers"]:
        stroke([(length, 0), (length + 0.18, -0.12)], 0.7)
        stroke([(length, 0), (length + 0.16, -0.2)], 0.7)
    for mark in np.linspace(-0.7, 0.35, p["marks"]):
        reach, at = height * np.sqrt(1 - mark**2) * 0.85, mark * length
        if p["pattern"] == "stripes":
            stroke([(at + p["slant"] * reach, reach), (at - p["slant"] * reach, -reach)], 1.3)
        elif p["pattern"] == "spots":
            canvas.ellipse(at, reach * p["slant"] * (1 if round(mark * 10) % 2 else -1), 0.05, 0.05, pencil)
        elif p["pattern"] == "scales":
            for y in (-0.5, 0.1, 0.6):
                stroke([(at, (y + 0.22) * reach), (at - 0.06, y * reach), (at, (y - 0.22) * reach)], 0.8)
    return canvas


# --- objects ---------------------------------------------------------------------------------------------------------


SYMBOL_WORDS = (
    "heart spade club star umbrella telephone plane note sun anchor blossom flag moon cross clover horse envelope flash"
)
SYMBOLS = dict(zip("♥♠♣★☂☎✈♫☀⚓✿⚑☾✚☘♞✉⚡", SYMBOL_WORDS.split(), strict=True))
GLYPHS = {"letter": "ABCDEFGHJKLMNPQRSTUVWXYZ", "number": "23456789", "symbol": "".join(SYMBOLS)}
BADGES = {  # their outlines
    "round": trace_ellipse(0, 0, 0.72, 0.72, points=40),
    "square": np.array([(-0.64, -0.64), (0.64, -0.64), (0.64, 0.64), (-0.64, 0.64)]),
    "six-sided": trace_ellipse(0, 0, 0.76, 0.76, points=6),
    "star-shaped": trace_ellipse(0, 0, 0.88, 0.88, points=16) * np.resize([1, 0.72], (1, 16)).T,
    "shield-shaped": join_sides(
        ((0, -0.64, -0.62, -0.36, 0), (0.78, 0.68, -0.05, -0.55, -0.82)),
        ((0.64, 0.62, 0.36), (0.68, -0.05, -0.55)),
    ),
}
FONTS = ("DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono.ttf")


def make_badge(rng: Generator) -> dict:
    p = draw_parameters(rng, kind=GLYPHS, shape=BADGES)
    p["color"] = choose_word(rng, "red", "orange", "yellow", "green", "blue", "purple", "black")
    p["badge_color"] = draw_near_color(rng, p["color"])
    p["glyph"] = choose_word(rng, *GLYPHS[p["kind"]])
    p["font"] = FONTS[0] if p["kind"] == "symbol" else choose_word(rng, *FONTS)
    on_it = ("black", "blue", "white") if p["color"] in ("orange", "yellow") else ("white", "yellow", "pink")
    p["glyph_color"] = draw_near_color(rng, choose_word(rng, *on_it))
    p["border"] = rng.uniform(0, 0.16)
    p["border_color"] = draw_near_color(rng, choose_word(rng, "white", "black", "yellow", "gray", "brown"))
    return p | draw_parameters(rng, glyph_size=(0.75, 1.1), bar=0.25)


def tell_badge(p: dict) -> tuple[str, str, list[str]]:
    glyph = SYMBOLS.get(p["glyph"], p["glyph"].lower())
    letters = {FONTS[0]: "", FONTS[1]: " with serifs", FONTS[2]: " in thin strokes"}
    size = grade(p["glyph_size"], "small ", 0.85, "", 1.0, "large ")
    border = grade(p["border"], "no", 0.02, "thin", 0.06, "", 0.11, "thick")
    shade = name_color(p["badge_color"])
    details = [
        f"the {size}{name_color(p['glyph_color'])} {p['kind']} {glyph}{letters[p['font']]}",
        "no border" if border == "no" else add_article(f"{border} {name_color(p['border_color'])} border".strip()),
        f"almost {shade}" if shade != p["color"] else "",
        f"a {name_color(p['border_color'])} bar" if p["bar"] else "",
    ]
    return add_article(f"{p['color']} badge"), add_article(f"{p['color']} {p['shape']} badge"), details


def make_badge_view(rng: Generator) -> dict:
    v = draw_parameters(rng, wall=COLORS, style=("tiles", "boards", "posters"))
    v["posters"] = [(*rng.uniform(-1, 1, 2), draw_near_color(rng, choose_word(rng, *COLORS), 30)) for _ in range(8)]
    v |= {"wall_color": draw_near_color(rng, v["wall"], 25), "boards": rng.uniform(0.75, 1.25, 8)}
    v |= {"turn": rng.normal(0, 0.3), "size": rng.uniform(0.65, 1.05)}
    return v | {"shear": rng.normal(0, 0.22), "shift": rng.normal(0, 0.13, 2)}


def tell_badge_view(v: dict) -> list[str]:
    wall = f"{v['wall']} wall with posters" if v["style"] == "posters" else f"wall of {v['wall']} {v['style']}"
    turned = grade(v["turn"], "turned right", -0.15, "upright", 0.15, "turned left")
    return ["on " + add_article(wall), turned, grade(v["size"], "from afar", 0.78, "", 0.93, "close by")]


def draw_badge(p: dict, v: dict, rng: Generator) -> Canvas:
    wall, outline = v["wall_color"], BADGES[p["shape"]]
    canvas = Canvas(wall)
    for step, shade, (x, y, poster) in zip(np.arange(-1.2, 1.2, 0.3), v["boards"], v["posters"], strict=False):
        if v["style"] == "tiles":
            canvas.line([(step, -1.2), (step, 1.2)], shade_color(wall, 0.8), 0.03)
            canvas.line([(-1.2, step), (1.2, step)], shade_color(wall, 0.8), 0.03)
        elif v["style"] == "boards":
            canvas.box(-1.2, step, 1.2, step + 0.27, shade_color(wall, shade))
        else:
            canvas.box(x, y, x + 0.5, y + 0.4, poster)
    canvas.place(v["turn"], v["size"], v["shift"] + (0.05, -0.06), v["shear"])
    canvas.polygon(outline, shade_color(wall, 0.45))  # its shadow
    canvas.place(v["turn"], v["size"], v["shift"], v["shear"])
    canvas.polygon(outline, p["border_color"])
    canvas.polygon(outline * (1 - p["border"]), p["badge_color"])
    if p["bar"]:
        canvas.box(-0.5, -0.45, 0.5, -0.37, p["border_color"])
    for part in trace_glyph(p["glyph"], p["font"]):
        color = p["glyph_color"] if measure_turning(part) < 0 else p["badge_color"]
        canvas.polygon(part * 0.85 * p["glyph_size"] + (0, 0.03), color)
    return canvas


@cache
def trace_glyph(glyph: str, font: str) -> list[np.ndarray]:
    """Outlines of one character, centred, largest first; holes are told by their turning direction."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / font
    outlines = TextPath((0, 0), glyph, size=1, prop=FontProperties(fname=str(path))).to_polygons()
    low = np.min([o.min(0) for o in outlines], axis=0)
    high = np.max([o.max(0) for o in outlines], axis=0)
    centred = [(o - (low + high) / 2) / (high - low).max() for o in outlines]
    return sorted(centred, key=lambda o: -abs(measure_turning(o)))


def measure_turning(outline: np.ndarray) -> float:
    """Twice the signed area: negative for a TrueType outer outline, positive for a hole."""
    x, y = outline.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1))


# --- products --------------------------------------------------------------------------------------------------------


def make_vase(rng: Generator) -> dict:
    p = {"profile": rng.uniform(0.14, 0.52, 5) * (0.75, 1.0, 1.1, 0.8, 0.75), "height": rng.uniform(0.55, 0.8)}
    p |= draw_parameters(rng, color=("red", "green", "blue", "white", "brown", "black"))
    p["vase_color"] = draw_near_color(rng, p["color"], 18)
    p |= draw_parameters(rng, pattern=("plain", "striped", "dotted", "zigzag"))
    others = [color for color in ("yellow", "white", "orange", "blue", "pink", "black") if color != p["color"]]
    p["pattern_color"] = draw_near_color(rng, choose_word(rng, *others))
    p |= draw_parameters(rng, bands=range(1, 4), place=(-0.5, 0.2), step=(0.18, 0.32), thick=(0.04, 0.11))
    return p | draw_parameters(rng, marks=range(4, 9), handles=0.45, handle_size=(0.12, 0.24))


def tell_vase(p: dict) -> tuple[str, str, list[str]]:
    foot, _, belly, _, neck = p["profile"]
    shade, pattern = name_color(p["vase_color"]), ""
    if p["pattern"] != "plain":
        kind = {"striped": "stripe", "dotted": "row", "zigzag": "zigzag"}[p["pattern"]]
        where = grade(p["place"], " low down", -0.27, "", -0.03, " high up")
        bold = grade(p["thick"], "fine ", 0.06, "", 0.09, "bold ")
        pattern = count_in_words(p["bands"], f"{bold}{name_color(p['pattern_color'])} {kind}") + where
    details = [
        pattern,
        grade(p["height"], "low", 0.63, "", 0.72, "tall"),
        grade(foot, "a narrow foot", 0.2, "", 0.3, "a wide foot"),
        grade(belly, "a slim belly", 0.28, "", 0.43, "a round belly"),
        grade(neck, "a narrow neck", 0.2, "", 0.3, "a wide neck"),
        grade(p["handle_size"], "small handles", 0.16, "", 0.2, "large handles") if p["handles"] else "",
        f"almost {shade}" if shade != p["color"] else "",
        grade(p["profile"][3], "narrow shoulders", 0.2, "", 0.32, "wide shoulders"),
    ]
    handles = "two handles" if p["handles"] else "no handles"
    return add_article(f"{p['color']} vase"), f"a {p['pattern']} {p['color']} vase with {handles}", details


def make_vase_view(rng: Generator) -> dict:
    v = draw_parameters(rng, wall=("white", "gray", "yellow", "blue", "pink", "brown"))
    v["wall_color"] = draw_near_color(rng, v["wall"], 25)
    v |= {"table": rng.uniform(-0.75, -0.45, 2), "table_tone": rng.uniform(0.6, 0.95)}
    v["place"] = draw_place(rng, 0.07, (0.8, 1.12), (0.14, 0.08), 0, 0.06)
    return v | {"shaded": int(rng.choice([-1, 1]))}


def tell_vase_view(v: dict) -> list[str]:
    table = grade(v["table_tone"], "a dark table", 0.72, "a table", 0.84, "a pale table")
    light = "light from the left" if v["shaded"] > 0 else "light from the right"
    side = grade(v["place"][2][0], "left of the middle", -0.09, "in the middle", 0.09, "right of the middle")
    return [f"a {v['wall']} wall behind", f"on {table}", light, side]


def draw_vase(p: dict, v: dict, rng: Generator) -> Canvas:
    wall = v["wall_color"]
    canvas = Canvas(shade_color(wall, 1.2))
    canvas.polygon([(-2, -2), (2, -2), (2, v["table"][0]), (-2, v["table"][1])], shade_color(wall, v["table_tone"]))
    canvas.place(*v["place"])
    levels = np.linspace(-p["height"], p["height"], 25)

    def half_width(y: ArrayLike):
        return interpolate(y, np.linspace(-p["height"], p["height"], 5), p["profile"])

    canvas.ellipse(0.15, -p["height"], 0.55, 0.1, shade_color(wall, 0.5))  # its shadow
    if p["handles"]:
        for side in (-1, 1):
            ring = trace_ellipse(side * (half_width(0.15) + 0.04), 0.15, p["handle_size"], p["handle_size"] * 1.3)
            canvas.line(np.concatenate([ring, ring[:2]]), shade_color(p["vase_color"], 0.75), 0.07)
    width = half_width(levels)
    canvas.polygon(join_sides((width, levels), (-width, levels)), p["vase_color"])
    for band in range(p["bands"] if p["pattern"] != "plain" else 0):
        y = p["place"] + band * p["step"]
        reach, color = half_width(y) * 0.98, p["pattern_color"]
        if p["pattern"] == "striped":
            canvas.line([(-reach, y), (reach, y)], color, p["thick"])
        elif p["pattern"] == "dotted":
            for x in np.linspace(-0.85, 0.85, p["marks"]):
                canvas.ellipse(x * reach, y, p["thick"] * 0.7, p["thick"] * 0.7, color)
        else:
            x = np.linspace(-1, 1, 2 * p["marks"] - 1)
            canvas.line(np.stack([x * reach, y + 0.06 * np.resize([-1, 1], len(x))], 1), color, p["thick"] * 0.7)
    side = v["shaded"]  # the side that lies in the shade, and a highlight on the other
    shade = join_sides((side * width, levels), (side * width * 0.72, levels))
    canvas.polygon(shade, shade_color(p["vase_color"], 0.68))
    canvas.line(np.stack([-side * width[5:-4] * 0.62, levels[5:-4]], 1), shade_color(p["vase_color"], 1.4), 0.05)
    canvas.ellipse(0, p["height"], width[-1], 0.06, shade_color(p["vase_color"], 0.5))
    return canvas


def interpolate(y: ArrayLike, knots: ArrayLike, values: ArrayLike) -> np.ndarray:
    """Cubic-like interpolation by averaging three shifted linear ones: no bumps, no overshoot."""
    gap = (knots[1] - knots[0]) * 0.35
    return np.mean([np.interp(np.asarray(y) + d, knots, values) for d in (-gap, 0, gap)], axis=0)


# --- faces -----------------------------------------------------------------------------------------------------------


HAIR = {
    "black": (45, 38, 38),
    "brown": (105, 68, 42),
    "blond": (222, 188, 105),
    "red": (175, 80, 40),
    "gray": (165, 162, 160),
}
SKIN = ((250, 220, 196), (238, 195, 160), (214, 160, 118), (165, 112, 76), (112, 74, 52))


def make_face(rng: Generator) -> dict:
    p = draw_parameters(rng, hair=HAIR)
    p["hair_color"] = vary_color(rng, HAIR[p["hair"]], 10)
    p |= draw_parameters(rng, style=("short", "long", "curly"), hair_height=(0.1, 0.3), fringe=(0.2, 0.45))
    p["skin"] = vary_color(rng, SKIN[rng.integers(len(SKIN))], 7)
    p |= draw_parameters(rng, width=(0.4, 0.56), height=(0.54, 0.7), jaw=(0.65, 1.0))
    p |= draw_parameters(rng, eyes=(0.16, 0.25), eye_size=(0.055, 0.1), eye_height=(0.02, 0.16))
    p["eye_color"] = draw_near_color(rng, choose_word(rng, "blue", "brown", "green", "black"))
    p |= draw_parameters(rng, brow=(0.02, 0.06), brow_slant=(-0.05, 0.05), nose=(0.1, 0.22), nose_width=(0.04, 0.1))
    p |= draw_parameters(rng, mouth=(0.12, 0.25), lips=(0.025, 0.06), glasses=0.35)
    p["glasses_color"] = draw_near_color(rng, choose_word(rng, "black", "red", "blue", "brown"))
    return p | draw_parameters(rng, beard=0.3, ears=(0.06, 0.12))


def tell_face(p: dict) -> tuple[str, str, list[str]]:
    details = [
        grade(sum(p["skin"]) / 3, "dark", 95, "brown", 140, "tan", 175, "fair", 205, "pale") + " skin",
        f"{name_color(p['eye_color'])} eyes" + grade(p["eyes"], " close together", 0.185, "", 0.225, " far apart"),
        f"{name_color(p['glasses_color'])} glasses" if p["glasses"] else "",
        "a beard" if p["beard"] else "",
        grade(p["jaw"], "a narrow chin", 0.75, "", 0.9, "a broad chin"),
        grade(p["width"], "slim", 0.45, "", 0.51, "broad"),
        grade(p["mouth"], "a small mouth", 0.16, "", 0.21, "a wide mouth"),
        grade(p["nose"], "a short nose", 0.14, "", 0.18, "a long nose"),
        grade(p["brow_slant"], "stern brows", -0.02, "", 0.02, "sad brows"),
        grade(p["fringe"], "a short fringe", 0.28, "", 0.38, "a long fringe"),
    ]
    return f"a face with {p['hair']} hair", f"a face with {p['style']} {p['hair']} hair", details


def make_face_view(rng: Generator) -> dict:
    v = draw_parameters(rng, wall=("gray", "blue", "green", "white", "brown", "orange", "purple"), shirt=COLORS)
    v["wall_color"] = draw_near_color(rng, v["wall"], 25)
    v |= {"corner": rng.uniform(-1, 1, 2), "corner_tone": rng.uniform(0.7, 1.3)}
    v["shirt_color"] = draw_near_color(rng, v["shirt"], 25)
    v["place"] = draw_place(rng, 0.13, (0.85, 1.2), (0.1, 0.08), -0.02, 0.05)
    return v | {"look": rng.normal(0, 0.025, 2), "smile": rng.uniform(-0.06, 0.12)}


def tell_face_view(v: dict) -> list[str]:
    mood = grade(v["smile"], "looking serious", 0.0, "looking calm", 0.06, "smiling")
    tilt = grade(v["place"][0], "head to the right", -0.07, "head upright", 0.07, "head to the left")
    return [f"{add_article(v['shirt'])} shirt", f"{add_article(v['wall'])} wall", mood, tilt]


def draw_face(p: dict, v: dict, rng: Generator) -> Canvas:
    wall = v["wall_color"]
    canvas = Canvas(wall)
    canvas.polygon([(-2, -2), (2, -2), (2, v["corner"][0]), (-2, v["corner"][1])], shade_color(wall, v["corner_tone"]))
    canvas.place(*v["place"])
    width, height, skin, hair, look = p["width"], p["height"], p["skin"], p["hair_color"], v["look"]
    if p["style"] == "long":
        top, end = width * 1.15, width * 1.25
        falling = [(-end, -height * 1.1), (end, -height * 1.1), (top, height * 0.5), (-top, height * 0.5)]
        canvas.polygon(falling, shade_color(hair, 0.85))
    canvas.ellipse(0, -1.25, 0.85, 0.5, v["shirt_color"])
    canvas.polygon([(-0.17, -1), (0.17, -1), (0.15, -0.4), (-0.15, -0.4)], shade_color(skin, 0.8))
    crown = height + p["hair_height"]
    if p["style"] == "curly":
        for angle in np.linspace(-0.3, np.pi + 0.3, 11):
            canvas.ellipse(width * 1.02 * np.cos(angle), 0.15 + (crown - 0.22) * np.sin(angle), 0.19, 0.19, hair)
    else:
        canvas.ellipse(0, 0.12, width * 1.12, crown - 0.1, hair)
    for side in (-1, 1):
        canvas.ellipse(side * width * 0.98, 0.02, p["ears"], 0.12, shade_color(skin, 0.88))
    angle = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    narrow = np.where(np.sin(angle) < 0, 1 - (1 - p["jaw"]) * np.sin(angle) ** 2, 1)
    face = np.stack([width * narrow * np.cos(angle), height * np.sin(angle)], axis=1)
    canvas.polygon(face, skin)
    if p["beard"]:
        canvas.polygon(np.concatenate([face[20:35] * 1.03, [(width * 0.5, -0.22), (-width * 0.5, -0.22)]]), hair)
    top = height * (1 - p["fringe"])
    parting = [(-width * 0.6, top), (0, top + 0.12), (width * 0.6, top)][:: 1 if p["jaw"] > 0.8 else -1]
    canvas.polygon(np.concatenate([face[face[:, 1] > top] * 1.06, parting]), hair)
    for side in (-1, 1):
        x, y, size = side * p["eyes"], p["eye_height"], p["eye_size"]
        canvas.ellipse(x, y, size, size * 0.7, (250, 250, 250))
        canvas.ellipse(x + look[0], y + look[1] * 0.5, size * 0.55, size * 0.6, p["eye_color"])
        canvas.ellipse(x + look[0], y + look[1] * 0.5, size * 0.25, size * 0.3, (20, 20, 20))
        brow, slant = y + size + 0.06, side * p["brow_slant"]
        canvas.line([(x - 0.1, brow + slant), (x + 0.1, brow - slant)], shade_color(hair, 0.8), p["brow"])
        if p["glasses"]:
            ring = trace_ellipse(x, y, 0.15, 0.13)
            canvas.line(np.concatenate([ring, ring[:2]]), p["glasses_color"], 0.035)
    if p["glasses"]:
        bridge = [(-p["eyes"] + 0.15, p["eye_height"]), (p["eyes"] - 0.15, p["eye_height"])]
        canvas.line(bridge, p["glasses_color"], 0.035)
    tip = p["eye_height"] - p["nose"] - 0.06
    canvas.polygon([(0, p["eye_height"]), (p["nose_width"], tip), (-p["nose_width"], tip)], shade_color(skin, 0.86))
    x = np.linspace(-1, 1, 9)
    mouth = np.stack([x * p["mouth"], tip - 0.16 + v["smile"] * (x**2 - 0.5)], axis=1)
    canvas.line(mouth, shade_color((190, 80, 80), 0.9), p["lips"])
    return canvas


# domain: how a thing is made and told, how a view is made and told, and how both are drawn
PAINTERS: dict[str, tuple[Callable, Callable, Callable, Callable, Callable]] = {
    "landmarks": (make_landmark, tell_landmark, make_landmark_view, tell_landmark_view, draw_landmark),
    "nature": (make_flower, tell_flower, make_flower_view, tell_flower_view, draw_flower),
    "sketches": (make_fish, tell_fish, make_fish_view, tell_fish_view, draw_fish),
    "objects": (make_badge, tell_badge, make_badge_view, tell_badge_view, draw_badge),
    "products": (make_vase, tell_vase, make_vase_view, tell_vase_view, draw_vase),
    "faces": (make_face, tell_face, make_face_view, tell_face_view, draw_face),
}
