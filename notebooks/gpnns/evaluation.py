"""What an encoder scores in search by image and by text: one way for all notebooks (02 to 08)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import gpnns_utils as gu
from gpnns.images import image_set, splitting

Array = np.ndarray
IMAGES, TEXTS = "image to image", "text to image"


def evaluate(
    encoder: gu.Encoder,
    queries: gu.ImageSet | None = None,
    gallery: gu.ImageSet | None = None,
    captioned: gu.ImageSet | None = None,
    recall_at: int = 0,
    find_bias: Callable[[Array], Array] | None = None,
    cache: bool = True,
) -> dict[str, gu.Score]:
    """The scores of an encoder, one value per query, by task: {"image to image": ..., "text to image": ...}.

    image to image: mAP of finding the class of each of `queries` in `gallery`, or without one among all other queries;
    `*load_splits(...).validation` are the two of either question. text to image: mAP of the captions of `captioned` among
    its images or, with recall_at, R@k; missing where there are no captions or no text tower. find_bias: from the embeddings
    of the images to what is subtracted from their scores (`gu.hub_bias`). A query that cannot be embedded, or has nothing
    to find, is NaN and does not count. cache=False for a model that changes with every step.
    """
    scores = {}
    if encoder.model is not None:
        encoder.model.eval()
    if queries is not None:
        scores[IMAGES] = gu.mean_average_precision(rank_images(encoder, queries, gallery, cache))
    if captioned is not None and encoder.has_text and any(captioned.captions or []):
        ranks = rank_texts(encoder, captioned, find_bias, cache)
        scores[TEXTS] = gu.recall_at_k(ranks, recall_at) if recall_at else gu.mean_average_precision(ranks)
    return scores


def score_on_test(
    encoder: gu.Encoder, splits: splitting.Splits, recall_at: int = 5
) -> tuple[gu.Score, gu.Score | None]:
    """`evaluate` on the test of an open question: (image to image mAP, text to image R@k; None without a text tower)."""
    scores = evaluate(encoder, splits.test[0], captioned=splits.text_test, recall_at=recall_at)
    return scores[IMAGES], scores.get(TEXTS)


def rank_images(
    encoder: gu.Encoder, queries: gu.ImageSet, gallery: gu.ImageSet | None = None, cache: bool = True
) -> Array:
    """The ranks of all images of a query's class, (queries, r) as `gu.rank_relevant` gives them, inf for a query that cannot
    be embedded. Without a gallery the queries search each other, and each leaves itself out."""
    embeddings, asked = gu.embed_images(encoder, queries, cache=cache)
    searched, found, own = embeddings, asked, np.arange(len(asked))[:, None]
    if gallery is not None and gallery is not queries:
        (searched, found), own = gu.embed_images(encoder, gallery, cache=cache), None
    ranks = gu.rank_relevant(embeddings, searched, gu.same_label(asked.labels, found.labels), leave_out=own)
    whole = np.full((len(queries), ranks.shape[1]), np.inf)
    whole[np.isin(queries.rows, asked.rows)] = ranks
    return whole


def rank_texts(
    encoder: gu.Encoder,
    captioned: gu.ImageSet,
    find_bias: Callable[[Array], Array] | None = None,
    cache: bool = True,
) -> Array:
    """The ranks of all images that carry a caption, for each caption of a set (`image_set.text_queries`), (texts, r)."""
    embeddings, found = gu.embed_images(encoder, captioned, cache=cache)
    texts, relevant = image_set.text_queries(captioned)
    there = np.isin(captioned.rows, found.rows)
    place = np.cumsum(there) - 1  # of each image among those that could be embedded
    relevant = [place[rows[there[rows]]] for rows in relevant]
    bias = None if find_bias is None else find_bias(embeddings)
    return gu.rank_relevant(gu.embed_texts(encoder, texts, cache=cache), embeddings, relevant, bias=bias)
