"""The mini world: six domains of small images, drawn by code, with captions and labels.

It mirrors GPR1200 (landmarks, nature, sketches, objects, products, faces) at a size that a laptop handles in
minutes. A class is a set of parameters (petal count and colours, the profile of a vase, the proportions of a
face ...); an image is one view of it: background, rotation, scale, light, noise, occlusion. Captions say only part
of what distinguishes a class, so that different classes share captions, as on the web.

Every image follows from (seed, split, domain, class, view) alone: splits never share a class, and any image can be
drawn again on its own. `load_split` draws a split once and keeps it in a cache folder.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from PIL import Image, ImageDraw

DOMAINS = ("landmarks", "nature", "sketches", "objects", "products", "faces")
# split: (number of the class stream, classes per domain, views per class). `shifted` shows the classes of `test`
# in another light, so both read the same class stream and differ only in their views.
SPLITS = {
    "pairs": (0, 300, 8),
    "train": (1, 120, 10),
    "validation": (2, 20, 10),
    "test": (3, 40, 10),
    "shifted": (3, 40, 10),
    "bank": (4, 600, 4),  # pairs that no pre-training saw; last: views depend on a split's place in this list
}
SIZE = 64  # pixels; drawn three times larger and averaged, which smooths the edges
VERSION = 2  # part of the cache's name: raise it when a drawing changes

COLORS = {
    "red": (200, 45, 45), "orange": (232, 132, 40), "yellow": (238, 205, 70), "green": (70, 150, 75),
    "blue": (60, 105, 190), "purple": (135, 75, 165), "pink": (236, 140, 175), "white": (240, 236, 228),
    "brown": (130, 85, 55), "black": (50, 45, 50), "gray": (140, 140, 145),
}  # fmt: skip
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


# --- drawing ---------------------------------------------------------------------------------------------------------


class Canvas:
    """A picture whose shapes are given in object coordinates: x and y from -1 to 1, y pointing up."""

    def __init__(self, background: tuple, scale: int = 3):
        self.pixels = SIZE * scale
        self.image = Image.new("RGB", (self.pixels, self.pixels), background)
        self.draw = ImageDraw.Draw(self.image)
        self.place()

    def place(self, rotation: float = 0.0, size: float = 1.0, shift: tuple = (0.0, 0.0), shear: float = 0.0) -> None:
        """Set where the shapes that follow land: rotation in radians, shift in object coordinates."""
        cos, sin = np.cos(rotation) * size, np.sin(rotation) * size
        half = self.pixels / 2
        self.matrix = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, shear], [0, 1]]) * half
        self.matrix[1] *= -1
        self.offset = np.array([half + shift[0] * half, half - shift[1] * half])

    def polygon(self, points, color) -> None:
        points = np.asarray(points, dtype=float) @ self.matrix.T + self.offset
        self.draw.polygon(points.ravel().tolist(), fill=tuple(int(c) for c in color))

    def ellipse(self, x: float, y: float, width: float, height: float, color, turn: float = 0.0) -> None:
        self.polygon(ellipse(x, y, width, height, turn), color)

    def line(self, points, color, width: float) -> None:
        points = np.asarray(points, dtype=float) @ self.matrix.T + self.offset
        pixels = max(1, round(width * self.pixels / 2))
        self.draw.line(points.ravel().tolist(), fill=tuple(int(c) for c in color), width=pixels, joint="curve")


def ellipse(x, y, width, height, turn=0.0, points=28) -> np.ndarray:
    """The outline of an ellipse with half axes width and height, as (points, 2)."""
    cos, sin = circle(points)
    dx, dy = width * cos, height * sin
    return np.stack([x + dx * np.cos(turn) - dy * np.sin(turn), y + dx * np.sin(turn) + dy * np.cos(turn)], axis=1)


@cache
def circle(points: int) -> tuple[np.ndarray, np.ndarray]:
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return np.cos(angle), np.sin(angle)


def tone(color, factor: float) -> tuple:
    """A color made darker (factor < 1) or lighter (factor > 1)."""
    color = np.asarray(color, dtype=float)
    mixed = color * factor if factor <= 1 else color + (255 - color) * (factor - 1)
    return tuple(np.clip(mixed, 0, 255))


def near(rng, name: str, spread: float = 16.0) -> tuple:
    """A shade of a named color: two classes may share the name and differ in the shade."""
    return tuple(np.clip(np.array(COLORS[name]) + rng.normal(0, spread, 3), 0, 255))


# --- domains: what a class is, what its captions say, how a view of it is drawn --------------------------------------


def make_landmark(rng) -> dict:
    towers = int(rng.integers(1, 5))
    return {
        "towers": towers,
        "heights": rng.uniform(0.45, 1.15, towers),
        "widths": rng.uniform(0.13, 0.26, towers),
        "hall": rng.uniform(0.25, 0.6),
        "wall": (wall := str(rng.choice(["white", "yellow", "brown", "gray", "red"]))),
        "wall_color": near(rng, wall),
        "roof": str(rng.choice(["pointed", "domed", "flat", "stepped"])),
        "roof_color": near(rng, str(rng.choice(["red", "blue", "green", "brown", "black"]))),
        "roof_height": rng.uniform(0.14, 0.38),
        "window_rows": int(rng.integers(1, 4)),
        "window_columns": int(rng.integers(2, 7)),
        "arched": bool(rng.random() < 0.5),
        "door": rng.uniform(0.08, 0.2),
        "band": bool(rng.random() < 0.4),
        "flag": bool(rng.random() < 0.3),
    }


def caption_landmark(p: dict) -> list[str]:
    towers = f"{NUMBERS[p['towers']]} tower" + ("s" if p["towers"] > 1 else "")
    wall = {"yellow": "sandstone", "red": "brick"}.get(p["wall"], p["wall"])
    return [
        f"a {wall} building",
        f"a {wall} building with {towers}",
        f"a {wall} building with {towers} and {p['roof']} roofs",
    ]


def draw_landmark(p: dict, rng) -> Canvas:
    sky = np.array([(150, 195, 235), (235, 180, 140), (70, 85, 130), (205, 212, 220)][rng.integers(4)])
    canvas = Canvas(tuple(int(c) for c in np.clip(sky + rng.normal(0, 14, 3), 0, 255)))
    for _ in range(rng.integers(0, 3)):  # clouds
        x, y = rng.uniform(-1, 1), rng.uniform(0.3, 0.95)
        for dx in (-0.16, 0, 0.16):
            canvas.ellipse(x + dx, y, 0.17, 0.08, tone(sky, 1.45))
    hills = near(rng, str(rng.choice(["green", "brown", "gray"])), 20)
    canvas.ellipse(rng.uniform(-1, 1), -0.75, 1.4, rng.uniform(0.35, 0.7), tone(hills, 1.2))
    canvas.polygon([(-2, -0.55), (2, -0.55), (2, -2), (-2, -2)], hills)
    canvas.place(
        rng.normal(0, 0.06), rng.uniform(0.75, 1.1), (rng.normal(0, 0.12), rng.normal(-0.05, 0.07)), rng.normal(0, 0.08)
    )
    ground, wall, lit = -0.62, p["wall_color"], tuple(rng.choice([(60, 60, 75), (250, 225, 130)]))
    canvas.polygon([(-0.66, ground), (0.66, ground), (0.66, ground + p["hall"]), (-0.66, ground + p["hall"])], wall)
    for row in range(p["window_rows"]):
        for column in range(p["window_columns"]):
            x = -0.58 + 1.16 * (column + 0.5) / p["window_columns"]
            y = ground + p["hall"] * (row + 0.55) / p["window_rows"]
            window(canvas, x, y, 0.045, 0.32 * p["hall"] / p["window_rows"], p["arched"], lit)
    centres = np.linspace(-0.52, 0.52, p["towers"]) if p["towers"] > 1 else [0.0]
    for x, height, width in zip(centres, p["heights"], p["widths"], strict=True):
        top = ground + height
        canvas.polygon([(x - width, ground), (x + width, ground), (x + width, top), (x - width, top)], tone(wall, 0.9))
        canvas.polygon(
            [(x + width * 0.4, ground), (x + width, ground), (x + width, top), (x + width * 0.4, top)], tone(wall, 0.72)
        )
        if p["band"]:
            canvas.polygon(
                [(x - width, top - 0.1), (x + width, top - 0.1), (x + width, top - 0.05), (x - width, top - 0.05)],
                p["roof_color"],
            )
        window(canvas, x - width * 0.2, top - 0.22, 0.05, 0.08, p["arched"], lit)
        draw_roof(canvas, p, x, top, width * 1.12)
    window(canvas, 0, ground + p["door"], p["door"] * 0.6, p["door"], True, (75, 50, 40))
    return canvas


def window(canvas, x, y, width, height, arched, color) -> None:
    canvas.polygon(
        [
            (x - width, y - height),
            (x + width, y - height),
            (x + width, y + height * 0.5),
            (x - width, y + height * 0.5),
        ],
        color,
    )
    if arched:
        canvas.ellipse(x, y + height * 0.5, width, height * 0.5, color)


def draw_roof(canvas, p, x, top, width) -> None:
    color, height = p["roof_color"], p["roof_height"]
    if p["roof"] == "pointed":
        canvas.polygon([(x - width, top), (x + width, top), (x, top + height * 1.3)], color)
        canvas.polygon([(x + width * 0.4, top), (x + width, top), (x, top + height * 1.3)], tone(color, 0.75))
    elif p["roof"] == "domed":
        canvas.polygon(np.maximum(ellipse(x, top, width, height), (-2, top)), color)
        canvas.ellipse(x - width * 0.3, top + height * 0.4, width * 0.25, height * 0.25, tone(color, 1.35))
    elif p["roof"] == "flat":
        canvas.polygon(
            [
                (x - width * 1.1, top),
                (x + width * 1.1, top),
                (x + width * 1.1, top + 0.07),
                (x - width * 1.1, top + 0.07),
            ],
            color,
        )
    else:
        for step in range(3):
            w, y = width * (1 - 0.3 * step), top + height * 0.33 * step
            canvas.polygon(
                [(x - w, y), (x + w, y), (x + w, y + height * 0.34), (x - w, y + height * 0.34)],
                tone(color, 1 - 0.1 * step),
            )
    if p["flag"]:
        canvas.line([(x, top), (x, top + height + 0.3)], (60, 60, 60), 0.02)
        canvas.polygon(
            [(x, top + height + 0.3), (x + 0.16, top + height + 0.25), (x, top + height + 0.2)], (215, 60, 50)
        )


def make_flower(rng) -> dict:
    return {
        "petals": int(rng.choice([4, 5, 6, 8, 12])),
        "color": (color := str(rng.choice(["red", "orange", "yellow", "blue", "purple", "pink", "white"]))),
        "petal_color": near(rng, color, 20),
        "length": rng.uniform(0.5, 0.85),
        "width": rng.uniform(0.45, 1.1),
        "tip": rng.uniform(-0.25, 0.45),
        "stripe": rng.uniform(0, 1) * (rng.random() < 0.5),
        "stripe_color": near(rng, str(rng.choice(["red", "purple", "white", "yellow", "pink"]))),
        "ring": bool(rng.random() < 0.35),
        "centre": (centre := str(rng.choice(["yellow", "brown"]))),
        "centre_color": near(rng, centre),
        "centre_size": rng.uniform(0.1, 0.26),
        "leaf": rng.uniform(0.1, 0.22),
    }


def caption_flower(p: dict) -> list[str]:
    article = "an" if p["color"] == "orange" else "a"
    return [
        f"{article} {p['color']} flower",
        f"{article} {p['color']} flower with {NUMBERS[p['petals']]} petals",
        f"{article} {p['color']} flower with {NUMBERS[p['petals']]} petals and a {p['centre']} centre",
    ]


def draw_flower(p: dict, rng) -> Canvas:
    meadow = near(rng, str(rng.choice(["green", "green", "brown", "blue", "gray"])), 24)
    canvas = Canvas(tuple(int(c) for c in tone(meadow, rng.uniform(0.5, 1.2))))
    for _ in range(9):  # leaves and blades of grass behind the flower
        canvas.ellipse(
            *rng.uniform(-1, 1, 2),
            rng.uniform(0.25, 0.7),
            rng.uniform(0.03, 0.13),
            tone(meadow, rng.uniform(0.5, 1.35)),
            rng.uniform(0, 3.1),
        )
    shift = rng.normal(0, 0.12, 2)
    canvas.line([shift, (shift[0] + rng.normal(0, 0.3), -1.3)], (70, 120, 60), 0.07)
    canvas.place(0, 1, shift)
    canvas.ellipse(0.3, -0.6, 0.35, p["leaf"], (85, 145, 70), rng.uniform(0.2, 0.9))
    turn = rng.uniform(0, 2 * np.pi)
    canvas.place(turn, rng.uniform(0.7, 1.1), shift, rng.normal(0, 0.15))
    along = np.linspace(0, 1, 12)
    # A petal's half width along its length; `tip` moves the widest place outwards and rounds the end.
    profile = (
        np.sin(np.pi * along ** (1 + p["tip"])) ** 0.8
        * p["width"]
        * 0.9
        * np.pi
        * p["length"]
        * 0.5
        / p["petals"] ** 0.8
    )
    outline = np.concatenate(
        [np.stack([along * p["length"], profile], 1), np.stack([along[::-1] * p["length"], -profile[::-1]], 1)]
    )
    for ring in range(2 if p["ring"] else 1):
        for petal in range(p["petals"]):
            angle = 2 * np.pi * (petal + 0.5 * ring) / p["petals"]
            rotate = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) * (1 - 0.35 * ring)
            canvas.polygon(outline * 1.06 @ rotate, tone(p["petal_color"], 0.72))
            canvas.polygon(outline @ rotate, tone(p["petal_color"], 1 + 0.2 * ring))
            if p["stripe"]:
                canvas.polygon(outline * (0.9, 0.2 + 0.35 * p["stripe"]) @ rotate, p["stripe_color"])
    canvas.ellipse(0, 0, p["centre_size"], p["centre_size"], tone(p["centre_color"], 0.8))
    canvas.ellipse(0, 0, p["centre_size"] * 0.75, p["centre_size"] * 0.75, p["centre_color"])
    return canvas


def make_fish(rng) -> dict:
    return {
        "length": rng.uniform(0.42, 0.7),
        "shape": (shape := str(rng.choice(["slim", "round"]))),
        "height": rng.uniform(0.16, 0.26) if shape == "slim" else rng.uniform(0.33, 0.48),
        "tail": str(rng.choice(["forked", "rounded", "pointed"])),
        "tail_size": rng.uniform(0.2, 0.4),
        "pattern": str(rng.choice(["stripes", "spots", "scales", "no pattern"])),
        "marks": int(rng.integers(3, 8)),
        "slant": rng.uniform(-0.5, 0.5),
        "fin": rng.uniform(0.1, 0.42),
        "fin_place": rng.uniform(-0.3, 0.3),
        "belly_fin": rng.uniform(0, 0.3),
        "eye": rng.uniform(0.035, 0.09),
        "eye_place": rng.uniform(0.55, 0.8),
        "mouth": rng.uniform(-0.1, 0.1),
        "gill": bool(rng.random() < 0.5),
        "whiskers": bool(rng.random() < 0.25),
    }


def caption_fish(p: dict) -> list[str]:
    return [
        f"a sketch of a {p['shape']} fish",
        f"a sketch of a {p['shape']} fish with a {p['tail']} tail",
        f"a sketch of a {p['shape']} fish with a {p['tail']} tail and {p['pattern']}",
    ]


def draw_fish(p: dict, rng) -> Canvas:
    paper = np.array([(250, 248, 240), (235, 225, 200), (225, 230, 235), (245, 235, 235)][rng.integers(4)])
    canvas = Canvas(tuple(paper))
    if rng.random() < 0.3:  # ruled paper
        for y in np.arange(-1, 1, 0.25):
            canvas.line([(-1, y), (1, y)], tone(paper, 0.88), 0.012)
    pencil = tone((45, 45, 55), rng.uniform(0.6, 1.2))
    thick = rng.uniform(0.045, 0.075)
    wobble = rng.uniform(0.004, 0.016)
    canvas.place(rng.normal(0, 0.2), rng.uniform(0.85, 1.15), rng.normal(0, 0.09, 2), rng.normal(0, 0.1))

    def stroke(points, width=1.0):
        points = np.asarray(points, dtype=float)
        canvas.line(points + rng.normal(0, wobble, points.shape), pencil, thick * width)

    length, height = p["length"], p["height"]
    angle = np.linspace(0.12 - np.pi, np.pi - 0.12, 30)
    body = np.stack([length * np.cos(angle), height * np.sin(angle) * (1 + 0.25 * np.cos(angle))], axis=1)
    stroke(body)
    size, root = p["tail_size"], -length
    if p["tail"] == "forked":
        stroke([(root, 0.03), (root - size, size), (root - size * 0.45, 0), (root - size, -size), (root, -0.03)])
    elif p["tail"] == "rounded":
        stroke(
            np.concatenate(
                [
                    [(root, 0)],
                    ellipse(root - size * 0.6, 0, size * 0.6, size * 0.9, points=16)[9:] * (1, -1),
                    ellipse(root - size * 0.6, 0, size * 0.6, size * 0.9, points=16)[:9],
                    [(root, 0)],
                ]
            )
        )
    else:
        stroke([(root, 0.03), (root - size, size * 0.8), (root - size, -size * 0.8), (root, -0.03)])
    x = p["fin_place"] * length
    stroke([(x - 0.2, height * 0.95), (x - 0.05, height + p["fin"]), (x + 0.2, height * 0.95)])
    if p["belly_fin"] > 0.08:
        stroke([(x - 0.1, -height * 0.95), (x - 0.15, -height - p["belly_fin"]), (x + 0.12, -height * 0.98)])
    eye_x = p["eye_place"] * length
    stroke(ellipse(eye_x, height * 0.25, p["eye"], p["eye"], points=12), 1.2)
    stroke([(length * 0.98, p["mouth"] * height), (length * 0.8, (p["mouth"] - 0.25) * height)])
    if p["gill"]:
        stroke([(eye_x - 0.13, height * 0.5), (eye_x - 0.2, 0), (eye_x - 0.13, -height * 0.5)])
    if p["whiskers"]:
        stroke([(length, 0), (length + 0.18, -0.12)], 0.7)
        stroke([(length, 0), (length + 0.16, -0.2)], 0.7)
    for mark in np.linspace(-0.7, 0.35, p["marks"]):
        reach = height * np.sqrt(1 - mark**2) * 0.85
        if p["pattern"] == "stripes":
            stroke([(mark * length + p["slant"] * reach, reach), (mark * length - p["slant"] * reach, -reach)], 1.3)
        elif p["pattern"] == "spots":
            canvas.ellipse(mark * length, reach * p["slant"] * (1 if round(mark * 10) % 2 else -1), 0.05, 0.05, pencil)
        elif p["pattern"] == "scales":
            for y in (-0.5, 0.1, 0.6):
                stroke(
                    [
                        (mark * length, (y + 0.22) * reach),
                        (mark * length - 0.06, y * reach),
                        (mark * length, (y - 0.22) * reach),
                    ],
                    0.8,
                )
    return canvas


GLYPHS = {"letter": "ABCDEFGHJKLMNPQRSTUVWXYZ", "number": "23456789", "symbol": "♥♠♣★☂☎✈♫☀⚓✿⚑☾✚☘♞✉⚡"}
FONTS = ("DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono.ttf")


def make_badge(rng) -> dict:
    kind = str(rng.choice(list(GLYPHS)))
    return {
        "shape": str(rng.choice(["round", "square", "six-sided", "star-shaped", "shield-shaped"])),
        "color": (color := str(rng.choice(["red", "orange", "yellow", "green", "blue", "purple", "black"]))),
        "badge_color": near(rng, color),
        "kind": kind,
        "glyph": str(rng.choice(list(GLYPHS[kind]))),
        "font": FONTS[0] if kind == "symbol" else str(rng.choice(FONTS)),
        "glyph_color": near(
            rng,
            str(
                rng.choice(
                    ["white", "yellow", "pink"]
                    if color in ("black", "blue", "purple", "green", "red")
                    else ["black", "blue", "white"]
                )
            ),
        ),
        "border": rng.uniform(0, 0.16),
        "border_color": near(rng, str(rng.choice(["white", "black", "yellow", "gray", "brown"]))),
        "glyph_size": rng.uniform(0.75, 1.1),
        "bar": bool(rng.random() < 0.25),
    }


def caption_badge(p: dict) -> list[str]:
    article = "an" if p["color"] == "orange" else "a"
    return [
        f"{article} {p['color']} badge",
        f"{article} {p['color']} {p['shape']} badge",
        f"{article} {p['color']} {p['shape']} badge with a {p['kind']}",
    ]


@cache
def glyph_outline(glyph: str, font: str) -> list[np.ndarray]:
    """Outlines of one character, centred, largest first; holes are told by their turning direction."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / font
    outlines = TextPath((0, 0), glyph, size=1, prop=FontProperties(fname=str(path))).to_polygons()
    low = np.min([o.min(0) for o in outlines], axis=0)
    high = np.max([o.max(0) for o in outlines], axis=0)
    centred = [(o - (low + high) / 2) / (high - low).max() for o in outlines]
    return sorted(centred, key=lambda o: -abs(turning(o)))


def turning(outline: np.ndarray) -> float:
    """Twice the signed area: negative for a TrueType outer outline, positive for a hole."""
    x, y = outline.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1))


def badge_outline(shape: str) -> np.ndarray:
    if shape == "round":
        return ellipse(0, 0, 0.72, 0.72, points=40)
    if shape == "square":
        return np.array([(-0.64, -0.64), (0.64, -0.64), (0.64, 0.64), (-0.64, 0.64)])
    if shape == "six-sided":
        return ellipse(0, 0, 0.76, 0.76, points=6)
    if shape == "star-shaped":
        star = ellipse(0, 0, 0.88, 0.88, points=16)
        star[1::2] *= 0.72
        return star
    return np.array(
        [
            (-0.64, 0.68),
            (0, 0.78),
            (0.64, 0.68),
            (0.62, -0.05),
            (0.36, -0.55),
            (0, -0.82),
            (-0.36, -0.55),
            (-0.62, -0.05),
        ]
    )


def draw_badge(p: dict, rng) -> Canvas:
    wall = near(rng, str(rng.choice(list(COLORS))), 25)
    canvas = Canvas(tuple(int(c) for c in wall))
    style = rng.integers(3)  # the wall behind: tiles, boards or posters
    for step in np.arange(-1.2, 1.2, 0.3):
        if style == 0:
            canvas.line([(step, -1.2), (step, 1.2)], tone(wall, 0.8), 0.03)
            canvas.line([(-1.2, step), (1.2, step)], tone(wall, 0.8), 0.03)
        elif style == 1:
            canvas.polygon(
                [(-1.2, step), (1.2, step), (1.2, step + 0.27), (-1.2, step + 0.27)],
                tone(wall, rng.uniform(0.75, 1.25)),
            )
        else:
            x, y = rng.uniform(-1, 1, 2)
            canvas.polygon(
                [(x, y), (x + 0.5, y), (x + 0.5, y + 0.4), (x, y + 0.4)], near(rng, str(rng.choice(list(COLORS))), 30)
            )
    turn, size, shear = rng.normal(0, 0.3), rng.uniform(0.65, 1.05), rng.normal(0, 0.22)
    shift = rng.normal(0, 0.13, 2)
    outline = badge_outline(p["shape"])
    canvas.place(turn, size, shift + (0.05, -0.06), shear)
    canvas.polygon(outline, tone(wall, 0.45))  # its shadow
    canvas.place(turn, size, shift, shear)
    canvas.polygon(outline, p["border_color"])
    canvas.polygon(outline * (1 - p["border"]), p["badge_color"])
    if p["bar"]:
        canvas.polygon([(-0.5, -0.45), (0.5, -0.45), (0.5, -0.37), (-0.5, -0.37)], p["border_color"])
    for part in glyph_outline(p["glyph"], p["font"]):
        canvas.polygon(
            part * 0.85 * p["glyph_size"] + (0, 0.03), p["glyph_color"] if turning(part) < 0 else p["badge_color"]
        )
    return canvas


def make_vase(rng) -> dict:
    return {
        "profile": rng.uniform(0.14, 0.52, 5) * (0.75, 1.0, 1.1, 0.8, 0.75),
        "height": rng.uniform(0.55, 0.8),
        "color": (color := str(rng.choice(["red", "green", "blue", "white", "brown", "black"]))),
        "vase_color": near(rng, color, 18),
        "pattern": str(rng.choice(["plain", "striped", "dotted", "zigzag"])),
        "pattern_color": near(
            rng, str(rng.choice([c for c in ("yellow", "white", "orange", "blue", "pink", "black") if c != color]))
        ),
        "bands": int(rng.integers(1, 4)),
        "place": rng.uniform(-0.5, 0.2),
        "step": rng.uniform(0.18, 0.32),
        "thick": rng.uniform(0.04, 0.11),
        "marks": int(rng.integers(4, 9)),
        "handles": bool(rng.random() < 0.45),
        "handle_size": rng.uniform(0.12, 0.24),
    }


def caption_vase(p: dict) -> list[str]:
    return [
        f"a {p['color']} vase",
        f"a {p['pattern']} {p['color']} vase",
        f"a {p['pattern']} {p['color']} vase with {'two' if p['handles'] else 'no'} handles",
    ]


def draw_vase(p: dict, rng) -> Canvas:
    wall = near(rng, str(rng.choice(["white", "gray", "yellow", "blue", "pink", "brown"])), 25)
    canvas = Canvas(tuple(int(c) for c in tone(wall, 1.2)))
    canvas.polygon(
        [(-2, -2), (2, -2), (2, rng.uniform(-0.75, -0.45)), (-2, rng.uniform(-0.75, -0.45))],
        tone(wall, rng.uniform(0.6, 0.95)),
    )
    canvas.place(
        rng.normal(0, 0.07), rng.uniform(0.8, 1.12), (rng.normal(0, 0.14), rng.normal(0, 0.08)), rng.normal(0, 0.06)
    )
    levels = np.linspace(-p["height"], p["height"], 25)

    def half_width(y):
        knots = np.linspace(-p["height"], p["height"], 5)
        return smooth(y, knots, p["profile"])

    canvas.ellipse(0.15, -p["height"], 0.55, 0.1, tone(wall, 0.5))  # its shadow
    if p["handles"]:
        for side in (-1, 1):
            ring = ellipse(side * (half_width(0.15) + 0.04), 0.15, p["handle_size"], p["handle_size"] * 1.3)
            canvas.line(np.concatenate([ring, ring[:2]]), tone(p["vase_color"], 0.75), 0.07)
    width = half_width(levels)
    outline = np.concatenate([np.stack([width, levels], 1), np.stack([-width[::-1], levels[::-1]], 1)])
    canvas.polygon(outline, p["vase_color"])
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
    side = rng.choice([-1, 1])  # the side that lies in the shade, and a highlight on the other
    canvas.polygon(
        np.concatenate([np.stack([side * width, levels], 1), np.stack([side * width[::-1] * 0.72, levels[::-1]], 1)]),
        tone(p["vase_color"], 0.68),
    )
    canvas.line(np.stack([-side * width[5:-4] * 0.62, levels[5:-4]], 1), tone(p["vase_color"], 1.4), 0.05)
    canvas.ellipse(0, p["height"], width[-1], 0.06, tone(p["vase_color"], 0.5))
    return canvas


def smooth(y, knots, values):
    """Cubic-like interpolation by averaging three shifted linear ones: no bumps, no overshoot."""
    gap = (knots[1] - knots[0]) * 0.35
    return np.mean([np.interp(np.asarray(y) + d, knots, values) for d in (-gap, 0, gap)], axis=0)


HAIR = {
    "black": (45, 38, 38),
    "brown": (105, 68, 42),
    "blond": (222, 188, 105),
    "red": (175, 80, 40),
    "gray": (165, 162, 160),
}
SKIN = ((250, 220, 196), (238, 195, 160), (214, 160, 118), (165, 112, 76), (112, 74, 52))


def make_face(rng) -> dict:
    hair = str(rng.choice(list(HAIR)))
    return {
        "hair": hair,
        "hair_color": tuple(np.clip(np.array(HAIR[hair]) + rng.normal(0, 10, 3), 0, 255)),
        "style": str(rng.choice(["short", "long", "curly"])),
        "hair_height": rng.uniform(0.1, 0.3),
        "fringe": rng.uniform(0.2, 0.45),
        "skin": tuple(np.clip(np.array(SKIN[rng.integers(len(SKIN))]) + rng.normal(0, 7, 3), 0, 255)),
        "width": rng.uniform(0.4, 0.56),
        "height": rng.uniform(0.54, 0.7),
        "jaw": rng.uniform(0.65, 1.0),
        "eyes": rng.uniform(0.16, 0.25),
        "eye_size": rng.uniform(0.055, 0.1),
        "eye_height": rng.uniform(0.02, 0.16),
        "eye_color": near(rng, str(rng.choice(["blue", "brown", "green", "black"]))),
        "brow": rng.uniform(0.02, 0.06),
        "brow_slant": rng.uniform(-0.05, 0.05),
        "nose": rng.uniform(0.1, 0.22),
        "nose_width": rng.uniform(0.04, 0.1),
        "mouth": rng.uniform(0.12, 0.25),
        "lips": rng.uniform(0.025, 0.06),
        "glasses": bool(rng.random() < 0.35),
        "glasses_color": near(rng, str(rng.choice(["black", "red", "blue", "brown"]))),
        "beard": bool(rng.random() < 0.3),
        "ears": rng.uniform(0.06, 0.12),
    }


def caption_face(p: dict) -> list[str]:
    extra = {(0, 0): "", (1, 0): " and glasses", (0, 1): " and a beard", (1, 1): ", glasses and a beard"}[
        p["glasses"], p["beard"]
    ]
    return [
        f"a face with {p['hair']} hair",
        f"a face with {p['style']} {p['hair']} hair",
        f"a face with {p['style']} {p['hair']} hair{extra}",
    ]


def draw_face(p: dict, rng) -> Canvas:
    wall = near(rng, str(rng.choice(["gray", "blue", "green", "white", "brown", "orange", "purple"])), 25)
    canvas = Canvas(tuple(int(c) for c in wall))
    canvas.polygon(
        [(-2, -2), (2, -2), (2, rng.uniform(-1, 1)), (-2, rng.uniform(-1, 1))], tone(wall, rng.uniform(0.7, 1.3))
    )
    shirt = near(rng, str(rng.choice(list(COLORS))), 25)
    canvas.place(
        rng.normal(0, 0.13), rng.uniform(0.85, 1.2), (rng.normal(0, 0.1), rng.normal(-0.02, 0.08)), rng.normal(0, 0.05)
    )
    width, height, skin, hair = p["width"], p["height"], p["skin"], p["hair_color"]
    look, smile = rng.normal(0, 0.025, 2), rng.uniform(-0.06, 0.12)  # gaze and expression belong to the view
    if p["style"] == "long":
        canvas.polygon(
            [
                (-width * 1.25, -height * 1.1),
                (width * 1.25, -height * 1.1),
                (width * 1.15, height * 0.5),
                (-width * 1.15, height * 0.5),
            ],
            tone(hair, 0.85),
        )
    canvas.ellipse(0, -1.25, 0.85, 0.5, shirt)
    canvas.polygon([(-0.17, -1), (0.17, -1), (0.15, -0.4), (-0.15, -0.4)], tone(skin, 0.8))
    crown = height + p["hair_height"]
    if p["style"] == "curly":
        for angle in np.linspace(-0.3, np.pi + 0.3, 11):
            canvas.ellipse(width * 1.02 * np.cos(angle), 0.15 + (crown - 0.22) * np.sin(angle), 0.19, 0.19, hair)
    else:
        canvas.ellipse(0, 0.12, width * 1.12, crown - 0.1, hair)
    for side in (-1, 1):
        canvas.ellipse(side * width * 0.98, 0.02, p["ears"], 0.12, tone(skin, 0.88))
    angle = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    narrow = np.where(np.sin(angle) < 0, 1 - (1 - p["jaw"]) * np.sin(angle) ** 2, 1)
    face = np.stack([width * narrow * np.cos(angle), height * np.sin(angle)], axis=1)
    canvas.polygon(face, skin)
    if p["beard"]:
        canvas.polygon(np.concatenate([face[20:35] * 1.03, [(width * 0.5, -0.22), (-width * 0.5, -0.22)]]), hair)
    top = height * (1 - p["fringe"])
    canvas.polygon(
        np.concatenate(
            [
                face[(face[:, 1] > top)] * 1.06,
                [(-width * 0.6, top), (0, top + 0.12), (width * 0.6, top)][:: 1 if p["jaw"] > 0.8 else -1],
            ]
        ),
        hair,
    )
    for side in (-1, 1):
        x, y = side * p["eyes"], p["eye_height"]
        canvas.ellipse(x, y, p["eye_size"], p["eye_size"] * 0.7, (250, 250, 250))
        canvas.ellipse(x + look[0], y + look[1] * 0.5, p["eye_size"] * 0.55, p["eye_size"] * 0.6, p["eye_color"])
        canvas.ellipse(x + look[0], y + look[1] * 0.5, p["eye_size"] * 0.25, p["eye_size"] * 0.3, (20, 20, 20))
        brow = y + p["eye_size"] + 0.06
        canvas.line(
            [(x - 0.1, brow + side * p["brow_slant"]), (x + 0.1, brow - side * p["brow_slant"])],
            tone(hair, 0.8),
            p["brow"],
        )
        if p["glasses"]:
            ring = ellipse(x, y, 0.15, 0.13)
            canvas.line(np.concatenate([ring, ring[:2]]), p["glasses_color"], 0.035)
    if p["glasses"]:
        canvas.line(
            [(-p["eyes"] + 0.15, p["eye_height"]), (p["eyes"] - 0.15, p["eye_height"])], p["glasses_color"], 0.035
        )
    tip = p["eye_height"] - p["nose"] - 0.06
    canvas.polygon([(0, p["eye_height"]), (p["nose_width"], tip), (-p["nose_width"], tip)], tone(skin, 0.86))
    x = np.linspace(-1, 1, 9)
    mouth = np.stack([x * p["mouth"], tip - 0.16 + smile * (x**2 - 0.5)], axis=1)
    canvas.line(mouth, tone((190, 80, 80), 0.9), p["lips"])
    return canvas


# domain: (what a class is, what its captions say, how one view is drawn)
PAINTERS: dict[str, tuple[Callable, Callable, Callable]] = {
    "landmarks": (make_landmark, caption_landmark, draw_landmark),
    "nature": (make_flower, caption_flower, draw_flower),
    "sketches": (make_fish, caption_fish, draw_fish),
    "objects": (make_badge, caption_badge, draw_badge),
    "products": (make_vase, caption_vase, draw_vase),
    "faces": (make_face, caption_face, draw_face),
}


# --- images, splits, cache -------------------------------------------------------------------------------------------


def class_parameters(split: str, domain: str, number: int, seed: int = 0) -> dict:
    """What distinguishes one class from all others. The same number in another split is another class."""
    stream = SPLITS[split][0]
    return PAINTERS[domain][0](np.random.default_rng([seed, stream, DOMAINS.index(domain), number]))


def class_captions(split: str, domain: str, number: int, seed: int = 0) -> list[str]:
    """Three captions, from coarse to fine; even the finest one may fit several classes."""
    return PAINTERS[domain][1](class_parameters(split, domain, number, seed))


def draw_image(split: str, domain: str, number: int, view: int, seed: int = 0) -> np.ndarray:
    """One view of one class: uint8 (64, 64, 3)."""
    parameters = class_parameters(split, domain, number, seed)
    shifted = split == "shifted"
    rng = np.random.default_rng([seed, list(SPLITS).index(split), DOMAINS.index(domain), number, view])
    canvas = PAINTERS[domain][2](parameters, rng)
    if rng.random() < (0.5 if shifted else 0.3):
        occlude(canvas, rng)
    image = np.asarray(canvas.image.reduce(canvas.pixels // SIZE), dtype=np.float32)
    return photograph(image, rng, shifted)


def occlude(canvas: Canvas, rng) -> None:
    """Something in front of the object: a leaf-like shape that enters from a random side."""
    canvas.place()
    angle = rng.uniform(0, 2 * np.pi)
    x, y = 0.95 * np.cos(angle), 0.95 * np.sin(angle)
    canvas.ellipse(x, y, rng.uniform(0.3, 0.6), rng.uniform(0.12, 0.28), rng.uniform(30, 220, 3), rng.uniform(0, 3.1))


def photograph(image: np.ndarray, rng, shifted: bool) -> np.ndarray:
    """Light, color cast and noise; a shifted image is darker or brighter, often without color, and noisier."""
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    strength = rng.uniform(0, 0.4 if shifted else 0.2)
    light = 1 + strength * (np.cos(angle) * x + np.sin(angle) * y)
    gain = rng.choice([0.6, 0.75, 1.35]) if shifted else rng.uniform(0.78, 1.18)
    cast = rng.normal(1, 0.1 if shifted else 0.05, 3)
    image = image * light[:, :, None] * (gain * cast).astype(np.float32)
    if shifted and rng.random() < 0.35:
        image = np.repeat(image @ np.array([[0.299], [0.587], [0.114]], dtype=np.float32), 3, axis=2)
    noise = rng.standard_normal(image.shape, dtype=np.float32) * (rng.uniform(8, 18) if shifted else rng.uniform(1, 6))
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def load_split(split: str, cache: str | Path, seed: int = 0, report: Callable[[int, int], None] | None = None) -> dict:
    """All images of a split, drawn on first use and then read from `cache`.

    Returns images (n, 64, 64, 3) uint8 (memory-mapped), labels (n,) int64, groups (n,) domain names, captions
    (n lists of 3), names (label -> readable class name). `report(done, total)` is called while drawing.
    """
    if split not in SPLITS:
        raise ValueError(f"the mini world has no split {split!r}; choose one of {', '.join(SPLITS)}")
    _, classes, views = SPLITS[split]
    keys = [(domain, number) for domain in DOMAINS for number in range(classes)]
    path, shape = Path(cache) / "mini_world" / f"{split}-seed{seed}-v{VERSION}.npy", (len(keys) * views, SIZE, SIZE, 3)
    if read_drawn(path, shape) is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        images = np.empty(shape, dtype=np.uint8)
        for i, (domain, number) in enumerate(keys):
            for view in range(views):
                images[i * views + view] = draw_image(split, domain, number, view, seed)
            if report:
                report((i + 1) * views, len(images))
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        with open(partial, "wb") as file:
            np.save(file, images)
        os.replace(partial, path)  # a reader sees the whole file or none
    captions = [class_captions(split, domain, number, seed) for domain, number in keys]
    return {
        "images": read_drawn(path, shape),
        "labels": np.repeat(np.arange(len(keys)), views),
        "groups": np.repeat([domain for domain, _ in keys], views),
        "captions": [captions[i] for i in range(len(keys)) for _ in range(views)],
        "names": [f"{domain} {number}" for domain, number in keys],
    }


def read_drawn(path: Path, shape: tuple) -> np.ndarray | None:
    """The images in a file, memory-mapped, or None when it is not there or damaged: then they are drawn again."""
    if not path.exists():
        return None
    try:
        images = np.load(path, mmap_mode="r")
        if (images.shape, images.dtype) == (shape, np.uint8):
            return images
    except (ValueError, OSError, EOFError):
        pass
    warnings.warn(f"{path} is damaged and is drawn again", stacklevel=2)
    return None


def fingerprint(split: str, per_domain: int = 2, seed: int = 0) -> str:
    """A hash over a few images and captions of every domain: tells whether two machines draw the same world."""
    digest = hashlib.sha256()
    for domain in DOMAINS:
        for number in range(per_domain):
            digest.update(draw_image(split, domain, number, 0, seed).tobytes())
            digest.update(json.dumps(class_captions(split, domain, number, seed)).encode())
    return digest.hexdigest()
