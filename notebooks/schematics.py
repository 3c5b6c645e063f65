"""The schematics of the lessons, one picture each: `python notebooks/schematics.py` draws them into schematics/.

What is trained is orange, what stays as it is is blue, what is computed without learning is white. The notebooks show the
pictures from the output of a cell, which Colab, Kaggle, GitHub and the site all keep.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
from gpnns_utils import mini_world  # noqa: E402

TRAINED, FIXED, PLAIN, INK = "#F6C66B", "#BCD9EC", "#FFFFFF", "#333333"
RIGHT, WRONG = "#009E73", "#D55E00"


def canvas(width: float, height: float) -> plt.Axes:
    """Axes without axes, one unit to the inch, y upwards."""
    figure = plt.figure(figsize=(width, height), layout="none")
    axis = figure.add_axes([0, 0, 1, 1])
    axis.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axis.axis("off")
    return axis


def box(axis, x: float, y: float, text: str, color: str = PLAIN, width: float = 1.5, height: float = 0.62) -> None:
    """A box with its middle at (x, y)."""
    shape = matplotlib.patches.FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.08", facecolor=color,
        edgecolor=INK, linewidth=1.2,
    )  # fmt: skip
    axis.add_patch(shape)
    axis.text(x, y, text, ha="center", va="center", fontsize=10.5, color=INK, linespacing=1.25)


def arrow(
    axis, start: tuple, end: tuple, color: str = INK, style: str = "-|>", bend: float = 0.0, dashed=False
) -> None:
    axis.annotate(
        "", end, start, zorder=1,
        arrowprops={
            "arrowstyle": style, "color": color, "linewidth": 1.5, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 13,
            "connectionstyle": f"arc3,rad={bend}", "linestyle": "--" if dashed else "-",
        },
    )  # fmt: skip


def note(axis, x: float, y: float, text: str, size: float = 9.5, color: str = INK, align: str = "center") -> None:
    axis.text(x, y, text, ha=align, va="center", fontsize=size, color=color, linespacing=1.25)


def photo(axis, x: float, y: float, split: str, domain: str, number: int, view: int, size: float = 0.62) -> None:
    """An image of the mini world with its middle at (x, y)."""
    pixels = mini_world.draw_image(split, domain, number, view=view)
    axis.imshow(np.asarray(pixels), extent=(x - size / 2, x + size / 2, y - size / 2, y + size / 2), zorder=2)


def legend(axis, x: float, y: float) -> None:
    for i, (color, text) in enumerate(((TRAINED, "is trained"), (FIXED, "stays as it is"))):
        axis.add_patch(plt.Rectangle((x + 1.35 * i, y - 0.08), 0.2, 0.16, facecolor=color, edgecolor=INK, linewidth=1))
        note(axis, x + 0.28 + 1.35 * i, y, text, 9, align="left")


def measuring() -> plt.Axes:
    """02: what counts as right, what is left out, and where the ranks come from."""
    axis = canvas(9, 2.6)
    photo(axis, 0.65, 1.45, "test", "products", 4, 0, 0.85)
    note(axis, 0.65, 0.82, "query", 10)
    arrow(axis, (1.2, 1.45), (1.75, 1.45))
    ranking = [(4, 1), (4, 2), (9, 0), (4, 3), (2, 1), (4, 4)]
    for i, (number, view) in enumerate([(4, 0), *ranking]):
        x = 2.2 + 0.88 * i
        color = "#999999" if i == 0 else RIGHT if number == 4 else WRONG
        photo(axis, x, 1.45, "test", "products", number, view, 0.7)
        axis.add_patch(plt.Rectangle((x - 0.37, 1.08), 0.74, 0.74, fill=False, edgecolor=color, linewidth=3))
        note(axis, x, 0.85, "left out" if i == 0 else f"rank {i}", 9.5, color)
    axis.plot([1.8, 2.6], [1.05, 1.85], color="#999999", linewidth=2.5, zorder=5)
    note(axis, 2.2, 2.2, "the query\nitself", 9.5, "#666666")
    note(axis, 5.3, 2.2, "green: the same thing as the query; red: another one", 10)
    note(axis, 5.3, 0.4, "right answers at ranks 1, 2, 4 and 6; every score is computed from these four numbers", 10)
    arrow(axis, (7.95, 1.45), (8.3, 1.45))
    note(axis, 8.65, 1.45, "all other\nimages", 9.5)
    return axis


def finetuning() -> plt.Axes:
    """03: labels move the image tower; the margin sits on the angle to the own proxy."""
    axis = canvas(9, 3.3)
    for i, (domain, number) in enumerate((("landmarks", 3), ("products", 5), ("faces", 2))):
        photo(axis, 0.55, 2.6 - 0.78 * i, "train", domain, number, 0)
    arrow(axis, (0.95, 1.82), (1.4, 1.82))
    box(axis, 2.2, 1.82, "image tower", TRAINED)
    arrow(axis, (2.95, 1.82), (3.5, 1.82))
    center, radius = np.array([4.85, 1.75]), 1.15
    axis.add_patch(plt.Circle(center, radius, fill=False, edgecolor="#999999", linewidth=1.2))

    def on_circle(degrees: float, scale: float = 1.0) -> np.ndarray:
        return center + scale * radius * np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])

    own, image, shifted = 100, 62, 36
    for degrees, color in ((own, RIGHT), (205, "#999999"), (305, "#999999")):
        axis.plot(*on_circle(degrees), "s", color=color, markersize=10, markeredgecolor=INK)
        arrow(axis, tuple(center), tuple(on_circle(degrees, 0.93)), color, "-")
    axis.plot(*on_circle(image), "o", color=TRAINED, markersize=10, markeredgecolor=INK, zorder=4)
    arrow(axis, tuple(center), tuple(on_circle(image, 0.95)), INK, "-")
    arrow(axis, tuple(center), tuple(on_circle(shifted, 1.0)), WRONG, "-", dashed=True)
    for start, end, color, size in ((image, own, INK, 0.95), (shifted, image, WRONG, 1.25)):
        axis.add_patch(matplotlib.patches.Arc(center, size, size, theta1=start, theta2=end, color=color, linewidth=1.8))
    note(axis, *(on_circle(own, 1.17) + [-0.25, 0]), "own proxy", 9.5, RIGHT)
    note(axis, *(center + [-0.1, -0.62]), "other proxies", 9, "#666666")
    note(axis, *(on_circle(image, 1.05) + [0.4, 0.05]), "image", 9.5)
    note(axis, *(on_circle(81, 0.6)), "angle", 9)
    note(axis, *(on_circle(shifted, 1.1) + [0.85, 0.05]), "as the loss sees it:\nplus the margin", 9, WRONG)
    note(axis, center[0], 0.4, "unit vectors only; proxies are trained too", 9)
    arrow(axis, (6.15, 1.82), (7.3, 1.82))
    box(axis, 8.05, 1.82, "softmax over\nscale × cosines", PLAIN, 1.45, 0.72)
    note(axis, 8.05, 1.22, "loss: −log of the\nown class's share", 9)
    box(axis, 2.2, 0.72, "text tower", FIXED)
    note(axis, 3.05, 0.72, "takes no part", 9, align="left")
    legend(axis, 0.3, 0.18)
    return axis


def keeping_text() -> plt.Axes:
    """04: three recipes, what each trains and where its loss sits."""
    axis = canvas(9, 3.5)
    recipes = [
        ("image-only", "image tower", TRAINED, "text tower", FIXED, "labels", "margin on\nthe classes"),
        ("2SFT, second stage", "image tower", FIXED, "end of the\ntext tower", TRAINED, "pairs", "contrast of images\nand captions"),
        ("MCIP", "image tower", TRAINED, "text tower", FIXED, "both", "margin on classes\nand found captions"),
    ]  # fmt: skip
    for i, (title, image, image_color, text, text_color, learns, loss) in enumerate(recipes):
        left = 0.15 + 3.0 * i
        note(axis, left + 1.4, 3.25, title, 12)
        photo(axis, left + 0.35, 2.45, "train", "landmarks", 3, 0)
        note(axis, left + 0.36, 1.35, "“a castle\nwith three\ntowers”", 8.5)
        box(axis, left + 1.35, 2.45, image, image_color, 1.1)
        box(axis, left + 1.35, 1.35, text, text_color, 1.1)
        for y in (2.45, 1.35):
            arrow(axis, (left + 0.68, y), (left + 0.79, y))
        used = {"labels": (2.45,), "pairs": (2.45, 1.35), "both": (2.45, 1.35)}[learns]
        for y in used:
            arrow(axis, (left + 1.9, y), (left + 2.22, 1.9 + 0.2 * np.sign(y - 1.9)))
        axis.plot(left + 2.32, 1.9, "*", color=WRONG, markersize=15)
        note(axis, left + 1.4, 0.72, "loss: " + loss, 9, WRONG)
    for x in (3.0, 6.0):
        axis.plot([x, x], [0.45, 3.35], color="#CCCCCC", linewidth=1)
    legend(axis, 3.15, 0.16)
    return axis


def soup() -> plt.Axes:
    """05: one start, four ends, the average between them, on a map of the loss."""
    axis = canvas(7, 3.2)
    x, y = np.meshgrid(np.linspace(0, 7, 200), np.linspace(0, 3.2, 100))
    middle = np.array([4.7, 1.65])
    valley = ((x - middle[0]) / 1.9) ** 2 + ((y - middle[1]) / 1.0) ** 2
    axis.contourf(x, y, np.minimum(valley, 6), 12, cmap="Blues_r", alpha=0.35)
    start = np.array([1.1, 1.6])
    ends = np.array([[5.9, 2.45], [3.9, 2.35], [5.6, 0.85], [3.8, 0.95]])
    for end, bend in zip(ends, (-0.25, -0.15, 0.25, 0.15), strict=True):
        arrow(axis, tuple(start), tuple(end), INK, bend=bend)
        arrow(axis, tuple(end), tuple(ends.mean(axis=0)), WRONG, "-", dashed=True)
    axis.plot(*ends.T, "o", color=TRAINED, markersize=12, markeredgecolor=INK, linestyle="none", zorder=4)
    axis.plot(*start, "o", color=FIXED, markersize=13, markeredgecolor=INK, zorder=4)
    axis.plot(*ends.mean(axis=0), "*", color=WRONG, markersize=22, markeredgecolor="white", zorder=5)
    note(axis, start[0], 1.2, "the start that\nall of them share", 10)
    note(axis, 5.75, 2.85, "four fine-tunings", 10)
    note(axis, 5.0, 1.64, "their average", 11, "#A33F00", align="left")
    note(axis, 6.2, 0.25, "darker: lower loss", 9)
    return axis


def hubs() -> plt.Axes:
    """06: a bias per image, from its nearest references."""
    axis = canvas(9, 3.0)
    photo(axis, 0.6, 1.6, "captions", "landmarks", 5, 0, 0.8)
    note(axis, 0.6, 0.95, "an image of\nthe gallery", 9.5)
    center, rng = np.array([3.0, 1.55]), np.random.default_rng(6)
    points = center + rng.uniform(-1, 1, (30, 2)) * [1.25, 0.95]
    order = np.argsort(np.linalg.norm(points - center, axis=1))
    for row in order[:5]:
        arrow(axis, tuple(center), tuple(points[row]), WRONG, "-")
    axis.plot(*points[order[5:]].T, "^", color="#AAAAAA", markersize=7)
    axis.plot(*points[order[:5]].T, "^", color=WRONG, markersize=8)
    axis.plot(*center, "o", color=PLAIN, markersize=13, markeredgecolor=INK, zorder=4)
    arrow(axis, (1.05, 1.6), (1.75, 1.6))
    note(axis, 3.0, 2.75, "reference queries, such as old captions", 9.5, "#666666")
    note(axis, 3.0, 0.35, "the k nearest (here 5)", 9.5, WRONG)
    arrow(axis, (4.45, 1.6), (4.95, 1.6))
    box(axis, 5.85, 1.6, "alpha × the mean\nof their scores", PLAIN, 1.75, 0.75)
    note(axis, 5.85, 1.0, "= the image's bias,\none number, computed once", 9)
    arrow(axis, (6.75, 1.6), (7.2, 1.6))
    box(axis, 8.05, 1.6, "score of a query\nminus bias", PLAIN, 1.6, 0.75)
    note(axis, 8.05, 1.0, "hubs lose most,\nothers hardly", 9)
    return axis


SCHEMATICS = {
    "02_benchmark_encoders": measuring,
    "03_finetune_arcmargin": finetuning,
    "04_realign_text_mcip": keeping_text,
    "05_average_soups": soup,
    "06_normalize_neighbors_nnn": hubs,
}


def save(axis: plt.Axes, path: Path) -> None:
    """A PNG of 96 colors, which keeps a notebook small."""
    path.parent.mkdir(exist_ok=True)
    axis.figure.savefig(path, dpi=110, facecolor="white")
    plt.close(axis.figure)
    Image.open(path).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    for name, draw in SCHEMATICS.items():
        save(draw(), FOLDER / "schematics" / f"{name}.png")
