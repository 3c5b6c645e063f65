"""The figure at the top of the README, from a real run: `python notebooks/cover.py` draws notebooks/cover.jpg.

One query of each domain of the mini world's test, and what the mini CLIP finds before and after notebook 03. The
queries are those that gain most: in each domain the first with the most right neighbours more.
"""

from pathlib import Path

import numpy as np
from PIL import Image

import gpnns_utils as gu

SHOWN = 4  # neighbours of each query


def neighbours(spec: str, photos: gu.ImageSet) -> tuple[np.ndarray, np.ndarray]:
    """The nearest other images of every image, rows (n, SHOWN), and which are of its class."""
    embeddings = gu.embed_images(gu.load_encoder(spec), photos)
    rows = gu.search(embeddings, embeddings, SHOWN, own=np.arange(len(photos)))[1]
    return rows, photos.labels[rows] == photos.labels[:, None]


if __name__ == "__main__":
    gu.setup()
    photos = gu.load_images("mini", "test")
    before, was_right = neighbours("mini", photos)
    after, is_right = neighbours(f"mini@{gu.DATA / 'mini_tuned' / 'arcmargin.safetensors'}", photos)
    gain, domains = (is_right.sum(1) - was_right.sum(1)), list(dict.fromkeys(photos.groups.tolist()))
    queries = [int(np.argmax(np.where(photos.groups == domain, gain, -SHOWN))) for domain in domains]
    gap, colors = Image.new("RGB", (64, 64), "white"), np.array([gu.WRONG, gu.RIGHT])
    images, frames = [], []
    for q in queries:
        images.append([photos[q], gap, *[photos[r] for r in before[q]], gap, *[photos[r] for r in after[q]]])
        frames.append([None, None, *colors[was_right[q].astype(int)], None, *colors[is_right[q].astype(int)]])
    titles = [["query", "", "before", *[""] * SHOWN, "after fine-tuning", *[""] * (SHOWN - 1)]]
    titles += [[""] * len(titles[0])] * (len(queries) - 1)
    picture = gu.show_images(images, titles, frames, domains, size=1.0)
    Path(__file__).with_name("cover.jpg").write_bytes(picture.data)
    first = [100 * right[:, 0].mean() for right in (was_right, is_right)]
    print(f"first neighbour right for {first[0]:.1f} % of {len(photos):,} queries before, {first[1]:.1f} % after")
