"""What trainings read (notebooks 03 and 04): views of labelled images, images with captions, pairs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import transforms

import gpnns_utils as gu
from gpnns.encoders.encoder import describe_transform
from gpnns.images import image_set


def make_training_transform(
    encoder: gu.Encoder, flip: float = 0.5, jitter: float = 0.4, views: str = "crop"
) -> transforms.Compose:
    """Random views for training, scaled as the encoder scales its pixels.

    views: "crop", as GP-NNS makes them: a square of 1.125 times the size, of which a random crop is taken; or
    "autoaugment", as GUIE's fourth place: torchvision's policy for ImageNet, then squashed to the size. Then mirrored with
    probability `flip`, brightness, contrast and saturation changed by up to `jitter`.
    """
    size, bicubic = encoder.image_size, transforms.InterpolationMode.BICUBIC
    known = getattr(encoder.preprocess, "transforms", None)
    if known is None:
        raise ValueError(f"how {encoder.name} scales its pixels is not known; write a transform for its training views")
    first = {
        "crop": [transforms.Resize((int(1.125 * size),) * 2, bicubic), transforms.RandomCrop(size)],
        "autoaugment": [transforms.AutoAugment(), transforms.Resize((size, size), bicubic)],
    }
    if views not in first:
        raise ValueError(f"views is one of {', '.join(first)}, not {views!r}")
    return transforms.Compose([
        *first[views],
        transforms.RandomHorizontalFlip(flip),
        transforms.ColorJitter(jitter, jitter, jitter),
        transforms.ToTensor(),
        *[step for step in known if isinstance(step, transforms.Normalize)],
    ])  # fmt: skip


class Captions(NamedTuple):
    """What MCIP adds to a training on classes: captions of the images, and how the loss of these counts."""

    rows: np.ndarray  # (n, top) int64 into `texts`, -1 for none
    texts: Sequence[str]
    vectors: np.ndarray  # their unit embeddings float32 (m, d), of the text tower, which stays as it is
    caption_weight: float = 0.25  # share of the caption loss in the total
    caption_scale: float = 30.0  # of `multi_caption_loss`
    shared_captions: str = "right"  # of `batch_captions`


class TrainingImages(Dataset):
    """(view, class number) by row, with captions also the rows (top,) of the image's captions; class numbers run from 0. Raises
    ValueError for a file that cannot be read."""

    def __init__(
        self, images: gu.ImageSet, transform: Callable[[Image.Image], torch.Tensor], captions: Captions | None = None
    ):
        if images.labels is None:
            raise ValueError(f"{images.name} {image_set.NO_LABELS}")
        self.images, self.transform, self.captions = images, transform, captions
        self.names, self.labels = np.unique(images.labels, return_inverse=True)
        if len(self.names) < 2:
            raise ValueError(f"{images.name} has only one class; fine-tuning tells classes apart, so add another")

    def __len__(self) -> int:
        return len(self.images)

    def describe(self) -> bytes:
        """All that decides what is learned: the images' content, whatever their files are called, labels, captions, and how
        views are made."""
        told = self.captions.rows.tobytes() + repr(self.captions.texts).encode() if self.captions else b""
        views = describe_transform(self.transform).encode()
        return b"".join(self.images.digests()) + self.labels.tobytes() + views + told

    def __getitem__(self, row: int) -> tuple:
        try:
            image = self.images[row]
        except Exception as error:
            raise ValueError(
                f"cannot read {self.images.describe(row)} ({type(error).__name__}); use the images that `embed_images` gives back"
            ) from error
        item = self.transform(image), int(self.labels[row])
        return (*item, self.captions.rows[row]) if self.captions else item


class CaptionPairs(Dataset):
    """(image feature, tokens of one of its captions, that caption's number) by row; features: (n, d) unit rows."""

    def __init__(self, features: np.ndarray, captions: Sequence[Sequence[str]], tokenizer: Callable):
        self.features, self.captions = torch.as_tensor(features), captions
        self.numbers = {text: i for i, text in enumerate(sorted({text for texts in captions for text in texts}))}
        self.tokens = functools.lru_cache(100_000)(lambda text: tokenizer([text])[0])

    def __len__(self) -> int:
        return len(self.captions)

    def describe(self) -> bytes:
        return self.features.numpy().tobytes() + repr(self.captions).encode()

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        texts = self.captions[row]
        text = texts[int(torch.randint(len(texts), ()))]
        return self.features[row], self.tokens(text), self.numbers[text]
