"""Heads: a smaller embedding, or the features before CLIP's projection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import gpnns_utils as gu


class EmbeddingHead(torch.nn.Module):
    """A linear map to `dim` numbers, for small embeddings: GUIE allowed 64.

    In training it is the mean over maps of several dropped-out copies of the features ("multi-sample dropout", as in
    G-Universal-CLIP, the 4th place of GUIE).
    """

    def __init__(
        self, width: int, dim: int, dropout: float = 0.1, samples: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5)
    ):
        super().__init__()
        self.linear, self.dropout, self.samples = torch.nn.Linear(width, dim, bias=False), dropout, samples

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.training:  # a linear map of the mean is the mean of the maps, and is computed once
            features = F.dropout(features, self.dropout)
            features = torch.stack([F.dropout(features, share) for share in self.samples]).mean(0)
        return self.linear(features)


class WithoutProjection(torch.nn.Module):
    """An open_clip image tower, `visual`, whose features are not projected: (b, 3, h, w) -> (b, width)."""

    def __init__(self, visual: torch.nn.Module):
        super().__init__()
        self.visual = visual

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        projection, self.visual.proj = self.visual.proj, None  # the way open_clip itself offers
        try:
            return self.visual(batch)
        finally:
            self.visual.proj = projection


class WithHead(torch.nn.Module):
    """A tower, which may be a method of a model, and a head after it."""

    def __init__(self, tower: Callable[[torch.Tensor], torch.Tensor], head: EmbeddingHead):
        super().__init__()
        self.tower, self.head = tower, head

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.head(self.tower(batch))


def add_head(encoder: gu.Encoder, dim: int | None = None, before_projection: bool = False) -> gu.Encoder:
    """The same model, with another image embedding: through a new linear head of size `dim`, and/or before_projection,
    the features that CLIP would project into the space it shares with text (GP-NNS and GUIE's 2nd place use those).

    The result embeds no texts: its images no longer live where texts do. ValueError where it cannot be done.
    """
    model, tower, width = encoder.model, encoder.image_tower, encoder.dim
    if dim is not None and (not isinstance(dim, (int, np.integer)) or isinstance(dim, bool) or dim < 1):
        raise ValueError(f"a head gives 1 number or more, not {dim!r}; None for no head")
    dim = None if dim is None else int(dim)
    if model is None:
        raise ValueError(f"{encoder.name} has no weights, so a head cannot be trained with it")
    if hasattr(model, "embedding_head"):
        raise ValueError(f"{encoder.name} already has a head; start from an encoder without one")
    if before_projection:
        visual = getattr(model, "visual", model)
        if getattr(visual, "proj", None) is None:
            raise ValueError(f"{encoder.name} has no projection to leave out; choose before_projection=False")
        width, tower = len(visual.proj), WithoutProjection(visual)
    if dim:
        model.embedding_head = EmbeddingHead(width, dim).to(encoder.device).train(model.training)
        tower = WithHead(tower, model.embedding_head)
    before_projection = before_projection or encoder.origin.get("before_projection", False)
    origin = encoder.origin | {"before_projection": before_projection, "head": dim}
    return gu.Encoder(encoder.name, encoder.preprocess, tower, None, encoder.device, model, origin)


def embed_as_in_paper(encoder: gu.Encoder, one_embedding: bool = False) -> gu.Encoder:
    """The encoder for images as GP-NNS trains and evaluates it: features before CLIP's projection of `crop_square`, and
    for OpenAI's weights the mean and deviation of ImageNet's pixels instead of CLIP's.

    one_embedding: the embedding that it shares with text, and its own mean and deviation, so that the same encoder
    serves both. One that has a head, or leaves the projection out already, keeps its features. GP-NNS's own release
    stays as it is, and so does what has no weights or an unknown preprocessing.
    """
    from torchvision import transforms

    steps = getattr(encoder.preprocess, "transforms", [])
    norm = next((step for step in steps if isinstance(step, transforms.Normalize)), None)
    if encoder.name.startswith("gpnns:") or norm is None:
        return encoder
    if encoder.origin.get("encoder", "").endswith("/openai") and not one_embedding:
        norm = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    its_own = one_embedding or encoder.origin.get("before_projection") or encoder.origin.get("head")
    if getattr(getattr(encoder.model, "visual", None), "proj", None) is not None and not its_own:
        encoder = add_head(encoder, before_projection=True)
    preprocess = crop_square(encoder.image_size, norm.mean, norm.std, transforms.InterpolationMode.BICUBIC)
    return replace(encoder, preprocess=preprocess)


def crop_square(size: int, mean: Sequence[float], std: Sequence[float], interpolation: Any) -> Callable:
    """GP-NNS's preprocessing: the centre of a picture squeezed to a square of 1.125 times the size, (3, size, size)."""
    from torchvision import transforms

    square = transforms.Resize((int(1.125 * size),) * 2, interpolation)
    steps = [square, transforms.CenterCrop(size), transforms.ToTensor(), transforms.Normalize(mean, std)]
    return transforms.Compose(steps)
