"""Figures that lessons share: searches before and after a training, models as points, captions word by word (03 to 05)."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image as Picture
from PIL import Image

import gpnns_utils as gu
from gpnns import caption_banks
from gpnns.images import image_set

SHOWN = 4  # neighbours of each query


def find_neighbours(encoder: gu.Encoder, photos: gu.ImageSet) -> tuple[np.ndarray, np.ndarray]:
    """The nearest other images of every image, rows (n, SHOWN), and which are of its class."""
    embeddings, _ = gu.embed_images(encoder, photos)
    rows = gu.search(embeddings, embeddings, SHOWN, own=np.arange(len(photos)))[1]
    return rows, photos.labels[rows] == photos.labels[:, None]


def show_before_and_after(
    before: gu.Encoder, after: gu.Encoder, photos: gu.ImageSet, lost: bool = False, size: float = 0.7
) -> Picture:
    """One query of each group: its nearest neighbours by two encoders, green frames around its own class, red around others.

    Shown is the first query that gains most right neighbours, or with `lost` the first that loses most.
    """
    for encoder in (before, after):
        photos = gu.embed_images(encoder, photos)[1]  # without what one of them cannot embed
    (was, was_right), (now, is_right) = find_neighbours(before, photos), find_neighbours(after, photos)
    gain = (is_right.sum(1) - was_right.sum(1)) * (-1 if lost else 1)
    groups = image_set.group_masks(photos) or {"": np.full(len(photos), True)}
    queries = [int(np.argmax(np.where(inside, gain, -SHOWN - 1))) for inside in groups.values()]
    gap, colors = Image.new("RGB", (64, 64), "white"), np.array([gu.WRONG, gu.RIGHT])
    images, frames = [], []
    for q in queries:
        images.append([photos[q], gap, *[photos[r] for r in was[q]], gap, *[photos[r] for r in now[q]]])
        frames.append([None, None, *colors[was_right[q].astype(int)], None, *colors[is_right[q].astype(int)]])
    titles = [["query", "", "before", *[""] * SHOWN, "after fine-tuning", *[""] * (SHOWN - 1)]]
    titles += [[""] * len(titles[0])] * (len(queries) - 1)
    return gu.show_images(images, titles, frames, list(groups), size=size)


def show_places(
    places: dict[str, tuple[gu.Score, gu.Score | None]],
    arrows: Sequence[tuple[str, str]] = (),
    classes: np.ndarray | None = None,
    left: Collection[str] = (),
) -> None:
    """Models as points: image to image mAP to the right, text to image R@5 upwards, with 95 % intervals as thin lines.

    arrows: (from, to), names of models. classes: of the image queries, which are then drawn class by class. left: models
    whose name stands on the left of their point. Models without a text tower, whose second score is None, lie on one line.
    """
    figure, axis = plt.subplots(figsize=(6.4, 4))
    points = {name: (100 * image.mean, 100 * text.mean if text else 0) for name, (image, text) in places.items()}
    for color, (name, (image, text)) in zip(gu.PALETTE, places.items(), strict=False):
        x, y = points[name]
        axis.plot(100 * np.array(image.interval(classes)), [y, y], color=color, linewidth=1.5, alpha=0.6)
        axis.plot([x, x], 100 * np.array(text.interval()) if text else [y, y], color=color, linewidth=1.5, alpha=0.6)
        axis.plot(x, y, "o", color=color, markersize=9)
        side = {"xytext": (-9, 7), "ha": "right"} if name in left else {"xytext": (9, 7)}
        axis.annotate(name, (x, y), textcoords="offset points", fontsize=11, **side)
    for start, end in arrows:
        style = {"arrowstyle": "-|>", "color": "#666666", "linewidth": 1.5, "shrinkA": 8, "shrinkB": 8}
        axis.annotate("", points[end], points[start], arrowprops=style)
    axis.margins(0.2)
    axis.set(xlabel="image to image, mAP (%)", ylabel="text to image, R@5 (%)")
    plt.show()


def show_captions(images: gu.ImageSet, rows: Sequence[int], captions: Sequence[Sequence[str]]) -> None:
    """Images and captions beside them, word by word: green and upright where the image's own captions have the word too,
    orange and in italics where not, black where nothing is known of the image. Words that every caption has are gray."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(7.4, 1.35 * len(rows)), layout="none")
    for axis, row, texts in zip(np.atleast_1d(axes), rows, captions, strict=True):
        axis.imshow(np.asarray(images[row]), extent=(0, 1.2, 0, 1.2))
        axis.set(xlim=(0, 7.4), ylim=(0, 1.25))
        axis.axis("off")
        own = caption_banks.get_words(images.captions[row]) if images.captions else None
        lines = [line for text in texts for line in textwrap.wrap(text, 80)]
        for i, line in enumerate(lines):
            place = 0
            for word in line.split(" "):
                style = {"color": "black"} if own is None else style_word(word, own)
                axis.text(
                    1.35 + 0.074 * place, 1.1 - 0.19 * i, word, family="monospace", fontsize=8.5, va="center", **style
                )
                place += len(word) + 1
    plt.subplots_adjust(0, 0, 1, 1, 0, 0.05)
    plt.show()


def style_word(word: str, own: set[str]) -> dict:
    meant = caption_banks.get_words([word])
    if not meant:
        return {"color": "gray"}
    return {"color": gu.RIGHT} if meant <= own else {"color": gu.WRONG, "style": "italic"}
