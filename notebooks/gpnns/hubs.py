"""What notebook 06 measures on: references, validation and test, each with texts, asked in both directions.

images in three parts -> embeddings of each encoder -> queries, gallery, and what each query should find
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

import gpnns_utils as gu
from gpnns import benchmark
from gpnns.images import image_set, splitting

DIRECTIONS = ("text to image", "image to text")
Sides = dict[str, dict[str, dict[str, tuple[np.ndarray, np.ndarray, list[np.ndarray]]]]]


def load_caption_parts(
    train_images: str | Path, test_images: str | Path = "", reference_images: int = 2400, seed: int = 0
) -> dict[str, gu.ImageSet]:
    """{"references", "validation", "test"}: images with captions, or else with the names of their classes.

    The drawn world brings its parts. Of others, references and validation are cut from `train_images`, and the test too
    where no `test_images` are given, without a class in common. At most `reference_images` references and 5,000
    validation images are kept, which is plenty for two settings.
    Raises ValueError where nothing tells what an image shows, and when a reference image is a test image too.
    """
    if str(train_images) == "mini":
        if test_images:
            raise ValueError("test_images belong to train_images of your own; the drawn world brings its test")
        parts = [gu.load_images("mini", split) for split in ("references", "captions_validation", "captions")]
    elif test_images:
        parts = [*cut_parts(gu.load_images(train_images, "train"), (0.8,), seed), gu.load_images(test_images)]
    else:
        parts = cut_parts(gu.load_images(train_images), (0.6, 0.8), seed)
    for part in parts:
        if part.captions is None and part.labels is None:
            raise ValueError(f"{part.name} has neither captions nor classes: add captions.json, or a column 'caption'")
    references, validation, test = map(splitting.add_names_as_captions, parts)
    if shared := splitting.find_shared_images(test, references):
        raise ValueError(
            f"{len(shared)} reference images are test images too, for example {references.describe(shared[0][1])}: a bias "
            "that has seen the test flatters it; take them out"
        )
    kept = np.sort(np.random.default_rng(seed).permutation(len(references))[:reference_images])
    parts = references.subset(kept), validation.subset(np.arange(min(len(validation), 5000))), test
    return dict(zip(("references", "validation", "test"), parts, strict=True))


def cut_parts(images: gu.ImageSet, ends: Sequence[float], seed: int) -> list[gu.ImageSet]:
    """Images in parts without a class in common (an image, where there are no classes), ending at these shares."""
    units = np.arange(len(images)) if images.labels is None else images.labels
    known = np.random.default_rng(seed).permutation(np.unique(units))
    if len(known) < 5:
        raise ValueError(f"{images.name} has {len(known)} classes; five or more are needed to cut it into parts")
    pieces = np.split(known, np.round(np.array(ends) * len(known)).astype(int))
    return [images.subset(np.isin(units, piece)) for piece in pieces]


def embed_parts(encoders: Sequence[str], parts: dict[str, gu.ImageSet]) -> tuple[Sides, dict[str, gu.ImageSet]]:
    """({encoder: {part: {direction: (queries, gallery, for each query the rows of the gallery to find)}}}, {part:
    its images}).

    Each text of a part stands there once, with all images that carry it. Images that cannot be read are left out of their
    part, for all encoders. Raises ValueError for an encoder without a text tower, and for two of one name.
    """
    texts, images_of, embedded, told, sides = {}, {}, {part: {} for part in parts}, {part: {} for part in parts}, {}
    for encoder in benchmark.load_each(encoders):
        if not encoder.has_text:
            raise ValueError(f"{encoder.name} encodes images only; here texts ask, and are asked")
        for part, images in parts.items():
            texts[part] = image_set.text_queries(images)[0]
            told[part][encoder.name] = gu.embed_texts(encoder, texts[part])
            embedded[part][encoder.name] = gu.embed_images(encoder, images)
    for part, images in parts.items():
        vectors, found = benchmark.keep_common(embedded[part], images)
        images_of[part] = found
        kept, carried_by = image_set.text_queries(found)
        number, asked = {text: row for row, text in enumerate(kept)}, np.isin(texts[part], kept)
        carries = [np.array([number[t] for t in dict.fromkeys(own) if t in number], int) for own in found.captions]
        for name, queries in told[part].items():
            both = (queries[asked], vectors[name], carried_by), (vectors[name], queries[asked], carries)
            sides.setdefault(name, {})[part] = dict(zip(DIRECTIONS, both, strict=True))
    return sides, images_of
