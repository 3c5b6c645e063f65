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
from matplotlib.patches import Arc, FancyBboxPatch
from PIL import Image

import gpnns_utils as gu
from gpnns.world import mini_world

TRAINED, FIXED, PLAIN, INK = "#F6C66B", "#BCD9EC", "#FFFFFF", "#333333"
RIGHT, WRONG = "#009E73", "#D55E00"


Point = tuple[float, float]


def open_sheet(width: float, height: float) -> plt.Axes:
    """Axes without axes, one unit to the inch, y upwards."""
    figure = plt.figure(figsize=(width, height), layout="none")
    axis = figure.add_axes([0, 0, 1, 1])
    axis.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axis.axis("off")
    return axis


def add_box(
    axis: plt.Axes, x: float, y: float, text: str, color: str = PLAIN, width: float = 1.5, height: float = 0.62
) -> None:
    """A box with its middle at (x, y)."""
    corner, style = (x - width / 2, y - height / 2), "round,pad=0,rounding_size=0.08"
    axis.add_patch(FancyBboxPatch(corner, width, height, style, facecolor=color, edgecolor=INK, linewidth=1.2))
    axis.text(x, y, text, ha="center", va="center", fontsize=min(10.5, 9.5 * width), color=INK, linespacing=1.25)


def add_rectangle(
    axis: plt.Axes, x: float, y: float, width: float, height: float, color: str, edge: str = INK, line: float = 1.2
) -> None:
    """A rectangle with its lower left corner at (x, y)."""
    axis.add_patch(plt.Rectangle((x, y), width, height, facecolor=color, edgecolor=edge, linewidth=line))


def add_arrow(
    axis: plt.Axes,
    start: Point,
    end: Point,
    color: str = INK,
    style: str = "-|>",
    bend: float = 0.0,
    dashed: bool = False,
) -> None:
    look = {"arrowstyle": style, "color": color, "linewidth": 1.5, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 13}
    look |= {"connectionstyle": f"arc3,rad={bend}", "linestyle": "--" if dashed else "-"}
    axis.annotate("", end, start, zorder=1, arrowprops=look)


def add_arrows(axis: plt.Axes, y: float, *spans: tuple[float, float]) -> None:
    """Level arrows at one height, each from one x to another."""
    for start, end in spans:
        add_arrow(axis, (start, y), (end, y))


def add_note(
    axis: plt.Axes, x: float, y: float, text: str, size: float = 9.5, color: str = INK, align: str = "center"
) -> None:
    axis.text(x, y, text, ha=align, va="center", fontsize=size, color=color, linespacing=1.25)


def add_photo(
    axis: plt.Axes, x: float, y: float, split: str, domain: str, number: int, view: int, size: float = 0.62
) -> None:
    """An image of the mini world with its middle at (x, y)."""
    pixels = mini_world.draw_image(split, domain, number, view=view)
    axis.imshow(pixels, extent=(x - size / 2, x + size / 2, y - size / 2, y + size / 2), zorder=2)


def add_key(axis: plt.Axes, x: float, y: float, color: str, text: str) -> None:
    add_rectangle(axis, x, y - 0.08, 0.2, 0.16, color, line=1)
    add_note(axis, x + 0.28, y, text, 9, align="left")


def add_legend(axis: plt.Axes, x: float, y: float) -> None:
    for i, (color, text) in enumerate(((TRAINED, "is trained"), (FIXED, "stays as it is"))):
        add_key(axis, x + 1.35 * i, y, color, text)


def draw_search(axis: plt.Axes) -> None:
    """01: images and texts become points on one sphere, and the nearest points are the answer."""
    center, radius = np.array([4.5, 1.6]), 1.3
    axis.add_patch(plt.Circle(center, radius, facecolor="#F7F7F7", edgecolor="#999999", linewidth=1.2))
    for height in (-0.55, 0.0, 0.55):
        half = (radius**2 - (height * radius) ** 2) ** 0.5
        middle = center + [0, height * radius]
        axis.add_patch(Arc(middle, 2 * half, 0.42 * half, theta1=180, theta2=360, color="#DDDDDD"))
    rng = np.random.default_rng(3)
    angles, lengths = rng.uniform(0, 2 * np.pi, 40), radius * rng.uniform(0.15, 0.93, 40) ** 0.5
    points = center + np.stack([lengths * np.cos(angles), lengths * np.sin(angles)], axis=1)
    query = center + [0.15, 0.35]
    order = np.argsort(np.linalg.norm(points - query, axis=1))
    axis.plot(*points[order[4:]].T, "o", color="#AAAAAA", ms=6)
    axis.plot(*points[order[:4]].T, "o", color=RIGHT, ms=8)
    axis.plot(*query, "*", color=WRONG, ms=19, mec="white", zorder=5)
    for y, domain, number in ((2.35, "landmarks", 7), (1.6, "nature", 3), (0.85, "objects", 4)):
        add_photo(axis, 0.5, y, "test", domain, number, 0)
    add_arrows(axis, 1.6, (0.9, 1.3), (7.6, 7.35))
    add_box(axis, 2.05, 1.6, "image tower", FIXED)
    add_note(axis, 0.5, 0.35, "a gallery")
    add_note(axis, 8.3, 1.6, "“a red flower\nwith five petals”")
    add_box(axis, 6.6, 1.6, "text tower", FIXED)
    add_arrows(axis, 1.6, (2.8, 3.15))
    add_arrow(axis, (5.85, 1.6), query + [0.14, 0.0], WRONG, bend=0.15)
    add_note(axis, 4.5, 3.2, "gray: images; star: the query; green: the nearest images, which are the answer")


def draw_ranking(axis: plt.Axes) -> None:
    """02: what counts as right, what is left out, and where the ranks come from."""
    add_photo(axis, 0.65, 1.45, "test", "products", 4, 0, 0.85)
    add_note(axis, 0.65, 0.82, "query", 10)
    ranking = [(4, 0), (4, 1), (4, 2), (9, 0), (4, 3), (2, 1), (4, 4)]
    for i, (number, view) in enumerate(ranking):
        x, (sign, color) = 2.2 + 0.88 * i, ("✓", RIGHT) if number == 4 else ("✗", WRONG)
        add_photo(axis, x, 1.45, "test", "products", number, view, 0.7)
        add_rectangle(axis, x - 0.37, 1.08, 0.74, 0.74, "none", "#999999" if i == 0 else color, 3)
        add_note(axis, x, 0.85, f"{sign} rank {i}" if i else "left out", color=color if i else INK)
    axis.plot([1.8, 2.6], [1.05, 1.85], color="#999999", linewidth=2.5, zorder=5)
    add_note(axis, 2.2, 2.2, "the query\nitself")
    add_note(axis, 5.3, 2.2, "✓ the same vase as the query      ✗ a different one", 10.5)
    found = "right answers at ranks 1, 2, 4 and 6: the scores are computed from these four numbers"
    add_note(axis, 5.3, 0.4, found, 10)
    add_arrows(axis, 1.45, (1.2, 1.75), (7.95, 8.3))
    add_note(axis, 8.6, 1.45, "more, no\nvase like\nthis one", 9)


def draw_finetuning(axis: plt.Axes) -> None:
    """03: labels move the image tower; the margin sits on the angle to the own proxy."""
    for i, (domain, number) in enumerate((("landmarks", 3), ("products", 5), ("faces", 2))):
        add_photo(axis, 0.55, 2.6 - 0.78 * i, "train", domain, number, 0)
    add_box(axis, 2.2, 1.82, "image tower", TRAINED)
    center, radius = np.array([4.85, 1.75]), 1.15
    axis.add_patch(plt.Circle(center, radius, fill=False, edgecolor="#999999", linewidth=1.2))

    def on_circle(degrees: float, scale: float = 1.0) -> np.ndarray:
        return center + scale * radius * np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])

    own, image, shifted = 100, 62, 36
    for degrees, color in ((own, RIGHT), (205, "#999999"), (305, "#999999")):
        axis.plot(*on_circle(degrees), "s", color=TRAINED, ms=11, mec=color, mew=2.2)
        add_arrow(axis, center, on_circle(degrees, 0.93), color, "-")
    axis.plot(*on_circle(shifted), "o", color=PLAIN, ms=10, mec=WRONG, mew=1.8, zorder=4)
    axis.plot(*on_circle(image), "o", color=INK, ms=10, mec=INK, zorder=4)
    add_arrow(axis, center, on_circle(image, 0.95), INK, "-")
    add_arrow(axis, center, on_circle(shifted, 0.95), WRONG, "-", dashed=True)
    for start, end, color, size in ((image, own, INK, 0.95), (shifted, image, WRONG, 1.25)):
        axis.add_patch(Arc(center, size, size, theta1=start, theta2=end, color=color, linewidth=1.8))
    add_note(axis, *(on_circle(own, 1.17) + [-0.25, 0]), "own proxy", 9.5, RIGHT)
    add_note(axis, *(center + [-0.1, -0.62]), "other proxies", 9, "#666666")
    add_note(axis, *(on_circle(image, 1.05) + [0.4, 0.05]), "image")
    add_note(axis, *(on_circle(81, 0.6)), "angle", 9)
    add_note(axis, *(on_circle(shifted, 1.1) + [0.85, 0.05]), "where the loss\nsees the image", 9, WRONG)
    add_note(axis, *on_circle(47, 0.78), "margin", 9, WRONG)
    add_note(axis, center[0], 0.4, "the circle: unit vectors", 9)
    add_arrows(axis, 1.82, (0.95, 1.4), (2.95, 3.5), (6.15, 7.3))
    add_box(axis, 8.05, 1.82, "softmax over\nscale × cosines", PLAIN, 1.45, 0.72)
    add_note(axis, 8.05, 1.22, "loss: −log of the share\nof the image's class", 9)
    add_box(axis, 2.2, 0.85, "text tower", FIXED)
    add_note(axis, 2.2, 0.42, "takes no part", 9)
    add_legend(axis, 6.2, 0.25)


def draw_realignment(axis: plt.Axes) -> None:
    """04: three recipes, what each trains and where its loss sits."""
    given, found = "its caption,\n“a castle\n…”", "captions\nfound in\na bank"
    recipes = [  # title, image tower, its state, text tower, its state, what enters it, the loss
        ("image-only", "image tower", TRAINED, "text tower", FIXED, "", "classes"),
        ("2SFT, second stage", "image tower,\nfine-tuned", FIXED, "text tower,\nits end", TRAINED, given, "image and\nits caption"),
        ("MCIP", "image tower", TRAINED, "text tower", FIXED, found, "classes and\ncaptions"),
    ]  # fmt: skip
    for i, (title, image, image_color, text, text_color, enters, loss) in enumerate(recipes):
        left = 0.1 + 3.0 * i
        add_note(axis, left + 1.4, 3.45, title, 12)
        add_photo(axis, left + 0.42, 2.6, "train", "landmarks", 3, 0)
        add_note(axis, left + 0.42, 1.2, enters, 8)
        add_box(axis, left + 1.45, 2.6, image, image_color, 1.05)
        add_box(axis, left + 1.45, 1.2, text, text_color, 1.05)
        add_box(axis, left + 2.38, 1.9, loss, PLAIN, 0.92, 0.55)
        add_arrows(axis, 2.6, (left + 0.75, left + 0.9))
        add_arrow(axis, (left + 1.98, 2.6), (left + 2.38, 2.2))
        if enters:
            add_arrows(axis, 1.2, (left + 0.82, left + 0.92))
            add_arrow(axis, (left + 1.98, 1.2), (left + 2.38, 1.6))
        else:
            add_note(axis, left + 1.45, 0.7, "takes no part", 9)
    for x in (3.0, 6.0):
        axis.plot([x, x], [0.5, 3.6], color="#CCCCCC", linewidth=1)
    add_legend(axis, 2.6, 0.2)
    add_key(axis, 5.35, 0.2, PLAIN, "what the loss asks for")


def draw_soup(axis: plt.Axes) -> None:
    """05: one start, four ends, the average between them, on a map of the loss."""
    x, y = np.meshgrid(np.linspace(0, 7, 200), np.linspace(0, 3.2, 100))
    middle = np.array([4.7, 1.65])
    valley = ((x - middle[0]) / 1.9) ** 2 + ((y - middle[1]) / 1.0) ** 2
    axis.contourf(x, y, np.minimum(valley, 6), 12, cmap="Blues_r", alpha=0.35)
    start = np.array([1.1, 1.6])
    ends = np.array([[5.9, 2.45], [3.9, 2.35], [5.6, 0.85], [3.8, 0.95]])
    for end, bend in zip(ends, (-0.25, -0.15, 0.25, 0.15), strict=True):
        add_arrow(axis, start, end, INK, bend=bend)
        add_arrow(axis, end, ends.mean(axis=0), WRONG, "-", dashed=True)
    axis.plot(*ends.T, "o", color=TRAINED, ms=12, mec=INK, linestyle="none", zorder=4)
    axis.plot(*start, "o", color=FIXED, ms=13, mec=INK, zorder=4)
    axis.plot(*ends.mean(axis=0), "*", color=WRONG, ms=22, mec="white", zorder=5)
    add_note(axis, 0.62, 1.6, "shared\nstart", 10)
    add_note(axis, 5.75, 2.85, "four fine-tunings", 10)
    add_note(axis, 5.0, 1.64, "their average", 11, "#A33F00", align="left")
    add_note(axis, 6.2, 0.25, "darker: lower loss", 9)
    add_note(axis, 3.2, 0.15, "one weight →", 9)
    axis.text(0.15, 2.4, "another weight →", fontsize=9, color=INK, rotation=90, va="center", ha="center")


def draw_hubs(axis: plt.Axes) -> None:
    """06: a bias per image, from its nearest references; computed once, subtracted from every score."""
    add_photo(axis, 0.6, 1.5, "captions", "landmarks", 5, 0, 0.8)
    add_note(axis, 0.6, 0.85, "this image")
    center, rng = np.array([2.75, 1.5]), np.random.default_rng(11)
    add_rectangle(axis, 1.5, 0.6, 2.5, 1.8, "#F7F7F7", "#CCCCCC", 1)
    points = center + rng.uniform(-1, 1, (28, 2)) * [1.1, 0.75]
    order = np.argsort(np.linalg.norm(points - center, axis=1))
    for row in order[:5]:
        add_arrow(axis, center, points[row], WRONG, "-")
    axis.plot(*points[order[5:]].T, "^", color="#AAAAAA", ms=7)
    axis.plot(*points[order[:5]].T, "^", color=WRONG, ms=8, zorder=3)
    axis.plot(*center, "o", color=INK, ms=10, zorder=4)
    add_arrows(axis, 1.5, (1.05, 1.48), (4.02, 4.42))
    add_note(axis, 2.75, 2.58, "▲ reference queries, such as training captions", 9.5, "#666666")
    add_note(axis, 2.75, 0.38, "the k nearest of them (here 5)", 9.5, WRONG)
    add_box(axis, 5.2, 1.5, "alpha × mean of\ntheir k scores", PLAIN, 1.5, 0.75)
    add_note(axis, 5.2, 0.88, "= this image's bias")
    axis.plot([6.2, 6.2], [0.2, 3.0], color="#999999", linewidth=1.2, linestyle="--")
    add_note(axis, 3.2, 2.98, "once, before any search", 11.5)
    add_note(axis, 7.6, 2.98, "for each query", 11.5)
    add_note(axis, 7.6, 2.35, "“a castle with three towers”", 10)
    add_arrow(axis, (7.6, 2.2), (7.6, 1.9))
    add_box(axis, 7.6, 1.5, "score of query and image\nminus the image's bias", PLAIN, 2.25, 0.75)
    add_note(axis, 7.6, 0.75, "hubs, near to many queries,\nlose more than other images")


def draw_table(axis: plt.Axes) -> None:
    """07: a cell is an encoder and a column, is measured once, and stands beside a published number or beside nothing."""
    add_box(axis, 1.15, 2.2, "encoder", FIXED, 1.5, 0.6)
    add_box(axis, 1.15, 1.0, "column", PLAIN, 1.5, 0.6)
    add_note(axis, 1.15, 0.42, "images, gallery, task, metric")
    for y in (2.2, 1.0):
        add_arrow(axis, (1.92, y), (2.68, 1.6 + 0.18 * (y > 1.6) - 0.18 * (y < 1.6)))
    add_box(axis, 3.5, 1.6, "cell: a score\nand its interval", PLAIN, 1.6, 0.8)
    add_note(axis, 3.5, 0.9, "kept in a file,\nmeasured once")
    add_arrows(axis, 1.6, (4.32, 5.0))
    add_box(axis, 5.85, 1.6, "beside the\npublished number", PLAIN, 1.65, 0.8)
    for y, text, color in ((2.4, "✓ agrees", RIGHT), (1.6, "✗ differs", WRONG), (0.8, "not run", "#777777")):
        add_arrow(axis, (6.7, 1.6), (7.35, y))
        add_note(axis, 8.0, y, text, 11, color)


def draw_building(axis: plt.Axes) -> None:
    """08: a folder, its parts, five steps that each pass the gate or are thrown away, and a folder to take home."""
    for i, (domain, number) in enumerate((("landmarks", 2), ("products", 4), ("nature", 7), ("faces", 3))):
        add_photo(axis, 0.45 + 0.5 * (i % 2), 2.35 - 0.5 * (i // 2), "test", domain, number, 0, 0.46)
    add_note(axis, 0.7, 1.35, "a folder", 10)
    add_box(axis, 2.3, 2.1, "cut in parts,\nlook for copies", PLAIN, 1.4, 0.7)
    add_arrows(axis, 2.1, (1.25, 1.55), (3.02, 3.3))
    steps = ["choose an\nencoder", "a linear\nmap", "train the\nencoder"]
    steps += ["average\ntwo", "realign\nthe text", "hold hubs\nback"]
    for i, text in enumerate(steps):
        add_box(axis, 3.78 + 0.78 * i, 2.1, "", FIXED if i in (0, 5) else TRAINED, 0.7, 0.9)
        add_note(axis, 3.78 + 0.78 * i, 2.1, text, 8.5)
        add_arrow(axis, (3.78 + 0.78 * i, 1.62), (3.78 + 0.78 * i, 1.3))
    add_rectangle(axis, 3.38, 0.85, 4.6, 0.42, "#EEEEEE")
    add_note(axis, 5.68, 1.06, "the gate: better on validation, by more than chance?")
    add_arrow(axis, (4.9, 0.83), (4.9, 0.45), WRONG)
    add_note(axis, 4.9, 0.27, "no: thrown away", 9.5, WRONG)
    add_arrow(axis, (6.5, 0.83), (6.5, 0.45), RIGHT)
    add_note(axis, 6.5, 0.27, "yes: the next begins here", 9.5, RIGHT)
    add_arrows(axis, 1.06, (8.0, 8.2))
    add_note(axis, 8.58, 1.06, "measure,\ntake home")
    add_note(axis, 5.73, 2.8, "each step begins with what the gate has kept so far")
    add_legend(axis, 0.2, 0.3)


def draw_scaling(axis: plt.Axes) -> None:
    """09: tars, workers, Parquet files, the table and the query, and on which machine each of them lives."""
    places = ((0.1, 1.75, "object storage,\nor a disk"), (1.95, 2.15, "a cluster, or the\ncores of one machine"))
    places += ((4.2, 1.75, "object storage,\nor a disk"), (6.05, 2.85, "one machine, which reads\nwhat a query needs"))
    for x, width, text in places:
        add_rectangle(axis, x, 0.55, width, 2.55, "#F4F4F4", "none")
        add_note(axis, x + width / 2, 0.27, text)
    for i, y in enumerate((2.8, 2.2, 1.6, 1.0)):
        worker = 2.5 if i < 2 else 1.3
        add_box(axis, 0.97, y, f"00{i}.tar", PLAIN, 1.2, 0.4)
        add_arrow(axis, (1.57, y), (2.13, worker + 0.35 * (y - worker)))
        add_arrow(axis, (3.91, worker + 0.35 * (y - worker)), (4.37, y))
        add_box(axis, 5.07, y, f"00{i}.parquet", PLAIN, 1.4, 0.4)
        add_arrow(axis, (5.77, y), (6.25, 1.9 + 0.3 * (y - 1.9)))
    for y in (2.5, 1.3):
        add_box(axis, 3.02, y, "worker: encoder\nand bias", FIXED, 1.75, 0.62)
        add_arrow(axis, (3.02, 1.9 + 0.25 * (y - 1.9)), (3.02, 1.9 + 0.47 * (y - 1.9)))
    add_box(axis, 3.02, 1.9, "references", PLAIN, 1.2, 0.3)
    add_box(axis, 6.8, 1.9, "table\nand index", PLAIN, 1.1, 1.0)
    add_arrow(axis, (7.95, 2.18), (7.37, 2.02))
    add_arrow(axis, (7.37, 1.78), (7.95, 1.62), RIGHT)
    add_note(axis, 8.4, 2.22, "query", 10)
    add_note(axis, 8.4, 1.58, "ids and\nscores", 10, RIGHT)
    headings = "images (section 2)", "an engine (3, 4)", "id, vector, bias", "a search (5 to 7)"
    for x, text in zip((0.97, 3.02, 5.07, 7.47), headings, strict=True):
        add_note(axis, x, 3.33, text, 10)


SCHEMATICS = {  # by notebook: how it is drawn, its width and its height in inches
    "01_search_images": (draw_search, 9, 3.4),
    "02_benchmark_encoders": (draw_ranking, 9, 2.6),
    "03_finetune_arcmargin": (draw_finetuning, 9, 3.3),
    "04_realign_text_mcip": (draw_realignment, 9, 3.7),
    "05_average_soups": (draw_soup, 7, 3.2),
    "06_normalize_neighbors_nnn": (draw_hubs, 9, 3.2),
    "07_reproduce_papers": (draw_table, 9, 3.0),
    "08_build_your_search": (draw_building, 9, 3.3),
    "09_scale_out": (draw_scaling, 9, 3.6),
}


def save_schematic(name: str, path: Path) -> None:
    """Draw one: a PNG of 96 colors, which keeps a notebook small."""
    draw, width, height = SCHEMATICS[name]
    axis = open_sheet(width, height)
    draw(axis)
    path.parent.mkdir(exist_ok=True)
    axis.figure.savefig(path, dpi=110, facecolor="white")
    plt.close(axis.figure)
    Image.open(path).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    for name in SCHEMATICS:
        save_schematic(name, gu.COURSE / "schematics" / f"{name}.png")
