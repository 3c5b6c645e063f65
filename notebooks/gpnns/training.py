"""Fine-tuning (notebooks 03 to 05, 08): what is trained, `fine_tune` and `realign`; the loop is in training_loop.py.

what is trained -> a whole fine-tuning -> what notebook 03 leaves, and realigning
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
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
from gpnns import caption_banks, losses, training_data, training_loop
from gpnns.encoders import checkpoints, heads
from gpnns.evaluation import IMAGES, evaluate
from gpnns.images import image_set
from gpnns.training_data import Captions

LARGE_RATE, LARGE_MODEL = 1e-4, 20e6  # such a rate makes so many pretrained weights forget
ToChooseOn = gu.ImageSet | tuple[gu.ImageSet, gu.ImageSet]  # images of other classes, or queries and their gallery

# --- what is trained -------------------------------------------------------------------------------------------------


class ImageObjective(torch.nn.Module):
    """What `fit` makes small: loss(embeddings of a batch of images, their class numbers), and with captions MCIP's loss of
    these on the same embeddings, as a share of the total."""

    def __init__(self, encoder: gu.Encoder, loss: torch.nn.Module, captions: Captions | None = None):
        super().__init__()
        self.encoder, self.model, self.loss = encoder, get_model(encoder), loss
        if captions:
            losses.check_shared(captions.shared_captions)
            _, _, vectors, self.weight, self.scale, self.shared = captions
            self.vectors = torch.from_numpy(vectors)

    def forward(self, images: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        embeddings = self.encoder.image_tower(images)
        if rows is None:
            return self.loss(embeddings, labels)
        columns, own = losses.batch_captions(rows, self.shared)
        captions = self.vectors[columns.cpu()].to(embeddings.device)
        words = losses.multi_caption_loss(embeddings, captions, own, self.scale)
        return (1 - self.weight) * self.loss(embeddings, labels) + self.weight * words


class Realignment(torch.nn.Module):
    """2SFT's second stage: InfoNCE between fixed image features and captions, which are encoded `chunk` at a time, so that
    only so many texts' activations are in memory (GradCache, 2101.06983). shared: of `batch_captions`."""

    def __init__(self, model: torch.nn.Module, chunk: int = 1024, shared: str = "right"):
        super().__init__()
        losses.check_shared(shared)
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


def get_model(encoder: gu.Encoder) -> torch.nn.Module:
    """The model of an encoder, to be trained; ValueError where there is none."""
    if encoder.model is None:
        raise ValueError(f"{encoder.name} has no weights to train; choose mini, open_clip:... or timm:...")
    return encoder.model


def select_text_parameters(model: torch.nn.Module, rate: float, weight_decay: float = 0.2, **adam) -> list[dict]:
    """Groups for `fit` of the end of an open_clip model's text tower: last block, final norm, projection, and the scale.
    adam: betas and eps of AdamW."""
    model.lock_text_tower(unlocked_layers=2)
    text = [value for name, value in model.named_parameters() if not name.startswith(("visual.", "logit_"))]
    large = [value for value in text if value.requires_grad and value.ndim > 1]
    small = [value for value in text if value.requires_grad and value.ndim <= 1] + [model.logit_scale]
    decays = ((large, weight_decay), (small, 0.0))
    return [{"params": values, "lr": rate, "weight_decay": decay} | adam for values, decay in decays]


def select_image_parameters(
    encoder: gu.Encoder, rate: float, layer_decay: float = 1.0, weight_decay: float = 0.01
) -> list[dict]:
    """Groups for `fit` of all that takes part in embedding an image; the text tower is not among them and stays as it is.

    layer_decay: each block learns this many times as fast as the one after it (timm's rule; patch and position
    embeddings count as the lowest). Biases and norms do not decay. A head of `add_head` is not among them: it is new,
    and learns at a rate of its own.
    """
    tower = getattr(get_model(encoder), "visual", encoder.model)
    trunk = getattr(tower, "trunk", tower)  # open_clip keeps timm's models in `trunk`
    order = {}
    if hasattr(trunk, "transformer"):  # open_clip's own ViT
        stem = r"(?:conv1|class_embedding|positional_embedding|ln_pre)"
        order = {"stem": stem, "blocks": r"transformer\.resblocks\.(\d+)"}
    find_order = getattr(trunk, "group_matcher", lambda coarse: order)
    if layer_decay != 1 and not find_order(coarse=False):
        raise ValueError(f"the order of the layers of {encoder.name} is not known; choose layer_decay=1")
    skipped = ("embedding_head", "proj") if encoder.origin.get("before_projection") else ("embedding_head",)
    parameters = [(key, value) for key, value in tower.named_parameters() if not key.startswith(skipped)]
    taking_part = [(key.removeprefix("trunk."), value.requires_grad_()) for key, value in parameters]  # may be frozen
    layers = SimpleNamespace(group_matcher=find_order, named_parameters=lambda: taking_part)
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
    choose_on: ToChooseOn,
    folder: str | Path,
    loss: Callable[[np.ndarray, np.ndarray], torch.nn.Module] | None = None,
    captions: Captions | None = None,
    *,
    transform: Callable | None = None,
    embeddings: np.ndarray | None = None,
    head: torch.nn.Module | None = None,
    head_first: float = 0.0,
    frozen_head: bool = False,
    epochs: float = 3.0,
    batch_size: int = 256,
    rate: float = 1e-6,
    proxy_rate: float = 1e-4,
    layer_decay: float = 1.0,
    weight_decay: float = 0.01,
    proxy_decay: float = 0.01,
    **settings,
) -> tuple[gu.Encoder, list[dict]]:
    """Fine-tune the image tower on labelled images: (the encoder, whose model is changed in place, the log of `fit`).

    choose_on: their mAP chooses the weights to keep. loss: from the class means (classes, dim) and the images per class
    (classes,) to a module; `losses.make_arc_margin()` when None. captions: of `images`; adds MCIP's caption loss.
    transform: makes the views; `make_training_transform` when None. embeddings: of `images`, where they are known. head: a
    new one of the encoder, which learns with the proxies; head_first: epochs in which only these learn; frozen_head: then
    they stay. layer_decay: of `select_image_parameters`. settings: of `fit_in_processes`, such as seed, accumulate, draw.

    The defaults are GP-NNS's for CLIP ViT-B, but for the start of the proxies ("xavier" there) and lr_min (1e-7).
    """
    model = get_model(encoder)
    if frozen_head and not head_first:
        raise ValueError("frozen_head keeps what head_first has learned: set head_first to a few epochs")
    if rate > LARGE_RATE and sum(map(torch.numel, model.parameters())) > LARGE_MODEL:
        warnings.warn(f"rate={rate:g} is much for {encoder.name}: papers have 1e-6 to 1e-5", stacklevel=2)
    if embeddings is None:
        embeddings, found = gu.embed_images(encoder, images)
        if captions:
            captions = captions._replace(rows=captions.rows[np.isin(images.rows, found.rows)])
        images = found
    transform = transform or training_data.make_training_transform(encoder)
    data = training_data.TrainingImages(images, transform, captions)
    torch.manual_seed(settings.get("seed", 0))
    make_loss = loss or losses.make_arc_margin()
    module = make_loss(losses.class_means(embeddings, data.labels), np.bincount(data.labels))
    objective = ImageObjective(encoder, module, captions)
    tower = select_image_parameters(encoder, rate, layer_decay, weight_decay)
    new = [value for part in (module, head) if part is not None for value in part.parameters()]
    new = {"params": new, "lr": proxy_rate, "weight_decay": proxy_decay}
    settings["batch_size"] = min(batch_size, len(data))
    if head_first:
        first = settings | {"epochs": head_first, "warmup": 0, "draw": False}
        training_loop.fit_in_processes(objective, data, folder, [new], **first)
    queries = choose_on if isinstance(choose_on, tuple) else (choose_on,)
    settings |= {"epochs": epochs, "validate": lambda: 100 * evaluate(encoder, *queries, cache=False)[IMAGES].mean}
    groups = tower if frozen_head else [*tower, new]
    return encoder, training_loop.fit_in_processes(objective, data, folder, groups, **settings)


def fine_tune_by_recipe(
    encoder: gu.Encoder,
    images: gu.ImageSet,
    choose_on: ToChooseOn,
    folder: str | Path,
    recipe: Mapping,
    loss: Callable | None = None,
    captions: Captions | None = None,
    **settings,
) -> tuple[gu.Encoder, list[dict]]:
    """`fine_tune` with what the keys of a recipe stand for, as notebooks/profiles/mini.yml explains them; those that are left
    out have the defaults of the functions that take them. loss: in place of the recipe's ArcMargin. settings: go before
    the recipe's. Returns what `fine_tune` returns; the encoder is another one where the recipe adds a head."""
    left = {"protocol": "own", "head": 0, "patch_dropout": 0.0, **recipe, **settings}

    def take(*names: str) -> dict:
        return {name: left.pop(name) for name in names if name in left}

    arc_margin = losses.make_arc_margin(**take("scale", "margin", "centers", "start"))
    told, views = take("caption_weight", "caption_scale", "shared_captions"), take("flip", "jitter", "views")
    protocol, head, dropped = take("protocol", "head", "patch_dropout").values()
    model = get_model(encoder)
    if protocol not in ("own", "paper"):
        raise ValueError(f"protocol is own or paper, not {protocol!r}")
    encoder = heads.embed_as_in_paper(encoder) if protocol == "paper" else encoder
    torch.manual_seed(left.get("seed", 0))  # for the first weights of the head
    encoder = heads.add_head(encoder, head) if head else encoder
    left |= {"transform": training_data.make_training_transform(encoder, **views)}
    left |= {"head": model.embedding_head if head else None}
    drop_patches(encoder, dropped)  # where it has patches
    captions = captions and captions._replace(**told)
    tuned = fine_tune(encoder, images, choose_on, folder, loss or arc_margin, captions, **left)
    drop_patches(encoder, 0)
    return tuned


# --- what notebook 03 leaves, and realigning -------------------------------------------------------------------------


def find_checkpoint_of_03(run: gu.Run, encoder: str, images: gu.ImageSet) -> tuple[str, str] | None:
    """The checkpoint of notebook 03, with both towers, as a name for `load_encoder` and words for where it comes from: what 03
    left in the folder of the same profile, if that was tuned from the same encoder and kept the text tower, or for the
    mini CLIP and the drawn world the shipped copy of that. None where there is neither."""
    mine, shipped = run.folder / "03_arcmargin.safetensors", gu.DATA / "mini_tuned" / "arcmargin.safetensors"
    about = checkpoints.read_checkpoint_settings(mine)
    images_alone = about.get("head") or about.get("before_projection")
    if mine.exists() and about.get("tuned_from") == encoder and not images_alone:
        return f"{about['encoder']}@{mine}", f"what notebook 03 left in runs/{run.profile}"
    if encoder == "mini" and images.drawn:
        return f"mini@{shipped}", "the copy of notebook 03's encoder that comes with the course"
    return None


def load_or_train_03(
    run: gu.Run, encoder: str, images: gu.ImageSet, choose_on: gu.ImageSet, recipe: Mapping
) -> tuple[gu.Encoder, str]:
    """The encoder as notebook 03 fine-tunes it, both towers, and where it comes from: `find_checkpoint_of_03`, or trained now,
    in the folder in which notebook 03 would train it."""
    if found := find_checkpoint_of_03(run, encoder, images):
        return gu.load_encoder(found[0]), found[1]
    start, folder = gu.load_encoder(encoder), run.folder / "03_training"
    tuned, _ = fine_tune_by_recipe(start, images, choose_on, folder, recipe, seed=run.seed)
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
    if not encoder.has_text or encoder.model is None:
        fitting = "mini or an open_clip: encoder, without a head and with protocol own"
        raise ValueError(f"{encoder.name} has no text tower to realign; choose {fitting}")
    features, pairs = gu.embed_images(encoder, pairs)
    fixed, choose_on = gu.embed_images(encoder, choose_on)
    texts, relevant = image_set.text_queries(choose_on)
    data = training_data.CaptionPairs(features, pairs.captions, encoder.tokenizer)
    if cut := int(caption_banks.is_cut(encoder.tokenizer, list(data.numbers)).sum()):
        what = f"{cut:,} of {len(data.numbers):,} captions of {pairs.name}"
        print(f"{what} are too long for {encoder.name} and lose their end")

    def validate() -> float:
        encoder.model.eval()
        vectors = gu.embed_texts(encoder, texts, cache=False)
        return 100 * gu.mean_average_precision(gu.rank_relevant(vectors, fixed, relevant)).mean

    objective = Realignment(encoder.model, chunk, shared_captions)
    groups = select_text_parameters(encoder.model, rate, weight_decay, betas=(0.9, beta2), eps=eps)
    settings |= {"epochs": epochs, "batch_size": min(batch_size, len(pairs)), "validate": validate}
    return encoder, training_loop.fit(objective, data, folder, groups, **settings)
