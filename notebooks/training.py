"""Fine-tuning: the margin loss, views to train on, and one loop that a killed run goes on with.

Reached as `gpnns_utils.training`, which loads it when it is first named: whoever only searches never imports it.

the margin -> other losses -> data -> captions -> what is trained -> a whole fine-tuning -> the loop -> several processes
-> its parts
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import accelerate
import cloudpickle
import matplotlib.pyplot as plt
import numpy as np
import open_clip
import timm
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast, broadcast_object_list, gather_object, recursively_apply, send_to_device
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, default_collate
from torchvision import transforms

import gpnns_utils as gu

LARGE_RATE, LARGE_MODEL = 1e-4, 20e6  # such a rate makes so many pretrained weights forget
SHARED_WITHIN = 30.0  # seconds in which a file of one node must be seen by the others: network folders are slow

# --- the margin ------------------------------------------------------------------------------------------------------


def arc_margin(cosines: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
    """cos(angle + margin): what remains of a cosine when `margin` (radians) is added to its angle.

    Past an angle of pi - margin, where that would rise again, it goes on as cos - margin * sin(margin). Source: ArcFace
    (1801.07698), section 3.1; the second branch is that of its public code, which GP-NNS uses.
    """
    sines = ((1 - cosines) * (1 + cosines)).clamp_min(1e-7).sqrt()  # the slope of a root at 0 is infinite
    shifted = cosines * torch.cos(margin) - sines * torch.sin(margin)
    return torch.where(cosines > -torch.cos(margin), shifted, cosines - margin * torch.sin(margin))


class ArcMargin(torch.nn.Module):
    """Softmax over the angles between an embedding and one proxy per class, made harder for the own class by a margin.

    forward(embeddings (n, dim), labels int64 (n,)) -> the mean loss, computed in float32 whatever comes in. Source:
    ArcFace (1801.07698); GP-NNS trains with scale 30 and margin 0.1 radians, and proxies xavier_uniform.

    margin: one number, or one per class. centers: proxies per class, of which the nearest counts (sub-center ArcFace).
    start: (classes, dim) directions to start from, such as `class_means`. sampled: compare with the classes of the
    batch and about this many others only (Partial FC, 2010.05222); time and memory of the loss then do not depend on
    the number of classes. AdamW still updates every proxy: about 0.7 CPU seconds a step for 100,000 classes x 512.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        scale: float = 30.0,
        margin: float | Sequence[float] = 0.1,
        centers: int = 1,
        sampled: int | None = None,
        start: np.ndarray | None = None,
    ):
        super().__init__()
        if classes < 2:
            raise ValueError(f"a margin needs at least two classes to lie between, not {classes}")
        if np.ndim(margin) and np.shape(margin) != (classes,):
            raise ValueError(f"margin has the shape {np.shape(margin)}; give one number, or one for each of {classes}")
        if not (np.isfinite(margin).all() and np.min(margin) >= 0 and np.max(margin) <= np.pi / 2):
            raise ValueError(
                f"margin={margin} is no angle in radians from 0 to {np.pi / 2:.2f}; 20 degrees are {np.radians(20):.2f}, and "
                "papers have 0.1 to 0.5"
            )
        if not 0 < scale < math.inf:
            raise ValueError(f"scale={scale} sharpens no softmax; papers have 20 to 64")
        if start is not None and np.shape(start) != (classes, dim):
            raise ValueError(f"start has the shape {np.shape(start)}, not ({classes}, {dim})")
        self.dim, self.classes, self.scale, self.centers, self.sampled = dim, classes, scale, centers, sampled
        self.proxies = torch.nn.Parameter(torch.nn.init.xavier_uniform_(torch.empty(classes, centers * dim)))
        if start is not None:
            directions = F.normalize(torch.as_tensor(start, dtype=torch.float32)).repeat(1, centers)
            with torch.no_grad():  # a tenth of the random start stays, so that centers differ
                length = self.proxies.norm(dim=1).mean() / centers**0.5
                self.proxies.mul_(0.1).add_(length * directions)
        self.register_buffer("margin", torch.as_tensor(margin, dtype=torch.float32))
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if ((labels < 0) | (labels >= self.classes)).any():
            raise ValueError(f"labels go from 0 to {self.classes - 1} here, not {labels.min()} to {labels.max()}")
        with torch.autocast(embeddings.device.type, enabled=False):  # half precision would round the margin away
            margin = self.margin[labels] if self.margin.ndim else self.margin
            proxies = self.proxies
            if self.sampled and self.training:
                rows, labels = self.draw(labels)
                proxies = proxies[rows]
            proxies = proxies.reshape(-1, self.dim)
            logits = F.linear(self.scale * F.normalize(embeddings.float()), proxies)
            logits = logits / proxies.norm(dim=1).clamp_min(1e-12)  # cheaper than making every proxy a unit vector
            if self.centers > 1:
                logits = logits.view(len(logits), -1, self.centers).max(dim=2).values
            own = torch.arange(len(labels), device=labels.device), labels
            logits[own] = self.scale * arc_margin(logits[own] / self.scale, margin)
            return F.cross_entropy(logits, labels)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.classes}, scale={self.scale}, centers={self.centers}, sampled={self.sampled}"

    def draw(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The classes that take part in this step, the same in every process, and where `labels` stand among them."""
        present = accelerate.utils.gather(labels) if torch.distributed.is_initialized() else labels
        random = torch.Generator().manual_seed(int(self.draws))  # counted, so that a resumed run draws the same
        self.draws += 1
        others = torch.randint(self.classes, (self.sampled,), generator=random).to(labels.device)
        rows = torch.unique(torch.cat([present, others]))
        return rows, torch.searchsorted(rows, labels)


def class_means(embeddings: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean embedding of each class, classes in ascending order: where a proxy may start (classes, d)."""
    _, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), embeddings.shape[1]), dtype=np.float64)
    np.add.at(sums, numbers, embeddings)
    return (sums / counts[:, None]).astype(np.float32)


# --- other losses ----------------------------------------------------------------------------------------------------


class Softmax(torch.nn.Module):
    """The plain softmax that GP-NNS compares with: dot products as they are, no unit vectors, no scale, no margin.

    start: (classes, dim) directions of the first proxies. forward as in ArcMargin.
    """

    def __init__(self, start: np.ndarray):
        super().__init__()
        self.proxies = torch.nn.Parameter(F.normalize(torch.as_tensor(start, dtype=torch.float32)))

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(embeddings.float(), self.proxies), labels)


class ProxyAnchor(torch.nn.Module):
    """Each proxy of a batch's classes pulls its own images and pushes all others, by soft maxima over the batch.

    start: (classes, dim) directions of the first proxies. Source: Proxy Anchor (2003.13911), equation 4; margin 0.1 and,
    as in GP-NNS, sharpness sqrt(dim). forward as in ArcMargin.
    """

    def __init__(self, start: np.ndarray, margin: float = 0.1):
        super().__init__()
        self.proxies = torch.nn.Parameter(torch.as_tensor(start, dtype=torch.float32).clone())
        self.margin, self.sharpness = margin, start.shape[1] ** 0.5

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        cosines = F.linear(F.normalize(embeddings.float()), F.normalize(self.proxies))
        own = F.one_hot(labels, len(self.proxies)).bool()
        pull = torch.where(own, -self.sharpness * (cosines - self.margin), -torch.inf)
        push = torch.where(own, -torch.inf, self.sharpness * (cosines + self.margin))
        return F.softplus(pull[:, own.any(dim=0)].logsumexp(0)).mean() + F.softplus(push.logsumexp(0)).mean()


def margins_by_count(counts: np.ndarray, low: float = 0.05, high: float = 0.5) -> np.ndarray:
    """A margin per class, from `high` for the rarest to `low` for the most frequent, by counts ** -1/4. Source: the code of
    GUIE's fourth place (2210.11141)."""
    rarity = np.asarray(counts, dtype=float) ** -0.25
    spread = rarity.max() - rarity.min()
    return low + (high - low) * (rarity - rarity.min()) / (spread or 1)


# --- data ------------------------------------------------------------------------------------------------------------


def training_transform(
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


class TrainingImages(Dataset):
    """(view, class number) by row; class numbers run from 0. Raises ValueError for a file that cannot be read."""

    def __init__(self, images: gu.ImageSet, transform: Callable[[Image.Image], torch.Tensor]):
        if images.labels is None:
            raise ValueError(f"{images.name} {gu.datasets.NO_LABELS}")
        self.images, self.transform = images, transform
        self.names, self.labels = np.unique(images.labels, return_inverse=True)
        if len(self.names) < 2:
            raise ValueError(f"{images.name} has only one class; fine-tuning tells classes apart, so add another")

    def __len__(self) -> int:
        return len(self.images)

    def describe(self) -> bytes:
        """All that decides what is learned: the images' content, whatever their files are called, labels, and how views
        are made."""
        return b"".join(self.images.digests()) + self.labels.tobytes() + gu.encoders.described(self.transform).encode()

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        try:
            image = self.images[row]
        except Exception as error:
            raise ValueError(
                f"cannot read {self.images.describe(row)} ({type(error).__name__}); `embed_images` takes such files out of a set"
            ) from error
        return self.transform(image), int(self.labels[row])


class Repeatable(Dataset):
    """A dataset in which an item's randomness depends on (seed, draw, row) alone, not on workers or earlier items."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        draw, row = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix(self.seed, draw, row))
            return row, self.dataset[row]


def as_arrays(items: list) -> list:
    """The items of a batch with arrays in place of tensors, as `from_workers` sends them."""
    return recursively_apply(torch.Tensor.numpy, items)


def mix(*numbers: int) -> int:
    """One seed from several numbers: their tuple's hash, which is fast and the same in every process."""
    return hash(numbers) % 2**32


def batches(
    count: int, size: int, first: int, last: int, seed: int, balance: np.ndarray | None, part: int, parts: int
) -> Iterator[list[tuple[int, int]]]:
    """(draw, row) of every image in batches number `first` to `last`: a pure function of the seed. The draw, mostly the
    epoch, tells views of an image apart.

    balance: labels; classes are then drawn equally often, whatever their size. part, parts: one process's share.
    """
    weights = None
    if balance is not None:
        _, numbers, counts = np.unique(balance, return_inverse=True, return_counts=True)
        weights = 1 / counts[numbers] / len(counts)
    shuffled, order = None, np.empty(0, dtype=int)
    for number in range(first, last):
        epoch, place = divmod(number, count // size)
        if epoch != shuffled:
            random, shuffled = np.random.default_rng([seed, epoch]), epoch
            order = random.permutation(count) if weights is None else random.choice(count, count, p=weights)
        places = range(place * size, (place + 1) * size)[part::parts]
        # Balanced drawing repeats images within an epoch: each time they shall look different.
        yield [(epoch if weights is None else epoch * count + i, int(order[i])) for i in places]


# --- captions --------------------------------------------------------------------------------------------------------


def multi_caption_loss(
    embeddings: torch.Tensor, captions: torch.Tensor, own: torch.Tensor, scale: float = 30.0, margin: float = 0.1
) -> torch.Tensor:
    """MCIP's loss of images (n, d) among unit captions (m, d), own: bool (n, m), which captions belong to which image.

    A softmax over all captions of the batch, the own ones made harder by a margin, against equal shares for them; plus a
    tenth of the largest -log share of a caption, each times what its target lacks to 1: mostly that of the farthest caption
    of another image, which is thereby pulled back a little. An image without captions has this last term alone. Source:
    2409.01936, MCArcMargin.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        if own.shape[1] == 0:
            return 0.0 * embeddings.float().sum()
        cosines = F.linear(F.normalize(embeddings.float()), captions.float())
        harder = arc_margin(cosines, torch.tensor(margin, device=cosines.device))
        surprise = -F.log_softmax(scale * torch.where(own, harder, cosines), dim=1)
        target = own / own.sum(dim=1, keepdim=True).clamp(min=1)
        return ((target * surprise).sum(dim=1) + 0.1 * ((1 - target) * surprise).amax(dim=1)).mean()


SHARED = ("right", "wrong")  # what another image's copy of a caption is to an image that has it too


def batch_captions(rows: torch.Tensor, shared: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """The captions of a batch, rows (m,) of the bank, and which image has which, bool (n, m); rows: (n, top) int64, -1 for
    none. A caption of two images is one that belongs to both or, with shared="wrong", two of which each has one: so do the
    originals of MCIP and CLIP, to which the other's copy is a wrong answer."""
    image, place = torch.nonzero(rows >= 0, as_tuple=True)
    if shared == "wrong":
        return rows[image, place], image == torch.arange(len(rows), device=rows.device)[:, None]
    columns, where = rows[image, place].unique(return_inverse=True)
    own = torch.zeros(len(rows), len(columns), dtype=torch.bool, device=rows.device)
    own[image, where] = True
    return columns, own


class CaptionedImages(TrainingImages):
    """(view, class number, rows of its captions) by row; rows: (n, top) int64 into `texts`, -1 for none."""

    def __init__(self, images: gu.ImageSet, transform: Callable, rows: np.ndarray, texts: Sequence[str]):
        super().__init__(images, transform)
        self.rows, self.texts = rows, texts

    def describe(self) -> bytes:
        return super().describe() + self.rows.tobytes() + repr(self.texts).encode()

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int, np.ndarray]:
        return *super().__getitem__(row), self.rows[row]


def info_nce(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """CLIP's loss of unit rows (n, d), both directions; pairs with equal caption numbers (n,) are right for each other."""
    logits = scale * images @ texts.T
    right = (numbers[:, None] == numbers).float()
    right = right / right.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


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


# --- what is trained -------------------------------------------------------------------------------------------------


class ImageObjective(torch.nn.Module):
    """What `fit` makes small: loss(embeddings of a batch of images, their class numbers)."""

    def __init__(self, encoder: gu.Encoder, loss: torch.nn.Module):
        super().__init__()
        if encoder.model is None:
            raise ValueError(f"{encoder.name} has no weights to train; choose mini, open_clip:... or timm:...")
        self.encoder, self.model, self.loss = encoder, encoder.model, loss

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.loss(self.encoder.image_tower(images), labels)


class CaptionObjective(ImageObjective):
    """MCIP: `loss` on classes and the caption loss on one embedding; captions: (m, d) unit rows of the frozen text tower,
    weight: the caption loss's share of the total, from 0 to 1. shared: of `batch_captions`."""

    def __init__(
        self,
        encoder: gu.Encoder,
        loss: torch.nn.Module,
        captions: np.ndarray,
        weight: float,
        scale: float = 30.0,
        shared: str = "right",
    ):
        super().__init__(encoder, loss)
        self.captions, self.weight, self.scale, self.shared = torch.from_numpy(captions), weight, scale, shared

    def forward(self, images: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        embeddings = self.encoder.image_tower(images)
        columns, own = batch_captions(rows, self.shared)
        captions = self.captions[columns.cpu()].to(embeddings.device)
        words = multi_caption_loss(embeddings, captions, own, self.scale)
        return (1 - self.weight) * self.loss(embeddings, labels) + self.weight * words


class Realignment(torch.nn.Module):
    """2SFT's second stage: InfoNCE between fixed image features and captions, which are encoded `chunk` at a time, so that
    only so many texts' activations are in memory (GradCache, 2101.06983). shared: of `batch_captions`."""

    def __init__(self, model: torch.nn.Module, chunk: int = 1024, shared: str = "right"):
        super().__init__()
        self.model, self.chunk, self.shared = model, chunk, shared

    def forward(self, features: torch.Tensor, tokens: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        encode, parts = self.model.encode_text, tokens.split(self.chunk)
        texts = [encode(part) if len(parts) == 1 else checkpoint(encode, part, use_reentrant=False) for part in parts]
        numbers = torch.arange(len(numbers), device=numbers.device) if self.shared == "wrong" else numbers
        with torch.no_grad():  # as CLIP: a scale of at most 100
            self.model.logit_scale.clamp_(0, math.log(100))
        with torch.autocast(features.device.type, enabled=False):
            texts, scale = F.normalize(torch.cat(texts).float()), self.model.logit_scale.float().exp()
            return info_nce(features.float(), texts, scale, numbers)


def text_parameters(model: torch.nn.Module, rate: float, weight_decay: float = 0.2, **adam) -> list[dict]:
    """Groups for `fit` of the end of an open_clip model's text tower: last block, final norm, projection, and the scale.
    adam: betas and eps of AdamW."""
    model.lock_text_tower(unlocked_layers=2)
    text = [(name, value) for name, value in model.named_parameters() if not name.startswith(("visual.", "logit_"))]
    text = [value for _, value in text if value.requires_grad]
    large = {"params": [value for value in text if value.ndim > 1], "lr": rate, "weight_decay": weight_decay}
    small = {
        "params": [value for value in text if value.ndim <= 1] + [model.logit_scale],
        "lr": rate,
        "weight_decay": 0.0,
    }
    return [large | adam, small | adam]


def image_parameters(
    encoder: gu.Encoder, rate: float, layer_decay: float = 1.0, weight_decay: float = 0.01
) -> list[dict]:
    """Groups for `fit` of all that takes part in embedding an image; the text tower is not among them and stays as it is.

    layer_decay: each block learns this many times as fast as the one after it (timm's rule; patch and position
    embeddings count as the lowest). Biases and norms do not decay. A head of `add_head` is not among them: it is new,
    and learns at a rate of its own.
    """
    if encoder.model is None:
        raise ValueError(f"{encoder.name} has no weights to train")
    tower = getattr(encoder.model, "visual", encoder.model)
    skipped = ("embedding_head", "proj") if encoder.origin.get("before_projection") else ("embedding_head",)
    trunk = getattr(tower, "trunk", tower)  # open_clip keeps timm's models in `trunk`
    order = {}
    if hasattr(trunk, "transformer"):  # open_clip's own ViT
        stem = r"(?:conv1|class_embedding|positional_embedding|ln_pre)"
        order = {"stem": stem, "blocks": r"transformer\.resblocks\.(\d+)"}
    matcher = getattr(trunk, "group_matcher", None)
    if layer_decay != 1 and not (matcher or order):
        raise ValueError(f"the order of the layers of {encoder.name} is not known; choose layer_decay=1")
    parameters = [(key, value) for key, value in tower.named_parameters() if not key.startswith(skipped)]
    taking_part = [(key.removeprefix("trunk."), value) for key, value in parameters]
    for _, value in taking_part:
        value.requires_grad_()  # an earlier stage may have frozen it
    layers = SimpleNamespace(group_matcher=matcher or (lambda coarse: order), named_parameters=lambda: taking_part)
    groups = param_groups_layer_decay(layers, weight_decay, layer_decay=layer_decay)
    return [{"weight_decay": weight_decay} | group | {"lr": rate} for group in groups]


def drop_patches(encoder: gu.Encoder, share: float) -> bool:
    """Let a ViT see only a random part of the patches while it trains (FLIP, 2212.00794): faster by about as much.

    False where the model has no patches; nothing is changed then.
    """
    tower = getattr(encoder.model, "visual", encoder.model)
    tower = getattr(tower, "trunk", tower)
    own, layer = "patch_dropout", open_clip.transformer.PatchDropout(share)  # open_clip's ViT
    if not hasattr(tower, own):  # timm's; some of its models (EVA) have a patch_drop of another kind
        own, layer = "patch_drop", timm.layers.PatchDropout(share, getattr(tower, "num_prefix_tokens", 1))
    if not isinstance(getattr(tower, own, None), (torch.nn.Identity, type(layer))):
        return False
    setattr(tower, own, layer.train(tower.training) if share else torch.nn.Identity())
    return True


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


def scores_of(encoder: gu.Encoder, splits: gu.datasets.Splits) -> dict[str, gu.Score]:
    """What an encoder scores on the test of an open question, one value per query: mAP of image to image and, where there
    are captions and a text tower, of text to image."""
    found, told = {"image to image": image_to_image(encoder, splits.test[0], cache=True)}, splits.text_test
    images = gu.embed_images(encoder, told)  # takes files that cannot be read out of `told`
    texts, relevant = gu.text_queries(told)
    if texts and encoder.text_tower:
        ranks = gu.rank_relevant(gu.embed_texts(encoder, texts), images, relevant)
        found["text to image"] = gu.mean_average_precision(ranks)
    return found


def place(encoder: gu.Encoder, splits: gu.datasets.Splits) -> tuple[gu.Score, gu.Score | None]:
    """Where an encoder stands in the plots of notebooks 04 and 05, on the test of an open question: image to image mAP, and
    text to image R@5, None for an encoder without a text tower."""
    told = splits.text_test
    texts, relevant = gu.text_queries(told)
    found, images = image_to_image(encoder, splits.test[0], cache=True), gu.embed_images(encoder, told)
    if encoder.text_tower is None:
        return found, None
    return found, gu.recall_at_k(gu.rank_relevant(gu.embed_texts(encoder, texts), images, relevant), 5)


# --- a whole fine-tuning ---------------------------------------------------------------------------------------------


def fine_tune(
    encoder: gu.Encoder,
    images: gu.ImageSet,
    choose_on: gu.ImageSet | tuple[gu.ImageSet, gu.ImageSet],
    folder: str | Path,
    loss: Callable[[np.ndarray, np.ndarray], torch.nn.Module] | None = None,
    captions: tuple[np.ndarray, Sequence[str], np.ndarray] | None = None,
    *,
    epochs: float = 3.0,
    batch_size: int = 256,
    rate: float = 1e-6,
    proxy_rate: float = 1e-4,
    scale: float = 30.0,
    margin: float | Sequence[float] = 0.1,
    centers: int = 1,
    start: str = "means",
    layer_decay: float = 1.0,
    weight_decay: float = 0.01,
    proxy_decay: float = 0.01,
    warmup: float = 0.0,
    ema: float = 0.0,
    balanced: bool = False,
    patch_dropout: float = 0.0,
    views: str = "crop",
    flip: float = 0.5,
    jitter: float = 0.4,
    protocol: str = "own",
    head: int = 0,
    head_first: float = 0.0,
    frozen_head: bool = False,
    caption_weight: float = 0.25,
    caption_scale: float = 30.0,
    shared_captions: str = "right",
    processes: int = 1,
    embeddings: np.ndarray | None = None,
    **settings,
) -> tuple[gu.Encoder, list[dict]]:
    """Fine-tune the image tower on labelled images: (the encoder, whose model is changed in place, the log of `fit`).

    choose_on: images of other classes, or queries and their gallery, whose mAP chooses the weights to keep. loss: from the class means (classes, dim)
    and the images per class (classes,) to a module; ArcMargin when None. captions: (rows (n, top), -1 for none, texts, unit
    embeddings of the texts) adds MCIP's caption loss, `caption_weight` of the total; shared_captions: of `batch_captions`.
    embeddings: of `images` by the encoder, where they are known. settings: go to `fit`, such as seed, lr_min, accumulate, draw.

    margin: in radians; two of them go to the most and the least frequent classes (`margins_by_count`). start: proxies at
    the mean embeddings of their classes ("means") or at random ("xavier"). layer_decay: of `image_parameters`. warmup:
    below 1 a share of the steps, else their number. ema: decay of an average of the weights, 0 for none. balanced: draw
    every class equally often. protocol: "paper" embeds as `gu.encoders.as_in_paper`. head: size of a linear layer that is
    added, 0 for none, learning with the proxies; head_first: epochs in which only these learn; frozen_head: then they stay.

    The defaults are GP-NNS's recipe for CLIP ViT-B but for `start` ("xavier" there), `protocol` ("paper") and lr_min (1e-7).
    """
    seed = settings.get("seed", 0)
    if encoder.model is None:
        raise ValueError(f"{encoder.name} has no weights to train; choose mini, open_clip:... or timm:...")
    if frozen_head and not head_first:
        raise ValueError("frozen_head keeps what head_first has learned: set head_first to a few epochs")
    if start not in ("means", "xavier"):
        raise ValueError(f"start is means or xavier, not {start!r}")
    if rate > LARGE_RATE and encoder.model and sum(map(torch.numel, encoder.model.parameters())) > LARGE_MODEL:
        warnings.warn(
            f"rate={rate:g} is much for {encoder.name}: papers have 1e-6 to 1e-5 (profile photos)", stacklevel=2
        )
    if protocol not in ("own", "paper"):
        raise ValueError(f"protocol is own or paper, not {protocol!r}")
    if shared_captions not in SHARED:
        raise ValueError(f"shared_captions is one of {', '.join(SHARED)}, not {shared_captions!r}")
    if protocol == "paper":
        encoder = gu.encoders.as_in_paper(encoder)
    torch.manual_seed(seed)
    encoder = gu.add_head(encoder, head) if head else encoder
    transform = training_transform(encoder, flip, jitter, views)
    if embeddings is None:
        embeddings = gu.embed_images(encoder, images)  # takes files that cannot be read out of `images`
    data = TrainingImages(images, transform)
    means, counts = class_means(embeddings, data.labels), np.bincount(data.labels)
    drop_patches(encoder, patch_dropout)  # where it has patches
    torch.manual_seed(seed)
    if loss is None:
        margin = margins_by_count(counts, *margin) if np.ndim(margin) else margin
        first = means if start == "means" else None
        loss = lambda means, _: ArcMargin(encoder.dim, len(means), scale, margin, centers, start=first)  # noqa: E731
    objective = ImageObjective(encoder, loss(means, counts))
    if captions:
        rows, texts, vectors = captions
        data = CaptionedImages(images, transform, rows, texts)
        objective = CaptionObjective(encoder, objective.loss, vectors, caption_weight, caption_scale, shared_captions)
    tower = image_parameters(encoder, rate, layer_decay, weight_decay)
    new = [*objective.loss.parameters(), *(encoder.model.embedding_head.parameters() if head else ())]
    new = {"params": new, "lr": proxy_rate, "weight_decay": proxy_decay}
    size = min(batch_size, len(data))
    settings |= {"batch_size": size, "ema": ema or None, "balance": data.labels if balanced else None}
    if head_first:
        fit_in_processes(processes, objective, data, folder, [new], **settings | {"epochs": head_first, "draw": False})
    steps = round(epochs * (len(data) // size) / settings.get("accumulate", 1))
    settings |= {"epochs": epochs, "warmup": int(warmup * steps if warmup < 1 else warmup)}
    settings = {"save_every": max(100, steps // 20)} | settings
    queries = choose_on if isinstance(choose_on, tuple) else (choose_on,)
    settings["validate"] = lambda: 100 * image_to_image(encoder, *queries).mean
    groups = tower if frozen_head else [*tower, new]
    log = fit_in_processes(processes, objective, data, folder, groups, **settings)
    drop_patches(encoder, 0)
    return encoder, log


def left_by_03(run: gu.Run, encoder: str, images: gu.ImageSet) -> tuple[str, str] | None:
    """The checkpoint of notebook 03, with both towers, as a name for `load_encoder` and words for where it comes from: what 03
    left in the folder of the same profile, if that was tuned from the same encoder and kept the text tower, or for the
    mini CLIP and the drawn world the shipped copy of that. None where there is neither."""
    mine, shipped = run.folder / "03_arcmargin.safetensors", gu.DATA / "mini_tuned" / "arcmargin.safetensors"
    about = gu.datasets.read_json(mine.with_suffix(".json")) if mine.with_suffix(".json").exists() else {}
    other = about.get("head") or about.get("before_projection")
    if mine.exists() and about.get("tuned_from") == encoder and not other:
        return f"{about['encoder']}@{mine}", f"what notebook 03 left in runs/{run.profile}"
    if encoder == "mini" and images.name == "mini train":
        return f"mini@{shipped}", "the copy of notebook 03's encoder that comes with the course"
    return None


def taken_home(
    run: gu.Run, encoder: str, images: gu.ImageSet, choose_on: gu.ImageSet, **settings
) -> tuple[gu.Encoder, str]:
    """The encoder as notebook 03 fine-tunes it, both towers, and where it comes from: `left_by_03`, or trained now, with
    `settings` of `fine_tune`, in the folder in which notebook 03 would train it."""
    if found := left_by_03(run, encoder, images):
        return gu.load_encoder(found[0]), found[1]
    tuned, _ = fine_tune(
        gu.load_encoder(encoder), images, choose_on, run.folder / "03_training", seed=run.seed, **settings
    )
    return tuned, "a fine-tuning on images alone, done now"


def ingredients(
    run: gu.Run,
    encoder: str,
    checkpoints: Sequence[str | Path],
    images: gu.ImageSet,
    choose_on: gu.ImageSet,
    variety: Sequence[dict],
    **settings,
) -> tuple[gu.Encoder, gu.Encoder, dict[str, dict[str, torch.Tensor]]]:
    """What a soup is made of: (the encoder before any fine-tuning, the one that all ingredients start from, the state dict of
    each ingredient by name). Prints where they come from.

    checkpoints: files that were fine-tuned from `encoder`, which is then also their start. Without any, the start is
    `left_by_03` or else the encoder itself, and each entry of `variety`, settings of `fine_tune` that take the place of
    `settings`, becomes an ingredient: trained on three quarters of the classes, drawn anew for each, as GUIE's fourth place
    did. A training that was stopped goes on, a finished one is loaded. Raises ValueError for files that are not two or
    more different ones of one architecture.
    """
    if checkpoints:
        return opened([Path(file).expanduser() for file in checkpoints], encoder)
    spec, source = left_by_03(run, encoder, images) or (encoder, f"{encoder} itself")
    start, states = gu.load_encoder(spec), {}
    vectors = gu.embed_images(start, images)
    for number, change in enumerate(variety):
        part, tuned = three_quarters(images, run.seed, number), gu.load_encoder(spec)
        fine_tune(
            tuned, images.subset(part), choose_on, run.folder / "05_training", embeddings=vectors[part],
            **settings | {"seed": run.seed + number} | change,
        )  # fmt: skip
        states[f"ingredient_{number}"] = {key: value.cpu() for key, value in tuned.model.state_dict().items()}
    print(f"{len(states)} ingredients, trained here; they start from {source}")
    return gu.load_encoder(encoder), start, states


def three_quarters(images: gu.ImageSet, seed: int, number: int) -> np.ndarray:
    """Which images belong to three quarters of the classes (two at least), drawn anew for each number: bool (n,)."""
    classes = np.random.default_rng([seed, number]).permutation(np.unique(images.labels))
    return np.isin(images.labels, classes[: max(2, round(0.75 * len(classes)))])


def opened(files: list[Path], encoder: str) -> tuple[gu.Encoder, gu.Encoder, dict[str, dict[str, torch.Tensor]]]:
    """`ingredients` from files, under the names that the model has for their tensors. A head is new in the files: their start
    gets the mean of theirs, from which none moved."""
    if len({file.resolve() for file in files}) < max(2, len(files)):
        raise ValueError(f"a soup needs two different checkpoints or more, not {', '.join(map(str, files))}")
    noted = gu.checkpoints.checkpoint_settings(files[0])
    encoder = noted.get("tuned_from", noted.get("encoder", encoder)) if encoder == "mini" else encoder
    states = {str(file): gu.load_checkpoint(file) for file in files}
    try:
        start = gu.load_encoder(f"{encoder.partition('@')[0]}@{files[0]}")
        for file, state in states.items():
            gu.encoders.fill(start.model, state, file)
            states[file] = {key: value.cpu().clone() for key, value in start.model.state_dict().items()}
    except ValueError as error:
        hint = "Name what they were fine-tuned from in the parameter encoder, such as open_clip:ViT-B-16/openai"
        raise ValueError(f"{error}. {hint}") from error
    heads = [
        {key: value for key, value in state.items() if key.startswith("embedding_head.")} for state in states.values()
    ]
    gu.encoders.fill(start.model, gu.load_encoder(encoder).model.state_dict() | gu.soups.average(heads), encoder)
    known = {encoder: start.model.state_dict()}
    for file, state in states.items():
        for name, other in known.items():
            if all(torch.equal(state[key].to(value), value) for key, value in other.items()):
                raise ValueError(
                    f"{file} holds the same weights as {name}: leave it out, as nothing was learned between them"
                )
        known[file] = state
    print(f"{len(states)} ingredients from files; their start is {encoder}")
    return start, start, states


def realign(
    encoder: gu.Encoder,
    pairs: gu.ImageSet,
    choose_on: gu.ImageSet,
    folder: str | Path,
    *,
    epochs: float = 3.0,
    batch_size: int = 16384,
    rate: float = 1e-5,
    weight_decay: float = 0.2,
    beta2: float = 0.98,
    eps: float = 1e-6,
    chunk: int = 1024,
    shared_captions: str = "right",
    **settings,
) -> tuple[gu.Encoder, list[dict]]:
    """Fit the end of the text tower to the images as they now are: 2SFT's second stage, on the captions of `pairs`. Returns
    (the encoder, whose text tower is changed in place, the log of `fit`).

    choose_on: captioned images, whose text to image mAP chooses the weights to keep. chunk, shared_captions: of `Realignment`.
    settings: go to `fit`. The defaults are MCIP's, but for shared_captions ("wrong" there) and `epochs`, which it does not
    say. Raises ValueError for an encoder without a text tower.
    """
    if encoder.text_tower is None or encoder.model is None:
        raise ValueError(
            f"{encoder.name} has no text tower to realign; choose mini or an open_clip: encoder, without a head and with "
            "protocol own"
        )
    if shared_captions not in SHARED:
        raise ValueError(f"shared_captions is one of {', '.join(SHARED)}, not {shared_captions!r}")
    features = gu.embed_images(encoder, pairs)  # takes files that cannot be read out of `pairs`
    fixed = gu.embed_images(encoder, choose_on)
    texts, relevant = gu.text_queries(choose_on)
    data = CaptionPairs(features, pairs.captions, encoder.tokenizer)
    if cut := int(gu.captions.is_cut(encoder.tokenizer, list(data.numbers)).sum()):
        print(
            f"{cut:,} of {len(data.numbers):,} captions of {pairs.name} are too long for {encoder.name} and lose their end"
        )

    def validate() -> float:
        encoder.model.eval()
        vectors = gu.embed_texts(encoder, texts, cache=False)
        return 100 * gu.mean_average_precision(gu.rank_relevant(vectors, fixed, relevant)).mean

    groups = text_parameters(encoder.model, rate, weight_decay, betas=(0.9, beta2), eps=eps)
    settings |= {"epochs": epochs, "batch_size": min(batch_size, len(pairs)), "validate": validate}
    return encoder, fit(Realignment(encoder.model, chunk, shared_captions), data, folder, groups, **settings)


# --- the loop --------------------------------------------------------------------------------------------------------


def fit(
    objective: torch.nn.Module,
    dataset: Dataset,
    folder: str | Path,
    groups: list[dict],
    epochs: float = 1,
    batch_size: int = 128,
    accumulate: int = 1,
    warmup: int = 0,
    lr_min: float = 0.0,
    clip: float = 1.0,
    balance: np.ndarray | None = None,
    ema: float | None = None,
    validate: Callable[[], float] | None = None,
    validate_every: int | None = None,
    save_every: int = 500,
    seed: int = 0,
    draw: bool = False,
) -> list[dict]:
    """Train: AdamW, rates on a cosine per step, on one device or several, resumable at any step.

    objective(*batch) is the mean loss of a batch, as the default collation of `dataset`'s items makes it. dataset:
    items by row, and `describe()`, bytes that change when they do. groups: what is trained, as {"params", "lr",
    "weight_decay"}; everything else is frozen and, where a whole module is, in evaluation mode: train in stages by
    calling `fit` once per stage. batch_size: images per batch over all processes; `accumulate` batches make a step.
    warmup: steps in which the rates rise from 0. lr_min: the rate that the cosine ends at. clip: the largest gradient
    norm of each child of the objective. balance: labels by row, to draw classes equally often. ema: decay of an
    average of the weights, which is then validated and kept. validate() -> per cent, higher is better: called every
    `validate_every` steps (default: each epoch), on classes that are not trained on; the best weights are kept,
    without it the last. draw: show the curves while they grow.

    Files go to `folder`/<a hash of settings, first weights, images and loss>: checkpoints, `log.jsonl`, best weights.
    The same call with the same first weights (seed torch before you build the proxies, build everything anew) goes on
    where a killed one stopped, with the same bits on a CPU, and is done at once when it was done.

    Returns the log, also written as JSON lines: step, epoch, loss, rate, gradient, images_per_second, validation.
    Raises ValueError for settings that cannot work, FloatingPointError when the loss is not finite, OSError when a
    checkpoint cannot be written or nodes do not share `folder`; earlier checkpoints stay.
    """
    check_settings(groups, epochs, clip, ema)
    accelerator = start_accelerator(objective, accumulate)
    per_epoch = steps_per_epoch(accelerator, dataset, batch_size)
    steps = max(1, round(epochs * per_epoch))
    validate_every, log_every = validate_every or round(per_epoch), max(1, steps // 100)
    groups = freeze_the_rest(objective, groups)
    settings = [steps, batch_size, accumulate, warmup, lr_min, clip, ema, seed, validate_every]
    settings += [accelerator.mixed_precision, None if balance is None else np.asarray(balance).tolist()]
    if not 0 <= warmup <= steps:
        raise ValueError(f"warmup={warmup} steps do not fit into {steps}; shorten it, or train longer")
    repeatable = Repeatable(dataset, seed)
    folder = Path(folder).expanduser() / training_key(
        objective, repeatable, groups, settings, accelerator.process_index
    )
    check_shared(accelerator, folder)

    optimizer = torch.optim.AdamW(groups)
    schedule = CosineLRScheduler(optimizer, steps, lr_min=lr_min, warmup_t=warmup, t_in_epochs=False)
    average = ModelEmaV3(objective, decay=ema) if ema else None
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    accelerator.register_for_checkpointing(*filter(None, [average]))
    step, log = resume(accelerator, folder)

    first, last = step * accumulate, steps * accumulate
    process, processes = accelerator.process_index, accelerator.num_processes
    share = batches(len(dataset), batch_size, first, last, seed, balance, process, processes)
    workers = gu.datasets.decoders(dataset.images) if isinstance(dataset, TrainingImages) else 0
    loader = gu.datasets.from_workers(repeatable, share, workers, as_arrays)
    progress = gu.Progress(last * batch_size, "training", done=first * batch_size)
    losses, started, picture, drawn = [], time.time(), None, 0.0
    set_training(objective)
    for number, items in enumerate(loader, first):
        rows, batch = default_collate(items)
        schedule.step_update(step)
        torch.manual_seed(mix(seed, number, process))  # a resumed run drops out the same
        with accelerator.accumulate(wrapped):
            loss = wrapped(*send_to_device(batch, accelerator.device))
            losses.append(finite(accelerator, loss, "loss", step, rows, folder))
            accelerator.backward(loss)
        if not accelerator.sync_gradients:
            continue
        gradient = clip_gradients(accelerator, objective, clip)
        if accelerator.mixed_precision != "fp16":  # its scaler skips a step whose gradient overflows
            finite(accelerator, gradient, "gradient", step, rows, folder)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if average:
            average.update(objective)
        checking = validate and (step % validate_every == 0 or step == steps)
        if checking or step % log_every == 0 or step == steps:
            row = {"step": step, "epoch": step / per_epoch, "loss": float(np.mean(losses))}
            row["gradient"] = gradient.item() if torch.isfinite(gradient) else None
            row["rate"] = max(group["lr"] for group in optimizer.param_groups)
            row["images_per_second"] = len(losses) * batch_size / (time.time() - started)
            if checking:
                row["validation"] = validated(accelerator, objective, average, validate, log, folder)
            log.append(row)
            losses, started = [], time.time()
        if accelerator.is_main_process:
            progress.update(step * accumulate * batch_size)
            if log and log[-1]["step"] == step:
                write_log(log, folder)
                if draw and time.time() - drawn > 5:  # a figure takes as long as a step or two
                    picture, drawn = draw_training(log, picture), time.time()
        if step % save_every == 0 or step == steps:
            save_state(accelerator, folder, step)
    if draw and accelerator.is_main_process:
        draw_training(log, picture)
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    accelerator.free_memory()
    if validate:
        with damage_named(folder / "best.safetensors"):
            gu.encoders.fill(objective, load_file(folder / "best.safetensors"), str(folder))
    elif average:
        gu.encoders.fill(objective, average.module.state_dict(), str(folder))
    objective.eval()
    return log


def check_settings(groups: list[dict], epochs: float, clip: float, ema: float | None) -> None:
    """ValueError for settings that would train nothing, or away from the goal."""
    rates = [group.get("lr") for group in groups]
    if wrong := [rate for rate in rates if not isinstance(rate, (int, float)) or not 0 <= rate < math.inf]:
        raise ValueError(f"a learning rate is a number from 0, not {wrong[0]!r}")
    if not 0 < epochs < math.inf:
        raise ValueError(f"epochs={epochs} trains nothing; choose a number above 0")
    if not clip > 0:
        raise ValueError(f"clip={clip} leaves no gradient; choose a number above 0, or math.inf for no limit")
    if ema and not 0 < ema < 1:
        raise ValueError(f"ema={ema} averages no weights; choose a decay between 0 and 1, such as 0.999, or None")


# --- several processes -----------------------------------------------------------------------------------------------


def fit_in_processes(
    processes: int, objective: torch.nn.Module, dataset: Dataset, folder: str | Path, groups: list[dict], **settings
) -> list[dict]:
    """`fit` on several GPUs from within a notebook, each process on one; 0 for all GPUs there are.

    The processes are started anew, so it does no harm that the notebook has used a GPU already; objective, dataset and
    what `validate` reaches are copied to them. Afterwards `fit` finds their training done and loads its weights here.
    """
    processes = processes or max(1, torch.cuda.device_count())
    if processes > 1:
        groups = [{**group, "params": list(group["params"])} for group in groups]
        work = cloudpickle.dumps((objective, dataset, Path(folder).absolute(), groups, settings | {"draw": False}))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(fit_in_process, (processes, port, work), processes)
    return fit(objective, dataset, folder, groups, **settings)


def fit_in_process(rank: int, processes: int, port: int, work: bytes) -> None:
    """One of the processes of `fit_in_processes`; accelerate finds the others by these variables."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    objective, dataset, folder, groups, settings = cloudpickle.loads(work)
    fit(objective, dataset, folder, groups, **settings)
    torch.distributed.destroy_process_group()


# --- its parts -------------------------------------------------------------------------------------------------------


def start_accelerator(objective: torch.nn.Module, accumulate: int) -> accelerate.Accelerator:
    """accelerate for this process, in the precision that the device gains from; all processes get the first's weights."""
    device = next(objective.parameters()).device
    precision = {torch.float16: "fp16", torch.bfloat16: "bf16", None: "no"}[gu.best_precision(device)]
    patience = accelerate.InitProcessGroupKwargs(timeout=timedelta(hours=12))  # others wait while one validates
    accelerator = accelerate.Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=precision,
        gradient_accumulation_steps=accumulate,
        kwargs_handlers=[patience],
    )
    for value in objective.to(accelerator.device).state_dict().values():
        value.copy_(broadcast(value))
    return accelerator


def steps_per_epoch(accelerator: accelerate.Accelerator, dataset: Dataset, batch_size: int) -> float:
    """Steps in which an epoch passes by, a last incomplete batch left out. ValueError where not even one is filled."""
    accumulate, processes = accelerator.gradient_accumulation_steps, accelerator.num_processes
    if len(dataset) < batch_size * accumulate or batch_size % processes:
        raise ValueError(
            f"{len(dataset)} images do not fill one step of {accumulate} x {batch_size}, shared by {processes} processes; "
            "choose a smaller batch_size that is a multiple of the processes"
        )
    return len(dataset) // batch_size / accumulate


def freeze_the_rest(objective: torch.nn.Module, groups: list[dict]) -> list[dict]:
    """Leave to train what `groups` hold, and nothing else; the groups as AdamW takes them, parameters listed."""
    groups = [{**group, "params": list(group["params"])} for group in groups]
    chosen = {id(value) for group in groups for value in group["params"]}
    if not chosen:
        raise ValueError("no group holds a parameter, so there is nothing to train")
    for value in objective.parameters():
        value.requires_grad_(id(value) in chosen)
    return groups


def training_key(
    objective: torch.nn.Module, dataset: Repeatable, groups: list, settings: list, process: int = 0
) -> str:
    """A hash that tells one training from another: settings, first weights, images, labels, and a first loss."""
    names = {id(value): name for name, value in objective.named_parameters()}
    about = [group | {"params": [names.get(id(value)) for value in group["params"]]} for group in groups]
    plain = (bool, int, float, str, tuple, type(None))  # settings that a module keeps to itself, such as dropout rates
    modules = [{k: v for k, v in vars(m).items() if isinstance(v, plain)} for m in objective.eval().modules()]
    digest = hashlib.blake2b(repr([settings, about, modules, repr(objective)]).encode(), digest_size=6)
    if not hasattr(dataset.dataset, "describe"):
        raise ValueError("the data set needs describe(): bytes that change when its items do, to tell trainings apart")
    items = dataset.dataset.describe() if process == 0 else None  # reads every image: once is enough
    digest.update(gu.encoders.weights_digest(objective) + broadcast_object_list([items])[0])
    count = len(dataset.dataset)  # some items and their loss tell changes of code, which nothing above would show
    rows = np.linspace(0, count - 1, min(count, 8)).astype(int)
    _, batch = default_collate([dataset[0, int(row)] for row in rows])
    for part in batch:
        digest.update(part.numpy().tobytes() if isinstance(part, torch.Tensor) else repr(part).encode())
    with torch.no_grad():
        device = next(objective.parameters()).device
        digest.update(f"{objective(*send_to_device(batch, device)).item():.3g}".encode())
    return digest.hexdigest()


def check_shared(accelerator: accelerate.Accelerator, folder: Path) -> None:
    """OSError in every process, before the first step, unless all of them see the first one's files in `folder`.

    Each node reads its checkpoints and the best weights there; without a shared folder that fails hours later.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if accelerator.num_processes == 1:
        return
    token, note = broadcast_object_list([uuid.uuid4().hex])[0], folder / "shared"
    if accelerator.is_main_process:
        note.write_text(token)
    until, sees = time.time() + SHARED_WITHIN, False
    while not sees and time.time() < until:
        sees = note.exists() and note.read_text() == token
        time.sleep(0 if sees else 0.2)
    blind = [rank for rank, there in enumerate(gather_object([sees])) if not there]
    if blind:
        raise OSError(
            f"processes {blind} do not see what process 0 writes to {folder}: choose a folder that all nodes share, such "
            "as one on a network disk, under the same path on each"
        )


def resume(accelerator: accelerate.Accelerator, folder: Path) -> tuple[int, list[dict]]:
    """Load the last checkpoint in `folder`, if there is one: the steps that were taken, and the log of those."""
    found = sorted(folder.glob("step_*"))
    if not found:
        return 0, []
    step = int(found[-1].name.removeprefix("step_"))
    with damage_named(found[-1]):
        accelerator.load_state(str(found[-1]))
    written = folder / "log.jsonl"  # not there yet when checkpoints come before the first row
    with damage_named(written):
        lines = written.read_text().splitlines() if written.exists() else []
        return step, [row for row in map(json.loads, lines) if row["step"] <= step]


@contextlib.contextmanager
def damage_named(path: Path):
    """Turn whatever a damaged file leads to into a ValueError that names it and says what to delete."""
    try:
        yield
    except (MemoryError, torch.cuda.OutOfMemoryError, PermissionError):
        raise  # not the file's fault
    except Exception as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {str(error)[:200]}), as after a power cut; delete the folder "
            f"{path.parent} and run again, to train anew"
        ) from error


def set_training(objective: torch.nn.Module) -> None:
    """Training mode, except for modules that are frozen as a whole, and for batch norm: the statistics that a pretrained
    network has are better than those of a few thousand images of one kind. With new ones the drawn letters of Omniglot were
    found less well than before any training (mAP 44.0, then 37.9), with the old ones far better (61.5)."""
    objective.train()
    for module in objective.modules():
        values = list(module.parameters())
        frozen = values and not any(value.requires_grad for value in values)
        if frozen or isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()


def finite(accelerator, value: torch.Tensor, what: str, step: int, rows: torch.Tensor, folder: Path) -> float:
    """The mean over processes of a value that must be finite, or FloatingPointError in all of them."""
    values = accelerator.gather(value.detach().reshape(1)).tolist()
    if not np.isfinite(values).all():
        good = sorted(folder.glob("step_*"))
        raise FloatingPointError(
            f"the {what} became {values} at step {step + 1}, with the batch of rows {gather_object(rows.tolist())}. Look at those images, or lower the rates. "
            + (f"The last good checkpoint is {good[-1]}" if good else "No checkpoint had been written yet")
        )
    return float(np.mean(values))


def clip_gradients(accelerator, objective: torch.nn.Module, clip: float) -> torch.Tensor:
    """Scale the gradient of each child of the objective down to the norm `clip`; the largest norm there was.

    The encoder and the proxies apart, as GP-NNS does, but after the scale of half precision is taken off.
    """
    accelerator.unscale_gradients()
    parts = [child.parameters() for child in objective.children()] + [objective.parameters(recurse=False)]
    parts = [[value for value in part if value.grad is not None] for part in parts]  # what is frozen has none
    return torch.stack([torch.nn.utils.clip_grad_norm_(part, clip) for part in parts if part]).max()


def validated(accelerator, objective, average: ModelEmaV3 | None, validate: Callable, log: list, folder: Path) -> float:
    """validate() of the averaged weights if there are any, which are kept when it is the best so far; computed by the
    first process, known to all."""
    objective.eval()
    own = {key: value.clone() for key, value in objective.state_dict().items()} if average else None
    try:
        if average:
            objective.load_state_dict(average.module.state_dict())
        value = broadcast_object_list([validate() if accelerator.is_main_process else None])[0]
        if not np.isfinite(value):
            raise ValueError("validation gave no score; measure on at least two classes with two images each")
        best = max((row["validation"] for row in log if "validation" in row), default=-np.inf)
        if value > best and accelerator.is_main_process:
            gu.checkpoints.save_weights(objective, folder / "best.safetensors")
    finally:
        if average:
            objective.load_state_dict(own)
    set_training(objective)
    return float(value)


def write_log(log: list[dict], folder: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in log).encode()
    gu.write_atomically(folder / "log.jsonl", lambda file: file.write(lines))


def save_state(accelerator, folder: Path, step: int) -> None:
    """A checkpoint of everything, there as a whole or not at all; then the one before it is removed."""
    partial, final = folder / "partial", folder / f"step_{step:08d}"
    try:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            partial.rename(final)
            for old in sorted(folder.glob("step_*"))[:-1]:
                shutil.rmtree(old)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save and safetensors have errors of their own
        if isinstance(error, RuntimeError) and "writ" not in str(error):
            raise  # not the disk's fault
        shutil.rmtree(partial, ignore_errors=True)
        good = sorted(folder.glob("step_*"))
        raise gu.disk_error(final, error, f"{good[-1]} is intact" if good else "there is no earlier one") from error
    accelerator.wait_for_everyone()


def draw_training(log: list[dict], handle=None):
    """The log as curves by epoch, drawn over the picture of `handle`; returns the handle (None outside a notebook)."""
    if not gu.in_notebook():
        return None
    titles = {"loss": "loss", "validation": "validation mAP (%)", "rate": "rate"}
    titles["images_per_second"] = "images per second"
    shown = {key: rows for key in titles if (rows := [row for row in log if key in row])}
    figure, axes = plt.subplots(1, len(shown), figsize=(2.1 * len(shown), 1.8), squeeze=False)
    for axis, (key, rows) in zip(axes[0], shown.items(), strict=True):
        axis.plot([row["epoch"] for row in rows], [row[key] for row in rows], "o-" if key == "validation" else "-")
        axis.set_title(titles[key], fontsize=9)
        axis.tick_params(labelsize=8)
        axis.set(xlabel="epochs", ylim=(0, None) if key == "images_per_second" else None)
    plt.close(figure)
    return gu.display_over(handle, figure)
