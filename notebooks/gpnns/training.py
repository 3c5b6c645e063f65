"""Fine-tuning (notebooks 03 to 05, 08): what is trained, `fine_tune` and `realign`; the loop is in training_loop.py."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch.utils.checkpoint import checkpoint

import gpnns_utils as gu
from gpnns import caption_banks, evaluation, losses, training_data, training_loop
from gpnns.encoders import heads
from gpnns.images import image_set, text_files

LARGE_RATE, LARGE_MODEL = 1e-4, 20e6  # such a rate makes so many pretrained weights forget


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
        columns, own = losses.batch_captions(rows, self.shared)
        captions = self.captions[columns.cpu()].to(embeddings.device)
        words = losses.multi_caption_loss(embeddings, captions, own, self.scale)
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
            return losses.info_nce(features.float(), texts, scale, numbers)


def select_text_parameters(model: torch.nn.Module, rate: float, weight_decay: float = 0.2, **adam) -> list[dict]:
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


def select_image_parameters(
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
    every class equally often. protocol: "paper" embeds as `heads.embed_as_in_paper`. head: size of a linear layer that is
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
    if shared_captions not in losses.SHARED:
        raise ValueError(f"shared_captions is one of {', '.join(losses.SHARED)}, not {shared_captions!r}")
    if protocol == "paper":
        encoder = heads.embed_as_in_paper(encoder)
    torch.manual_seed(seed)
    encoder = heads.add_head(encoder, head) if head else encoder
    transform = training_data.make_training_transform(encoder, flip, jitter, views)
    if embeddings is None:
        embeddings = gu.embed_images(encoder, images)  # takes files that cannot be read out of `images`
    data = training_data.TrainingImages(images, transform)
    means, counts = losses.class_means(embeddings, data.labels), np.bincount(data.labels)
    drop_patches(encoder, patch_dropout)  # where it has patches
    torch.manual_seed(seed)
    if loss is None:
        margin = losses.margins_by_count(counts, *margin) if np.ndim(margin) else margin
        first = means if start == "means" else None
        loss = lambda means, _: losses.ArcMargin(encoder.dim, len(means), scale, margin, centers, start=first)  # noqa: E731
    objective = ImageObjective(encoder, loss(means, counts))
    if captions:
        rows, texts, vectors = captions
        data = training_data.CaptionedImages(images, transform, rows, texts)
        objective = CaptionObjective(encoder, objective.loss, vectors, caption_weight, caption_scale, shared_captions)
    tower = select_image_parameters(encoder, rate, layer_decay, weight_decay)
    new = [*objective.loss.parameters(), *(encoder.model.embedding_head.parameters() if head else ())]
    new = {"params": new, "lr": proxy_rate, "weight_decay": proxy_decay}
    size = min(batch_size, len(data))
    settings |= {"batch_size": size, "ema": ema or None, "balance": data.labels if balanced else None}
    if head_first:
        training_loop.fit_in_processes(
            processes, objective, data, folder, [new], **settings | {"epochs": head_first, "draw": False}
        )
    steps = round(epochs * (len(data) // size) / settings.get("accumulate", 1))
    settings |= {"epochs": epochs, "warmup": int(warmup * steps if warmup < 1 else warmup)}
    settings = {"save_every": max(100, steps // 20)} | settings
    queries = choose_on if isinstance(choose_on, tuple) else (choose_on,)
    settings["validate"] = lambda: 100 * evaluation.image_to_image(encoder, *queries).mean
    groups = tower if frozen_head else [*tower, new]
    log = training_loop.fit_in_processes(processes, objective, data, folder, groups, **settings)
    drop_patches(encoder, 0)
    return encoder, log


def find_checkpoint_of_03(run: gu.Run, encoder: str, images: gu.ImageSet) -> tuple[str, str] | None:
    """The checkpoint of notebook 03, with both towers, as a name for `load_encoder` and words for where it comes from: what 03
    left in the folder of the same profile, if that was tuned from the same encoder and kept the text tower, or for the
    mini CLIP and the drawn world the shipped copy of that. None where there is neither."""
    mine, shipped = run.folder / "03_arcmargin.safetensors", gu.DATA / "mini_tuned" / "arcmargin.safetensors"
    about = text_files.read_json(mine.with_suffix(".json")) if mine.with_suffix(".json").exists() else {}
    other = about.get("head") or about.get("before_projection")
    if mine.exists() and about.get("tuned_from") == encoder and not other:
        return f"{about['encoder']}@{mine}", f"what notebook 03 left in runs/{run.profile}"
    if encoder == "mini" and images.name == "mini train":
        return f"mini@{shipped}", "the copy of notebook 03's encoder that comes with the course"
    return None


def load_or_train_03(
    run: gu.Run, encoder: str, images: gu.ImageSet, choose_on: gu.ImageSet, **settings
) -> tuple[gu.Encoder, str]:
    """The encoder as notebook 03 fine-tunes it, both towers, and where it comes from: `left_by_03`, or trained now, with
    `settings` of `fine_tune`, in the folder in which notebook 03 would train it."""
    if found := find_checkpoint_of_03(run, encoder, images):
        return gu.load_encoder(found[0]), found[1]
    tuned, _ = fine_tune(
        gu.load_encoder(encoder), images, choose_on, run.folder / "03_training", seed=run.seed, **settings
    )
    return tuned, "a fine-tuning on images alone, done now"


def choose_three_quarters(images: gu.ImageSet, seed: int, number: int) -> np.ndarray:
    """Which images belong to three quarters of the classes (two at least), drawn anew for each number: bool (n,)."""
    classes = np.random.default_rng([seed, number]).permutation(np.unique(images.labels))
    return np.isin(images.labels, classes[: max(2, round(0.75 * len(classes)))])


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
    if shared_captions not in losses.SHARED:
        raise ValueError(f"shared_captions is one of {', '.join(losses.SHARED)}, not {shared_captions!r}")
    features = gu.embed_images(encoder, pairs)  # takes files that cannot be read out of `pairs`
    fixed = gu.embed_images(encoder, choose_on)
    texts, relevant = image_set.text_queries(choose_on)
    data = training_data.CaptionPairs(features, pairs.captions, encoder.tokenizer)
    if cut := int(caption_banks.is_cut(encoder.tokenizer, list(data.numbers)).sum()):
        print(
            f"{cut:,} of {len(data.numbers):,} captions of {pairs.name} are too long for {encoder.name} and lose their end"
        )

    def validate() -> float:
        encoder.model.eval()
        vectors = gu.embed_texts(encoder, texts, cache=False)
        return 100 * gu.mean_average_precision(gu.rank_relevant(vectors, fixed, relevant)).mean

    groups = select_text_parameters(encoder.model, rate, weight_decay, betas=(0.9, beta2), eps=eps)
    settings |= {"epochs": epochs, "batch_size": min(batch_size, len(pairs)), "validate": validate}
    return encoder, training_loop.fit(
        Realignment(encoder.model, chunk, shared_captions), data, folder, groups, **settings
    )
