"""The schematics of the lessons, one picture each: `python -m gpnns.tools.draw_schematics` draws them into
notebooks/schematics/.

What is trained is orange, what stays as it is is blue, what is computed without learning is white. The notebooks show the
pictures from the output of a cell, which Colab, Kaggle, GitHub and the site all keep.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import gpnns_utils as gu
from gpnns.world import mini_world

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
    axis.text(x, y, text, ha="center", va="center", fontsize=min(10.5, 9.5 * width), color=INK, linespacing=1.25)


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


def searching() -> plt.Axes:
    """01: images and texts become points on one sphere, and the nearest points are the answer."""
    axis = canvas(9, 3.4)
    center, radius = np.array([4.5, 1.6]), 1.3
    axis.add_patch(plt.Circle(center, radius, facecolor="#F7F7F7", edgecolor="#999999", linewidth=1.2))
    for height in (-0.55, 0.0, 0.55):
        half = (radius**2 - (height * radius) ** 2) ** 0.5
        axis.add_patch(
            matplotlib.patches.Arc(center + [0, height * radius], 2 * half, 0.42 * half, theta1=180, theta2=360, color="#DDDDDD")
        )  # fmt: skip
    rng = np.random.default_rng(3)
    angles, lengths = rng.uniform(0, 2 * np.pi, 40), radius * rng.uniform(0.15, 0.93, 40) ** 0.5
    points = center + np.stack([lengths * np.cos(angles), lengths * np.sin(angles)], axis=1)
    query = center + [0.15, 0.35]
    order = np.argsort(np.linalg.norm(points - query, axis=1))
    axis.plot(*points[order[4:]].T, "o", color="#AAAAAA", markersize=6)
    axis.plot(*points[order[:4]].T, "o", color=RIGHT, markersize=8)
    axis.plot(*query, "*", color=WRONG, markersize=19, markeredgecolor="white", zorder=5)
    for y, domain, number in ((2.35, "landmarks", 7), (1.6, "nature", 3), (0.85, "objects", 4)):
        photo(axis, 0.5, y, "test", domain, number, 0)
    arrow(axis, (0.9, 1.6), (1.3, 1.6))
    box(axis, 2.05, 1.6, "image tower", FIXED)
    arrow(axis, (2.8, 1.6), (3.15, 1.6))
    note(axis, 0.5, 0.35, "a gallery", 9.5)
    note(axis, 8.3, 1.6, "“a red flower\nwith five petals”", 9.5)
    arrow(axis, (7.6, 1.6), (7.35, 1.6))
    box(axis, 6.6, 1.6, "text tower", FIXED)
    arrow(axis, (5.85, 1.6), tuple(query + [0.14, 0.0]), WRONG, bend=0.15)
    note(axis, 4.5, 3.2, "gray: images; star: the query; green: the nearest images, which are the answer", 9.5)
    return axis


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
        note(
            axis,
            x,
            0.85,
            "left out" if i == 0 else f"{'✓' if number == 4 else '✗'} rank {i}",
            9.5,
            INK if i == 0 else color,
        )
    axis.plot([1.8, 2.6], [1.05, 1.85], color="#999999", linewidth=2.5, zorder=5)
    note(axis, 2.2, 2.2, "the query\nitself", 9.5)
    note(axis, 5.3, 2.2, "✓ the same vase as the query      ✗ a different one", 10.5)
    note(axis, 5.3, 0.4, "right answers at ranks 1, 2, 4 and 6: the scores are computed from these four numbers", 10)
    arrow(axis, (7.95, 1.45), (8.3, 1.45))
    note(axis, 8.6, 1.45, "more, no\nvase like\nthis one", 9)
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
        axis.plot(*on_circle(degrees), "s", color=TRAINED, markersize=11, markeredgecolor=color, markeredgewidth=2.2)
        arrow(axis, tuple(center), tuple(on_circle(degrees, 0.93)), color, "-")
    axis.plot(
        *on_circle(shifted), "o", color=PLAIN, markersize=10, markeredgecolor=WRONG, markeredgewidth=1.8, zorder=4
    )
    axis.plot(*on_circle(image), "o", color=INK, markersize=10, markeredgecolor=INK, zorder=4)
    arrow(axis, tuple(center), tuple(on_circle(image, 0.95)), INK, "-")
    arrow(axis, tuple(center), tuple(on_circle(shifted, 0.95)), WRONG, "-", dashed=True)
    for start, end, color, size in ((image, own, INK, 0.95), (shifted, image, WRONG, 1.25)):
        axis.add_patch(matplotlib.patches.Arc(center, size, size, theta1=start, theta2=end, color=color, linewidth=1.8))
    note(axis, *(on_circle(own, 1.17) + [-0.25, 0]), "own proxy", 9.5, RIGHT)
    note(axis, *(center + [-0.1, -0.62]), "other proxies", 9, "#666666")
    note(axis, *(on_circle(image, 1.05) + [0.4, 0.05]), "image", 9.5)
    note(axis, *(on_circle(81, 0.6)), "angle", 9)
    note(axis, *(on_circle(shifted, 1.1) + [0.85, 0.05]), "where the loss\nsees the image", 9, WRONG)
    note(axis, *on_circle(47, 0.78), "margin", 9, WRONG)
    note(axis, center[0], 0.4, "the circle: unit vectors", 9)
    arrow(axis, (6.15, 1.82), (7.3, 1.82))
    box(axis, 8.05, 1.82, "softmax over\nscale × cosines", PLAIN, 1.45, 0.72)
    note(axis, 8.05, 1.22, "loss: −log of the share\nof the image's class", 9)
    box(axis, 2.2, 0.85, "text tower", FIXED)
    note(axis, 2.2, 0.42, "takes no part", 9)
    legend(axis, 6.2, 0.25)
    return axis


def keeping_text() -> plt.Axes:
    """04: three recipes, what each trains and where its loss sits."""
    axis = canvas(9, 3.7)
    given, found = "its caption,\n“a castle\n…”", "captions\nfound in\na bank"
    recipes = [  # title, image tower, its state, text tower, its state, what enters it, the loss
        ("image-only", "image tower", TRAINED, "text tower", FIXED, "", "classes"),
        ("2SFT, second stage", "image tower,\nfine-tuned", FIXED, "text tower,\nits end", TRAINED, given, "image and\nits caption"),
        ("MCIP", "image tower", TRAINED, "text tower", FIXED, found, "classes and\ncaptions"),
    ]  # fmt: skip
    for i, (title, image, image_color, text, text_color, enters, loss) in enumerate(recipes):
        left = 0.1 + 3.0 * i
        note(axis, left + 1.4, 3.45, title, 12)
        photo(axis, left + 0.42, 2.6, "train", "landmarks", 3, 0)
        note(axis, left + 0.42, 1.2, enters, 8)
        box(axis, left + 1.45, 2.6, image, image_color, 1.05)
        box(axis, left + 1.45, 1.2, text, text_color, 1.05)
        box(axis, left + 2.38, 1.9, loss, PLAIN, 0.92, 0.55)
        arrow(axis, (left + 0.75, 2.6), (left + 0.9, 2.6))
        arrow(axis, (left + 1.98, 2.6), (left + 2.38, 2.2))
        if enters:
            arrow(axis, (left + 0.82, 1.2), (left + 0.92, 1.2))
            arrow(axis, (left + 1.98, 1.2), (left + 2.38, 1.6))
        else:
            note(axis, left + 1.45, 0.7, "takes no part", 9)
    for x in (3.0, 6.0):
        axis.plot([x, x], [0.5, 3.6], color="#CCCCCC", linewidth=1)
    legend(axis, 2.6, 0.2)
    axis.add_patch(plt.Rectangle((5.35, 0.12), 0.2, 0.16, facecolor=PLAIN, edgecolor=INK, linewidth=1))
    note(axis, 5.63, 0.2, "what the loss asks for", 9, align="left")
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
    note(axis, 0.62, 1.6, "shared\nstart", 10)
    note(axis, 5.75, 2.85, "four fine-tunings", 10)
    note(axis, 5.0, 1.64, "their average", 11, "#A33F00", align="left")
    note(axis, 6.2, 0.25, "darker: lower loss", 9)
    note(axis, 3.2, 0.15, "one weight →", 9)
    axis.text(0.15, 2.4, "another weight →", fontsize=9, color=INK, rotation=90, va="center", ha="center")
    return axis


def hubs() -> plt.Axes:
    """06: a bias per image, from its nearest references; computed once, subtracted from every score."""
    axis = canvas(9, 3.2)
    photo(axis, 0.6, 1.5, "captions", "landmarks", 5, 0, 0.8)
    note(axis, 0.6, 0.85, "this image", 9.5)
    center, rng = np.array([2.75, 1.5]), np.random.default_rng(11)
    axis.add_patch(plt.Rectangle((1.5, 0.6), 2.5, 1.8, facecolor="#F7F7F7", edgecolor="#CCCCCC"))
    points = center + rng.uniform(-1, 1, (28, 2)) * [1.1, 0.75]
    order = np.argsort(np.linalg.norm(points - center, axis=1))
    for row in order[:5]:
        arrow(axis, tuple(center), tuple(points[row]), WRONG, "-")
    axis.plot(*points[order[5:]].T, "^", color="#AAAAAA", markersize=7)
    axis.plot(*points[order[:5]].T, "^", color=WRONG, markersize=8, zorder=3)
    axis.plot(*center, "o", color=INK, markersize=10, zorder=4)
    arrow(axis, (1.05, 1.5), (1.48, 1.5))
    note(axis, 2.75, 2.58, "▲ reference queries, such as training captions", 9.5, "#666666")
    note(axis, 2.75, 0.38, "the k nearest of them (here 5)", 9.5, WRONG)
    arrow(axis, (4.02, 1.5), (4.42, 1.5))
    box(axis, 5.2, 1.5, "alpha × mean of\ntheir k scores", PLAIN, 1.5, 0.75)
    note(axis, 5.2, 0.88, "= this image's bias", 9.5)
    axis.plot([6.2, 6.2], [0.2, 3.0], color="#999999", linewidth=1.2, linestyle="--")
    note(axis, 3.2, 2.98, "once, before any search", 11.5)
    note(axis, 7.6, 2.98, "for each query", 11.5)
    note(axis, 7.6, 2.35, "“a castle with three towers”", 10)
    arrow(axis, (7.6, 2.2), (7.6, 1.9))
    box(axis, 7.6, 1.5, "score of query and image\nminus the image's bias", PLAIN, 2.25, 0.75)
    note(axis, 7.6, 0.75, "hubs, near to many queries,\nlose more than other images", 9.5)
    return axis


def tabulating() -> plt.Axes:
    """07: a cell is an encoder and a column, is measured once, and stands beside a published number or beside nothing."""
    axis = canvas(9, 3.0)
    box(axis, 1.15, 2.2, "encoder", FIXED, 1.5, 0.6)
    box(axis, 1.15, 1.0, "column", PLAIN, 1.5, 0.6)
    note(axis, 1.15, 0.42, "images, gallery, task, metric", 9.5)
    for y in (2.2, 1.0):
        arrow(axis, (1.92, y), (2.68, 1.6 + 0.18 * (y > 1.6) - 0.18 * (y < 1.6)))
    box(axis, 3.5, 1.6, "cell: a score\nand its interval", PLAIN, 1.6, 0.8)
    note(axis, 3.5, 0.9, "kept in a file,\nmeasured once", 9.5)
    arrow(axis, (4.32, 1.6), (5.0, 1.6))
    box(axis, 5.85, 1.6, "beside the\npublished number", PLAIN, 1.65, 0.8)
    for y, text, color in ((2.4, "✓ agrees", RIGHT), (1.6, "✗ differs", WRONG), (0.8, "not run", "#777777")):
        arrow(axis, (6.7, 1.6), (7.35, y))
        note(axis, 8.0, y, text, 11, color)
    return axis


def building() -> plt.Axes:
    """08: a folder, its parts, five steps that each pass the gate or are thrown away, and a folder to take home."""
    axis = canvas(9, 3.3)
    for i, (domain, number) in enumerate((("landmarks", 2), ("products", 4), ("nature", 7), ("faces", 3))):
        photo(axis, 0.45 + 0.5 * (i % 2), 2.35 - 0.5 * (i // 2), "test", domain, number, 0, 0.46)
    note(axis, 0.7, 1.35, "a folder", 10)
    arrow(axis, (1.25, 2.1), (1.55, 2.1))
    box(axis, 2.3, 2.1, "cut in parts,\nlook for copies", PLAIN, 1.4, 0.7)
    arrow(axis, (3.02, 2.1), (3.3, 2.1))
    steps = (
        "choose an\nencoder",
        "a linear\nmap",
        "train the\nencoder",
        "average\ntwo",
        "realign\nthe text",
        "hold hubs\nback",
    )
    for i, text in enumerate(steps):
        box(axis, 3.78 + 0.78 * i, 2.1, "", FIXED if i in (0, 5) else TRAINED, 0.7, 0.9)
        note(axis, 3.78 + 0.78 * i, 2.1, text, 8.5)
        arrow(axis, (3.78 + 0.78 * i, 1.62), (3.78 + 0.78 * i, 1.3))
    axis.add_patch(plt.Rectangle((3.38, 0.85), 4.6, 0.42, facecolor="#EEEEEE", edgecolor=INK, linewidth=1.2))
    note(axis, 5.68, 1.06, "the gate: better on validation, by more than chance?", 9.5)
    arrow(axis, (4.9, 0.83), (4.9, 0.45), WRONG)
    note(axis, 4.9, 0.27, "no: thrown away", 9.5, WRONG)
    arrow(axis, (6.5, 0.83), (6.5, 0.45), RIGHT)
    note(axis, 6.5, 0.27, "yes: the next begins here", 9.5, RIGHT)
    arrow(axis, (8.0, 1.06), (8.2, 1.06))
    note(axis, 8.58, 1.06, "measure,\ntake home", 9.5)
    note(axis, 5.73, 2.8, "each step begins with what the gate has kept so far", 9.5)
    legend(axis, 0.2, 0.3)
    return axis


def scaling() -> plt.Axes:
    """09: tars, workers, Parquet files, the table and the query, and on which machine each of them lives."""
    axis = canvas(9, 3.6)
    places = ((0.1, 1.75, "object storage,\nor a disk"), (1.95, 2.15, "a cluster, or the\ncores of one machine"))
    places += ((4.2, 1.75, "object storage,\nor a disk"), (6.05, 2.85, "one machine, which reads\nwhat a query needs"))
    for x, width, text in places:
        axis.add_patch(plt.Rectangle((x, 0.55), width, 2.55, facecolor="#F4F4F4", edgecolor="none"))
        note(axis, x + width / 2, 0.27, text, 9.5)
    for i, y in enumerate((2.8, 2.2, 1.6, 1.0)):
        worker = 2.5 if i < 2 else 1.3
        box(axis, 0.97, y, f"00{i}.tar", PLAIN, 1.2, 0.4)
        arrow(axis, (1.57, y), (2.13, worker + 0.35 * (y - worker)))
        arrow(axis, (3.91, worker + 0.35 * (y - worker)), (4.37, y))
        box(axis, 5.07, y, f"00{i}.parquet", PLAIN, 1.4, 0.4)
        arrow(axis, (5.77, y), (6.25, 1.9 + 0.3 * (y - 1.9)))
    for y in (2.5, 1.3):
        box(axis, 3.02, y, "worker: encoder\nand bias", FIXED, 1.75, 0.62)
        arrow(axis, (3.02, 1.9 + 0.25 * (y - 1.9)), (3.02, 1.9 + 0.47 * (y - 1.9)))
    box(axis, 3.02, 1.9, "references", PLAIN, 1.2, 0.3)
    box(axis, 6.8, 1.9, "table\nand index", PLAIN, 1.1, 1.0)
    arrow(axis, (7.95, 2.18), (7.37, 2.02))
    arrow(axis, (7.37, 1.78), (7.95, 1.62), RIGHT)
    note(axis, 8.4, 2.22, "query", 10)
    note(axis, 8.4, 1.58, "ids and\nscores", 10, RIGHT)
    headings = (
        (0.97, "images (section 2)"),
        (3.02, "an engine (3, 4)"),
        (5.07, "id, vector, bias"),
        (7.47, "a search (5 to 7)"),
    )
    for x, text in headings:
        note(axis, x, 3.33, text, 10)
    return axis


SCHEMATICS = {
    "01_search_images": searching,
    "02_benchmark_encoders": measuring,
    "03_finetune_arcmargin": finetuning,
    "04_realign_text_mcip": keeping_text,
    "05_average_soups": soup,
    "06_normalize_neighbors_nnn": hubs,
    "07_reproduce_papers": tabulating,
    "08_build_your_search": building,
    "09_scale_out": scaling,
}


def save(axis: plt.Axes, path: Path) -> None:
    """A PNG of 96 colors, which keeps a notebook small."""
    path.parent.mkdir(exist_ok=True)
    axis.figure.savefig(path, dpi=110, facecolor="white")
    plt.close(axis.figure)
    Image.open(path).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    for name, draw in SCHEMATICS.items():
        save(draw(), gu.COURSE / "schematics" / f"{name}.png")
