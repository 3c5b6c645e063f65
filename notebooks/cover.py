"""What fine-tuning changes, as pictures: `python notebooks/cover.py` draws the README's, notebooks/cover.jpg; notebook 03
draws its own with the same function."""

from pathlib import Path

import numpy as np
from IPython.display import Image as Picture
from PIL import Image

import gpnns_utils as gu

SHOWN = 4  # neighbours of each query


def neighbours(encoder: gu.Encoder, photos: gu.ImageSet) -> tuple[np.ndarray, np.ndarray]:
    """The nearest other images of every image, rows (n, SHOWN), and which are of its class."""
    embeddings = gu.embed_images(encoder, photos)
    rows = gu.search(embeddings, embeddings, SHOWN, own=np.arange(len(photos)))[1]
    return rows, photos.labels[rows] == photos.labels[:, None]


def show_before_and_after(
    before: gu.Encoder, after: gu.Encoder, photos: gu.ImageSet, lost: bool = False, size: float = 0.7
) -> Picture:
    """One query of each group: its nearest neighbours by two encoders, green frames around its own class, red around others.

    Shown is the first query that gains most right neighbours, or with `lost` the first that loses most.
    """
    (was, was_right), (now, is_right) = neighbours(before, photos), neighbours(after, photos)
    gain = (is_right.sum(1) - was_right.sum(1)) * (-1 if lost else 1)
    groups = gu.datasets.domains(photos) or {"": np.full(len(photos), True)}
    queries = [int(np.argmax(np.where(inside, gain, -SHOWN - 1))) for inside in groups.values()]
    gap, colors = Image.new("RGB", (64, 64), "white"), np.array([gu.WRONG, gu.RIGHT])
    images, frames = [], []
    for q in queries:
        images.append([photos[q], gap, *[photos[r] for r in was[q]], gap, *[photos[r] for r in now[q]]])
        frames.append([None, None, *colors[was_right[q].astype(int)], None, *colors[is_right[q].astype(int)]])
    titles = [["query", "", "before", *[""] * SHOWN, "after fine-tuning", *[""] * (SHOWN - 1)]]
    titles += [[""] * len(titles[0])] * (len(queries) - 1)
    return gu.show_images(images, titles, frames, list(groups), size=size)


if __name__ == "__main__":
    gu.setup()
    photos = gu.load_images("mini", "test")
    encoders = [gu.load_encoder(name) for name in ("mini", f"mini@{gu.DATA / 'mini_tuned' / 'arcmargin.safetensors'}")]
    Path(__file__).with_name("cover.jpg").write_bytes(show_before_and_after(*encoders, photos, size=1.0).data)
    first = [100 * neighbours(encoder, photos)[1][:, 0].mean() for encoder in encoders]
    print(f"first neighbour right for {first[0]:.1f} % of {len(photos):,} queries before, {first[1]:.1f} % after")
