"""What an encoder scores (notebooks 03 to 05, 08)."""

from __future__ import annotations

import numpy as np

import gpnns_utils as gu
from gpnns.images import image_set, splitting


def image_to_image(
    encoder: gu.Encoder, images: gu.ImageSet, gallery: gu.ImageSet | None = None, cache: bool = False
) -> gu.Score:
    """mAP of finding an image's class in a gallery, or without one among all other images; what has nothing to find does
    not count. `*load_splits(...).validation` are the two sets of either question. cache: keep the embeddings, which pays
    once the encoder is trained."""
    if encoder.model is not None:
        encoder.model.eval()
    embeddings = gu.embed_images(encoder, images, cache=cache)
    gallery = images if gallery is None else gallery
    searched = embeddings if gallery is images else gu.embed_images(encoder, gallery, cache=cache)
    own = np.arange(len(images))[:, None] if gallery is images else None
    relevant = gu.same_label(images.labels, gallery.labels)
    return gu.mean_average_precision(gu.rank_relevant(embeddings, searched, relevant, leave_out=own))


def scores_of(encoder: gu.Encoder, splits: splitting.Splits) -> dict[str, gu.Score]:
    """What an encoder scores on the test of an open question, one value per query: mAP of image to image and, where there
    are captions and a text tower, of text to image."""
    found, told = {"image to image": image_to_image(encoder, splits.test[0], cache=True)}, splits.text_test
    images = gu.embed_images(encoder, told)  # takes files that cannot be read out of `told`
    texts, relevant = image_set.text_queries(told)
    if texts and encoder.text_tower:
        ranks = gu.rank_relevant(gu.embed_texts(encoder, texts), images, relevant)
        found["text to image"] = gu.mean_average_precision(ranks)
    return found


def place(encoder: gu.Encoder, splits: splitting.Splits) -> tuple[gu.Score, gu.Score | None]:
    """Where an encoder stands in the plots of notebooks 04 and 05, on the test of an open question: image to image mAP, and
    text to image R@5, None for an encoder without a text tower."""
    told = splits.text_test
    texts, relevant = image_set.text_queries(told)
    found, images = image_to_image(encoder, splits.test[0], cache=True), gu.embed_images(encoder, told)
    if encoder.text_tower is None:
        return found, None
    return found, gu.recall_at_k(gu.rank_relevant(gu.embed_texts(encoder, texts), images, relevant), 5)
