"""What the notebooks of this course share, in the order in which data flows.

where are we -> images -> encoders -> embeddings -> neighbours -> scores -> fine-tuning -> results -> pictures

Everything that passes from one section to the next is a plain numpy array or a small dataclass, so you can leave at
any point with what you have. Embeddings are float32 (n, d) with unit rows; a row number is an image's identity.
"""

import contextlib
import csv
import difflib
import errno
import functools
import hashlib
import html
import importlib.util
import io
import json
import logging
import os
import platform
import re
import shutil
import socket
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qsl

import accelerate
import cloudpickle
import faiss
import ipywidgets as widgets
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import open_clip
import timm
import torch
import torch.nn.functional as F
import yaml
from IPython import get_ipython
from IPython.display import HTML, display
from IPython.display import Image as Picture
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from threadpoolctl import threadpool_limits
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

HERE = Path(__file__).resolve().parent
CHECKOUT = (HERE / "data" / "mini_world.py").exists()  # otherwise: installed by pip, the data lie beside this file
DATA = HERE / "data" if CHECKOUT else HERE / "gpnns_data"


# --- where are we ----------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """Where a notebook runs and where its files go; made by `setup`."""

    profile: str
    seed: int
    platform: str
    device: torch.device
    folder: Path
    started: float


def setup(profile: str = "mini", seed: int = 0) -> Run:
    """Choose device and folders, fix the seeds, set the figure style, print one card.

    `profile` names the results folder `runs/<profile>/`.
    """
    np.random.seed(seed)
    torch.manual_seed(seed)
    if "google.colab" in sys.modules:
        where = "Colab"
    elif "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        where = "Kaggle"
    else:
        where = "local"
    run = Run(profile, seed, where, best_device(), work_folder() / "runs" / profile, time.time())
    run.folder.mkdir(parents=True, exist_ok=True)
    matplotlib.rcParams.update(STYLE)
    precision = best_precision(run.device) or torch.float32
    print(f"gpnns | profile {profile} | seed {seed} | {where}")
    print(
        f"python {platform.python_version()} | torch {torch.__version__} | {run.device}, {precision} | {os.cpu_count()} cores"
    )
    switch = {"Kaggle": "Settings > Accelerator > GPU T4 x2", "Colab": "Runtime > Change runtime type > T4 GPU"}
    if where in switch and not torch.cuda.is_available():
        print(f"no GPU is switched on; for real encoders it saves hours: {switch[where]}")
    return run


def profile_parameters(profile: str, notebook: str, given: dict) -> dict:
    """What notebooks/profiles/<profile>.yml sets in a notebook, except where `given` differs from the default.

    mini.yml holds the defaults, so a value equal to its default counts as left alone. A profile without a file sets
    nothing: it is only a name for the results. Raises ValueError when a file sets what the notebook does not know.
    """
    folder = HERE / "notebooks" / "profiles"
    known = sorted(path.stem for path in folder.glob("*.yml"))
    if profile not in known:
        print(f"profile {profile}: a name for results only; with parameters of their own: {', '.join(known)}")
        return {}
    values, defaults = (
        yaml.safe_load((folder / f"{name}.yml").read_text(encoding="utf-8"))["notebooks"].get(notebook, {})
        for name in (profile, "mini")
    )
    if unknown := values.keys() - defaults.keys():
        raise ValueError(f"profiles/{profile}.yml sets {', '.join(sorted(unknown))}, which {notebook} does not know")
    chosen = {name: value for name, value in values.items() if given[name] == defaults[name] != value}
    if chosen:
        print(f"profile {profile} sets " + ", ".join(f"{name} = {value!r}" for name, value in chosen.items()))
    return chosen


def best_device() -> torch.device:
    """A GPU that really computes, else the CPU.

    Some installations of torch see a GPU without having kernels for it (a P100 on Kaggle): asking is not enough, so
    one small product is computed.
    """
    cuda = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # each process of a training on several GPUs has its own
    for name, there in ((cuda, torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if there:
            try:
                (torch.ones(8, 8, device=name) @ torch.ones(8, 8, device=name)).sum().item()
                return torch.device(name)
            except RuntimeError as error:
                warnings.warn(
                    f"this torch cannot use the {name} device ({str(error).splitlines()[0]}); using the CPU. On Kaggle, choose the accelerator 'GPU T4 x2'.",
                    stacklevel=2,
                )
    return torch.device("cpu")


def best_precision(device: torch.device) -> torch.dtype | None:
    """The autocast dtype the device gains from: bfloat16 from Ampere on, float16 on older GPUs (T4), None elsewhere."""
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def work_folder() -> Path:
    """Where runs/ and .cache/ are made: the course's folder, or the current one when gpnns is an installed package."""
    return HERE if CHECKOUT else Path.cwd()


def cache_folder() -> Path:
    """Where drawn images and embeddings are kept; the environment variable GPNNS_CACHE moves it."""
    return Path(os.environ.get("GPNNS_CACHE", work_folder() / ".cache"))


class Progress:
    """A progress line that updates in place and is still there, in its last state, when a notebook is read later.

    Nothing is shown for work that ends within a second.
    """

    def __init__(self, total: int, label: str, unit: str = "images", done: int = 0):
        self.total, self.label, self.unit = total, label, unit
        self.done = self.first = done
        self.start, self.shown, self.handle = time.time(), 0.0, None

    def update(self, done: int, total: int | None = None) -> None:
        self.done, self.total = done, total or self.total
        now, pause = time.time(), 1 if in_notebook() else 10
        if now - max(self.shown, self.start) < pause and not (done >= self.total and self.shown):
            return
        self.shown = now
        if in_notebook():
            self.handle = display_over(self.handle, self)
        else:
            print(self, file=sys.stderr, flush=True)

    def __repr__(self) -> str:
        spent, here = time.time() - self.start, self.done - self.first
        if self.done >= self.total:
            return f"{self.label}: {here:,} {self.unit} in {spent:.0f} s"
        return f"{self.label}: {self.done:,} of {self.total:,} {self.unit}, {spent / max(here, 1) * (self.total - self.done):.0f} s left"

    def _repr_html_(self) -> str:
        return f"<progress value='{self.done}' max='{self.total}'></progress> {html.escape(repr(self))}"


def in_notebook() -> bool:
    return getattr(get_ipython(), "kernel", None) is not None


def display_over(handle, thing):
    """Show `thing` in place of what `handle` shows, or anew for None; returns the handle."""
    if handle is None:
        return display(thing, display_id=True)
    handle.update(thing)
    return handle


def write_atomically(path: Path, write: Callable) -> None:
    """Call `write(file)` on a temporary file and move it to `path`: a killed process never leaves half a file there.

    When writing fails, as on a full disk, the temporary file is removed, an earlier `path` stays, and OSError says so.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
        os.replace(partial, path)
    except OSError as error:
        kept = "what was there before is still there" if path.exists() else "nothing was written"
        raise disk_error(path, error, kept) from error
    finally:
        partial.unlink(missing_ok=True)


def disk_error(path: Path, error: Exception, kept: str) -> OSError:
    """The error to raise instead when writing failed: what happened and what is left."""
    free = shutil.disk_usage(path.parent).free / 1e6
    reason = " ".join(str(error).split())[:200]
    return OSError(f"could not write {path} ({reason}; {free:,.0f} MB free); {kept}. Free some space and run again")


# --- images ----------------------------------------------------------------------------------------------------------

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
PER_IMAGE = ("images", "labels", "groups", "captions", "crops")  # the fields of an ImageSet with one entry per image


@dataclass
class ImageSet:
    """Images and what is known about them. All fields but `names` have one entry per image.

    images: list of paths, or uint8 array (n, height, width, 3). labels: int64 (n,) class numbers. groups: (n,) domain
    names. captions: n lists of strings. names: class number -> readable name. left_out: files that could not be read.
    crops: int (n, 4), the part that counts of each picture file: left, top, right, bottom in pixels; a right or bottom
    below 1 counts from the other edge.
    """

    name: str
    images: Sequence[Path] | np.ndarray
    labels: np.ndarray | None = None
    groups: np.ndarray | None = None
    captions: list[list[str]] | None = None
    names: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    crops: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Image.Image:
        image = self.images[row]
        if isinstance(self.images, np.ndarray):
            return Image.fromarray(np.asarray(image))
        return open_image(image, None if self.crops is None else self.crops[row])

    def describe(self, row: int) -> str:
        """Where an image comes from, for messages: its path, or its row."""
        return f"row {row} of {self.name}" if isinstance(self.images, np.ndarray) else str(self.images[row])

    def subset(self, rows: Sequence[int] | np.ndarray) -> "ImageSet":
        """The images of `rows` (numbers, or a boolean mask) as a new set."""
        rows = np.arange(len(self))[np.asarray(rows)]
        parts = {part: values for part in PER_IMAGE if (values := getattr(self, part)) is not None}
        parts = {k: v[rows] if isinstance(v, np.ndarray) else [v[i] for i in rows] for k, v in parts.items()}
        return replace(self, **parts, left_out=list(self.left_out))


def open_image(path: Path, crop: Sequence[int] | None = None) -> Image.Image:
    """Read an image as RGB: turned upright as its EXIF data say, transparent parts on white, 16 bits cut to 8.

    crop: a box as in `ImageSet.crops`, in the pixels of the file.
    """
    with Image.open(path) as image:
        if crop is not None:
            left, top, right, bottom = (int(edge) for edge in crop)
            right, bottom = right + image.width * (right < 1), bottom + image.height * (bottom < 1)
            image = image.crop((left, top, min(right, image.width), min(bottom, image.height)))
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def load_images(source: str | Path, split: str = "test") -> ImageSet:
    """Load "mini" (the drawn world), a data set by name, a folder, a table of images, or webdataset tars.

    Names and their splits: data/README.md. What is nowhere yet is downloaded, where its authors allow that. A name may
    bring a split of its own, "coco:validation", and several, "sop + cub", become one set.
    Folder: `label/file`, `group/label/file`, or just files (no labels). Equal labels in two groups are one class. A
    subfolder named like `split` is used when there is one, and `captions.json` maps labels to lists of captions.
    Table (.csv, .tsv, .parquet): columns `path` and, if known, `label`, `group`, `caption` (several: separated by `|`),
    `split`; paths are relative to the table. Tars: one .tar, or a folder of them. Images of folders, tables and tars are
    sorted by path, those of data sets as their lists are, so that rows do not depend on the file system.
    """
    if str(source) == "mini":
        world, report = load_module(DATA / "mini_world.py"), Progress(0, f"drawing mini world, {split}").update
        return ImageSet(name=f"mini {split}", **world.load_split(split, cache_folder(), report=report))
    parts = [part.strip().partition(":") for part in str(source).split(" + ")]
    if all(name in dataset_module().TABLE for name, _, _ in parts):
        return ImageSet(**dataset_module().load_all([(name, own or split) for name, _, own in parts]))
    name, source = str(source), Path(source).expanduser()
    if not source.exists():
        raise FileNotFoundError(
            f"no folder or table of images at {source.absolute()}; give a path, 'mini' for the drawn world, or the name of a "
            f"data set{suggest(name, list(dataset_module().TABLE))}"
        )
    return ImageSet(**dataset_module().load_own(source, split))


@functools.cache
def dataset_module():
    """data/datasets.py, which knows the data sets of data/datasets.toml and reads folders, tables and tars of one's own."""
    return load_module(DATA / "datasets.py")


def load_module(path: Path):
    """Import one Python file by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- encoders --------------------------------------------------------------------------------------------------------


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
        probe = self.probe()
        self.image_size, self.dim = probe.shape[-1], self.features(self.image_tower, probe[None]).shape[-1]

    def probe(self) -> torch.Tensor:
        """A test picture after preprocessing."""
        pixels = np.random.default_rng(0).integers(0, 256, (61, 97, 3), dtype=np.uint8)
        return self.preprocess(Image.fromarray(pixels))

    def features(self, tower: Callable, batch) -> np.ndarray:
        """What a tower makes of a batch, in full precision."""
        with torch.inference_mode():
            return tower(batch.to(self.device) if isinstance(batch, torch.Tensor) else batch).float().cpu().numpy()

    def fingerprint(self, of: str = "images") -> str:
        """A hash of what decides the embeddings of "images" or "texts": weights, layers, preprocessing, a probe's output.

        It is the encoder's part of the cache key, taken anew on each use, because training changes weights in place.
        Where a model has two towers each has its own: new text weights leave cached image embeddings valid.
        """
        digest = hashlib.blake2b(self.probe().numpy().tobytes() + of.encode(), digest_size=12)
        whole = self.model if self.model is not None else self.image_tower
        if isinstance(whole, torch.nn.Module):
            visual = getattr(whole, "visual", None) if self.text_tower is not None else None
            digest.update(repr(whole).encode())
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


def weights_digest(module: torch.nn.Module, without: str | None = None) -> bytes:
    """A hash of all tensors of a module, with their names, except those whose name begins with `without`."""
    digest = hashlib.blake2b(digest_size=16)
    for key, tensor in module.state_dict().items():
        if without is None or not key.startswith(without):
            digest.update(key.encode() + tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


def load_encoder(spec: str, device: torch.device | str | None = None) -> Encoder:
    """Load an encoder by name.

    "mini" (the small CLIP of this course), "random" (the same before training), "pixels" (no model: 16 x 16 colors),
    "open_clip:ARCHITECTURE/TAG", "timm:NAME", "gpnns:ViT-B@file.pth" (the GP-NNS release format).
    `@file` behind a name takes the weights from a file: "mini@tuned.safetensors", "open_clip:ViT-B-16/openai@epoch_3.pt"
    (the tag then only says what the file was tuned from, which decides preprocessing and activation).
    Settings that a timm model was trained with follow a question mark:
    "timm:mobilenetv2_035?pad_type=same&bn_eps=0.001&mean=0.5&std=0.5@file.safetensors".

    Raises ValueError for an unknown name or weights that do not fit, FileNotFoundError for a missing file, OSError
    when weights cannot be downloaded.
    """
    device = torch.device(device) if device else best_device()
    name, _, checkpoint = spec.partition("@")
    kind, _, rest = name.partition(":")
    ours = {"mini": build_mini, "random": build_mini, "pixels": build_pixels}
    named = {"open_clip": build_open_clip, "timm": build_timm, "gpnns": build_gpnns}
    if kind not in (named if rest else ours):
        raise ValueError(
            f"unknown encoder {spec!r}; use mini, random, pixels, open_clip:ARCHITECTURE/TAG, timm:NAME or gpnns:ViT-B@FILE"
        )
    state = load_checkpoint(checkpoint) if checkpoint else None
    head = state.pop("embedding_head.linear.weight", None) if state else None
    encoder = (ours | named)[kind](spec, rest or kind, state, device)
    encoder.origin["encoder"] = name
    before = checkpoint_settings(checkpoint).get("before_projection", False)
    if head is not None or before:
        encoder = add_head(encoder, None if head is None else len(head), before)
    if head is not None:
        fill(encoder.model.embedding_head, {"linear.weight": head}, spec)
    encoder.name = name.partition("?")[0] + (f"@{Path(checkpoint).stem}" if checkpoint else "")
    return encoder


def build_pixels(spec: str, name: str, state: dict | None, device: torch.device) -> Encoder:
    """The baseline without a model: a 16 x 16 thumbnail's colors minus their mean."""
    shrink = transforms.Compose([transforms.Resize((16, 16)), transforms.ToTensor()])
    return Encoder(spec, shrink, lambda batch: (batch - batch.mean((1, 2, 3), keepdim=True)).flatten(1), device=device)


def build_mini(spec: str, name: str, state: dict | None, device: torch.device) -> Encoder:
    """The small CLIP in data/mini_clip, a folder that open_clip itself can load."""
    folder = DATA / "mini_clip"
    with torch.random.fork_rng(), quiet_open_clip():
        torch.manual_seed(0)  # "random" is the same model everywhere
        place, trained = f"local-dir:{folder}", name == "mini" and state is None
        model, _, preprocess = open_clip.create_model_and_transforms(place, load_weights=trained)
        tokenizer = open_clip.get_tokenizer(place, bpe_path=str(folder / "vocabulary.txt.gz"))
    return clip_encoder(spec, model, preprocess, tokenizer, state, device)


def build_open_clip(spec: str, name: str, state: dict | None, device: torch.device) -> Encoder:
    """Any open_clip architecture, with a pretrained tag, a local file, or (neither) random weights."""
    architecture, _, tag = (name, "", "") if name.startswith(("hf-hub:", "local-dir:")) else name.partition("/")
    if ":" not in architecture:
        if architecture not in open_clip.list_models():
            raise ValueError(
                f"open_clip has no architecture {architecture!r}{suggest(architecture, open_clip.list_models())}"
            )
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        if tag and tag not in tags:
            raise ValueError(
                f"open_clip has no weights {tag!r} for {architecture}; it has {', '.join(tags)}. A file of your own goes behind an @"
            )
    known = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    # Where a file brings the weights, the tag only says how they want their images prepared, and their activation.
    keys = () if state is None else ("mean", "std", "interpolation", "resize_mode")
    settings = {f"image_{key}": known.get(key) for key in keys}
    try:
        with quiet_open_clip():
            tokenizer = open_clip.get_tokenizer(architecture)
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
    name, _, query = name.partition("?")
    settings = {key: number_or_text(value) for key, value in parse_qsl(query, strict_parsing=bool(query))}
    known = timm.list_models(), timm.list_pretrained()
    if name.split(".")[0] not in known[0] or ("." in name and name not in known[1]):
        raise ValueError(f"timm has no model {name!r}{suggest(name, [*known[0], *known[1]])}")
    overlay = {key: settings.pop(key) for key in ("mean", "std", "crop_pct", "interpolation") if key in settings}
    overlay.update({key: (overlay[key],) * 3 for key in ("mean", "std") if key in overlay})
    settings |= {"pretrained": state is None, "num_classes": 0, "pretrained_cfg_overlay": overlay}
    try:
        model = timm.create_model(name, **settings)
    except (OSError, RuntimeError) as error:
        raise OSError(offline_message(spec, error)) from error
    if state is not None:
        names = model.pretrained_cfg.get("classifier") or ()  # of the layers that an encoder does without
        classifier = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
        fill(model, {key: value for key, value in state.items() if not key.startswith(classifier)}, spec)
    model = model.to(device).eval()
    preprocess = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    return Encoder(spec, preprocess, model, device=device, model=model)


def build_gpnns(spec: str, name: str, state: dict | None, device: torch.device) -> Encoder:
    """The GP-NNS release: a CLIP image tower's class token after `ln_post`, not projected; sizes are read from the file.

    Preprocessing as released: a square of int(1.125 * size), bilinear, centre crop, ImageNet mean and deviation.
    """
    if state is None:
        raise ValueError(f"{spec!r} needs a file: gpnns:ViT-B@path/to/GPNNS_ViTB.pth")
    state = {key.removeprefix("backbone."): value for key, value in state.items()}
    for key in ("conv1.weight", "positional_embedding", "ln_post.weight"):
        if key not in state:
            raise ValueError(
                f"{spec}: not in the GP-NNS release format, 'backbone.{key}' is missing; it has {', '.join(list(state)[:3])} ..."
            )
    width, _, patch, _ = state["conv1.weight"].shape
    if {"ViT-B": 768, "ViT-L": 1024}.get(name, width) != width:
        raise ValueError(
            f"{spec}: the file holds a model of width {width}, which is not a {name}; write gpnns:{'ViT-B' if width == 768 else 'ViT-L'}@..."
        )
    size = patch * round((len(state["positional_embedding"]) - 1) ** 0.5)
    layers = len({key.split(".")[2] for key in state if key.startswith("transformer.resblocks.")})
    heads, activation = max(1, width // 64), open_clip.transformer.QuickGELU  # CLIP's heads are 64 wide
    tower = open_clip.transformer.VisionTransformer(size, patch, width, layers, heads, 4.0, act_layer=activation)
    tower.proj = None
    fill(tower, state, spec)
    preprocess = transforms.Compose([
        transforms.Resize((int(1.125 * size),) * 2, transforms.InterpolationMode.BILINEAR),
        transforms.CenterCrop(size),
        transforms.ToTensor(),
        transforms.Normalize(timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD),
    ])  # fmt: skip
    tower = tower.to(device).eval()
    return Encoder(spec, preprocess, tower, device=device, model=tower)


def load_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a state dict: safetensors, or a pickle of tensors (never anything that could run code).

    Training checkpoints are unwrapped ("state_dict", "model") and the prefixes of DistributedDataParallel (`module.`)
    and torch.compile (`_orig_mod.`) are taken off. Raises FileNotFoundError, or ValueError when it is no state dict.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path.absolute()}")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise ValueError(
            f"{path} is not a readable checkpoint of plain tensors ({str(error).splitlines()[0]}). If you trust it, convert it to safetensors first"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict (a dict of tensors, perhaps under 'state_dict')")
    return {plain_name(key): value for key, value in state.items()}


def plain_name(key: str) -> str:
    """A tensor's name without the prefixes of DistributedDataParallel and torch.compile."""
    return re.sub(r"^(module\.|_orig_mod\.)+", "", key)


def save_checkpoint(encoder: Encoder, path: str | Path, /, **about) -> Path:
    """Write an encoder's weights as safetensors, and beside them a small JSON with what made them (`about`).

    The tensors are the whole model's, as open_clip or timm names them, plus `embedding_head.*` when there is a head:
    `load_encoder("NAME@file")` restores the encoder, and without a head `load_state_dict(strict=True)` of the plain
    model takes the file too. An earlier file is replaced only when the new one is complete (OSError otherwise).
    """
    if encoder.model is None:
        raise ValueError(f"{encoder.name} has no weights to save")
    path = Path(path).expanduser()
    path = path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")
    about = about | {**encoder.origin, "dim": encoder.dim, "image_size": encoder.image_size}
    save_weights(encoder.model, path, {"gpnns": json.dumps(about)})
    about["load"] = f"load_encoder('{encoder.origin.get('encoder', encoder.name)}@{path.name}')"
    write_atomically(path.with_suffix(".json"), lambda file: file.write((json.dumps(about, indent=1) + "\n").encode()))
    return path


def checkpoint_settings(path: str | Path) -> dict:
    """What `save_checkpoint` noted in the file itself; {} for no file and for any other file."""
    if Path(path).suffix != ".safetensors":
        return {}
    with safe_open(Path(path).expanduser(), "pt") as file:
        return json.loads((file.metadata() or {}).get("gpnns", "{}"))


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


def fill(model: torch.nn.Module, state: dict[str, torch.Tensor], spec: str) -> None:
    """Load weights strictly; a mismatch is a ValueError that names the first tensors concerned."""
    own = model.state_dict()
    problems = [f"{key} is missing" for key in own if key not in state]
    problems += [f"{key} is not part of the model" for key in state if key not in own]
    shapes = {key: (tuple(state[key].shape), tuple(own[key].shape)) for key in own if key in state}
    problems += [f"{key} has shape {given}, not {wanted}" for key, (given, wanted) in shapes.items() if given != wanted]
    if problems:
        shown = "; ".join(problems[:3]) + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise ValueError(f"the weights of {spec} do not fit its architecture: {shown}")
    model.load_state_dict(state)


@contextlib.contextmanager
def quiet_open_clip():
    """open_clip logs a warning when no weights are loaded; here that is on purpose."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)


def suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""


def number_or_text(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def offline_message(spec: str, error: Exception) -> str:
    return (
        f"could not load {spec!r}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}. Its weights are downloaded on first use: "
        "check the network (Kaggle: Settings > Internet > On), or give a local file behind an @"
    )


# --- embeddings ------------------------------------------------------------------------------------------------------

SHARD = 1024  # images per cache file: what a killed run can lose
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # errors of a machine short of file handles or memory


def embed_images(
    encoder: Encoder, images: ImageSet, batch_size: int = 128, workers: int | None = None, cache: bool = True
) -> np.ndarray:
    """Embed a set of images: float32 (n, d), unit rows; row i belongs to image i.

    Files are decoded in worker processes. Finished shards are kept in the cache folder under a key made of the
    encoder (weights, layers, preprocessing), the precision and the images' content, and are never computed twice: a
    killed run goes on where it stopped, with bit-identical results. A shard is 1,024 images in a row: images added at
    the end leave earlier shards as they are. cache=False leaves the disk alone, for models that change with every step.

    Files that cannot be read are taken out of `images` (so rows stay aligned), listed in `images.left_out` and named
    in one warning. Raises ValueError when no image is readable or the encoder returns non-finite or zero vectors.
    """
    if len(images) == 0:
        raise ValueError(f"{images.name}: there are no images to embed")
    workers = decoders(images) if workers is None else workers

    def compute(rows: list[list[int]]):
        decoded = Decoded(images, encoder.preprocess)
        for batch in DataLoader(decoded, batch_sampler=rows, num_workers=workers, collate_fn=list):
            features = np.full((len(batch), encoder.dim), np.nan, dtype=np.float32)  # NaN marks an unreadable image
            readable = [i for i, image in enumerate(batch) if image is not None]
            if readable:
                pixels = torch.stack([batch[i] for i in readable]).to(encoder.device)
                features[readable] = run_tower(encoder, encoder.image_tower, pixels)
            yield features

    if cache:
        digests = [content_digest(images, row) for row in range(len(images))]
        label = f"embedding {images.name} with {encoder.name}"
        embeddings = embed_in_shards(encoder, digests, batch_size, compute, label, "images")
    else:
        embeddings = np.concatenate(list(compute(consecutive(len(images), batch_size))))
    unreadable = np.flatnonzero(np.isnan(embeddings[:, 0]))
    if len(unreadable):
        drop_unreadable(images, unreadable)
        embeddings = np.delete(embeddings, unreadable, axis=0)
    return embeddings


def embed_texts(encoder: Encoder, texts: Sequence[str], batch_size: int = 256, cache: bool = True) -> np.ndarray:
    """Embed texts into the encoder's joint space: float32 (n, d), unit rows; cached like images.

    Raises ValueError for an encoder without a text tower.
    """
    if encoder.text_tower is None:
        raise ValueError(f"{encoder.name} encodes images only; for text, choose mini or an open_clip: encoder")
    if len(texts) == 0 or isinstance(texts, str):
        raise ValueError(f"texts must be a list of at least one string, not {texts!r}")

    def compute(rows: list[list[int]]):
        for batch in rows:
            yield run_tower(encoder, encoder.text_tower, [texts[i] for i in batch])

    if not cache:
        return np.concatenate(list(compute(consecutive(len(texts), batch_size))))
    digests = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]
    return embed_in_shards(encoder, digests, batch_size, compute, f"embedding texts with {encoder.name}", "texts")


def consecutive(count: int, size: int) -> list[list[int]]:
    """The rows 0 to count - 1 in batches of `size`."""
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


def decoders(images: ImageSet) -> int:
    """How many processes should decode: none for arrays and for a handful of files."""
    return 0 if isinstance(images.images, np.ndarray) or len(images) < 64 else min(8, os.cpu_count() or 1)


def run_tower(encoder: Encoder, tower: Callable, batch) -> np.ndarray:
    """One batch through a tower: float32 unit rows, in the precision the device gains from."""
    precision = best_precision(encoder.device)
    with torch.inference_mode(), torch.autocast(encoder.device.type, precision, enabled=precision is not None):
        features = tower(batch)
    return unit_rows(features.float().cpu().numpy(), f"the features of {encoder.name}")


def embed_in_shards(
    encoder: Encoder, digests: list[bytes], batch_size: int, compute: Callable, label: str, unit: str
) -> np.ndarray:
    """Read the shards that the cache holds, compute and save the others; `compute` yields one array per batch of rows."""
    precision = str(best_precision(encoder.device) or torch.float32).removeprefix("torch.")
    folder = cache_folder() / "embeddings" / f"{encoder.fingerprint(unit)}-{precision}-{unit}"
    members = consecutive(len(digests), SHARD)  # the rows of each shard
    keys = [hashlib.blake2b(b"".join(digests[row] for row in rows), digest_size=16).hexdigest() for rows in members]
    shards = [read_shard(folder / f"{key}.npy", encoder.dim) for key in keys]
    missing = [i for i, shard in enumerate(shards) if shard is None]
    progress = Progress(len(digests), label, unit)
    done = len(digests) - sum(len(members[i]) for i in missing)
    # Batches never cross a shard: a resumed run forms the same batches, hence the same bits.
    to_do = {i: [members[i][at : at + batch_size] for at in range(0, len(members[i]), batch_size)] for i in missing}
    computed = compute([batch for i in missing for batch in to_do[i]]) if missing else None
    for i in missing:
        parts = []
        for batch in to_do[i]:
            parts.append(next(computed))
            done += len(batch)
            progress.update(done)
        shards[i] = np.concatenate(parts)
        write_atomically(folder / f"{keys[i]}.npy", lambda file, shard=shards[i]: np.save(file, shard))
    return np.concatenate(shards)


def read_shard(path: Path, dim: int) -> np.ndarray | None:
    """A cached shard, or None when there is none; a damaged file is named and computed again."""
    if not path.exists():
        return None
    try:
        shard = np.load(path, allow_pickle=False)
        if shard.ndim == 2 and shard.shape[1] == dim:
            return shard
    except (ValueError, OSError, EOFError):
        pass
    warnings.warn(f"{path} is damaged and is computed again", stacklevel=2)
    return None


class Decoded(Dataset):
    """Preprocessed images by row; None for one that cannot be read."""

    def __init__(self, images: ImageSet, preprocess: Callable):
        self.images, self.preprocess = images, preprocess

    def __getitem__(self, row: int) -> torch.Tensor | None:
        try:
            image = self.images[row]
        except Exception as error:  # a decoder may raise anything on broken data
            if isinstance(error, MemoryError) or getattr(error, "errno", None) in EXHAUSTED:
                raise  # the machine's trouble, not the file's: stop, and go on later
            return None
        return self.preprocess(image)


def content_digest(images: ImageSet, row: int) -> bytes:
    """A hash of an image's content (file bytes or pixels); of its path when the file cannot be opened."""
    try:
        image = images.images[row]
        if isinstance(images.images, np.ndarray):
            content = image.tobytes() + str(image.shape).encode()
        else:
            crop = "" if images.crops is None else repr(images.crops[row].tolist())
            content = Path(image).read_bytes() + crop.encode()
    except OSError:
        content = f"unreadable {images.images[row]}".encode()
    return hashlib.blake2b(content, digest_size=16).digest()


def drop_unreadable(images: ImageSet, rows: np.ndarray) -> None:
    """Take unreadable images out of the set, in place, and say so once."""
    reasons = []
    for row in rows:
        try:
            images[row]
            reasons.append(images.describe(row))
        except Exception as error:
            reasons.append(f"{images.describe(row)} ({type(error).__name__})")
    total = len(images)
    if len(rows) == total:
        raise ValueError(f"{images.name}: none of the {total} images can be read; the first is {reasons[0]}")
    kept = images.subset(np.setdiff1d(np.arange(total), rows))
    for part in PER_IMAGE:
        setattr(images, part, getattr(kept, part))
    images.left_out += reasons
    shown = ", ".join(reasons[:5]) + (f" and {len(reasons) - 5} more" if len(reasons) > 5 else "")
    message = f"{images.name}: {len(rows)} of {total} images cannot be read and are left out: {shown}"
    warnings.warn(message, stacklevel=3)


# --- neighbours ------------------------------------------------------------------------------------------------------


BLOCK, TILE = 2048, 2048  # queries and gallery rows whose scores are computed at a time: 16 MB for each core


# numpy before 2, which Kaggle has installed, lacks it.
vecdot = getattr(np, "vecdot", None) or (lambda a, b: np.einsum("nd,nd->n", a, b))


def unit_rows(vectors: np.ndarray, what: str = "the vectors", first: int = 0) -> np.ndarray:
    """Rows divided by their length, float32. Raises ValueError for NaN, infinite or zero rows and names the first,
    counted from `first`."""
    vectors = checked(vectors, what, first)
    squares = vecdot(vectors, vectors)
    if not squares.all():
        row = first + int(np.argmin(squares))
        raise ValueError(f"{what}: row {row} is zero and has no direction; leave that image out")
    return vectors if np.allclose(squares, 1, atol=2e-6) else vectors / np.sqrt(squares)[:, None]


def checked(vectors: np.ndarray, what: str = "the vectors", first: int = 0) -> np.ndarray:
    """A contiguous, finite float32 (n, d) array, or a ValueError that says what is wrong where."""
    vectors = np.ascontiguousarray(table_of(vectors, what), dtype=np.float32)
    with np.errstate(over="ignore"):
        squares = vecdot(vectors, vectors)  # not finite where a row is not, and one pass over the data
    if np.isfinite(squares).all():
        return vectors
    finite = np.isfinite(vectors).all(axis=1)
    if finite.all():
        row = first + int(np.argmax(squares))
        raise ValueError(f"{what}: row {row} is too long for float32; scale the vectors down")
    raise ValueError(
        f"{what}: row {first + int(np.argmin(finite))} holds NaN or infinite values ({(~finite).sum()} of {len(finite)} rows do); embed in float32, or leave it out"
    )


def table_of(vectors: np.ndarray, what: str) -> np.ndarray:
    """Numbers of any kind as an array (n, d), not copied where that can be avoided; tensors come from their device."""
    if isinstance(vectors, torch.Tensor):
        vectors = vectors.detach().float().cpu().numpy()
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or 0 in vectors.shape:
        raise ValueError(
            f"{what} must be a non-empty array (n, d), not {vectors.shape}; a single vector is written vector[None]"
        )
    return vectors


def same_dimension(queries: np.ndarray, gallery: np.ndarray, what: str = "queries") -> None:
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"{what} have {queries.shape[1]} dimensions, the gallery {gallery.shape[1]}; embed both with the same encoder"
        )


def search(
    queries: np.ndarray,
    gallery: np.ndarray,
    k: int = 10,
    metric: str = "cosine",
    own: np.ndarray | None = None,
    index: faiss.Index | None = None,
    bias: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest gallery rows of each query: (scores, rows), both (n, k), nearest first. Exact unless `index` is given.

    metric: "cosine" (a similarity: larger is nearer), "inner" (the product of the vectors as they are), "l2" (Euclidean
    distance) or "hamming" (differing bits between the signs of the vectors, as in the GP-NNS notebook). own: (n,) the
    gallery row that is the query itself, which is left out of its results by identity; -1 for none. index: an
    approximate index made by `build_index`; where it finds fewer than k, the remaining rows are -1. bias: (gallery,)
    is subtracted from the scores, see `hub_bias`; an index must hold it already, see `with_bias`.

    With cosine and inner the gallery may be of any size and number type, on disk too: it is read in tiles, and rows of
    equal score come in their order. Raises ValueError for what cannot be searched.
    """
    if np.ndim(queries) == 2 and len(queries) == 0:
        return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
    queries, gallery = table_of(queries, "queries"), table_of(gallery, "the gallery")
    same_dimension(queries, gallery)
    check_k(k, len(gallery) - (own is not None), "gallery images")
    if metric in ("cosine", "inner") and index is None:
        fold = functools.partial(nearest, k=k)
        scores, rows = zip(*fold_scores(queries, gallery, fold, k, metric, bias, own), strict=True)
        return np.concatenate(scores), np.concatenate(rows)
    if bias is not None:
        raise ValueError(
            f"a bias belongs to the metrics cosine and inner and to exact search, not to {metric if index is None else 'an index'}; "
            "build the index from with_bias(gallery, bias) and search it with with_bias(queries), metric='inner'"
        )
    reach = k + (own is not None)
    queries, own = checked(queries, "queries"), checked_own(own, len(queries))
    index = build_index(gallery, "flat", metric) if index is None else checked_index(index, gallery, metric)
    if metric == "hamming":
        scores, rows = index.search(binary_codes(queries), reach)
    else:
        scores, rows = index.search(unit_rows(queries, "queries") if metric == "cosine" else queries, reach)
        scores = np.sqrt(np.maximum(scores, 0)) if metric == "l2" else scores
    if own is None:
        return scores, rows
    # The query's own row goes where it is found; where something else pushed it out, the last neighbour goes.
    own = own[:, None]
    is_own = (rows == own) & (own >= 0)
    is_own[~is_own.any(axis=1), -1] = True
    return scores[~is_own].reshape(len(rows), k), rows[~is_own].reshape(len(rows), k)


def check_k(k: int, available: int, what: str) -> None:
    if not isinstance(k, (int, np.integer)) or not 1 <= k <= available:
        raise ValueError(f"k={k} neighbours cannot be found among {available} {what}; choose k from 1 to {available}")


def checked_own(own: np.ndarray | None, queries: int) -> np.ndarray | None:
    if own is not None and np.shape(own) != (queries,):
        raise ValueError(f"own needs one row number, or -1, for each of {queries} queries, not {np.shape(own)}")
    return None if own is None else np.asarray(own)


def checked_index(index: faiss.Index, gallery: np.ndarray, metric: str) -> faiss.Index:
    """The index, if it can be one of this gallery under this metric; faiss itself would answer wrongly or abort."""
    dimensions = 8 * ((gallery.shape[1] + 7) // 8) if metric == "hamming" else gallery.shape[1]
    if (index.ntotal, index.d) != (len(gallery), dimensions):
        raise ValueError(
            f"the index holds {index.ntotal} rows of {index.d} dimensions, the gallery {len(gallery)} of {dimensions}; build it from this gallery"
        )
    measure = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    if metric != "hamming" and index.metric_type != measure:
        raise ValueError(f"the index was not built for the metric {metric}; use build_index(gallery, kind, {metric!r})")
    return index


def fold_scores(
    queries: np.ndarray,
    gallery: np.ndarray,
    fold: Callable,
    k: int,
    metric: str,
    bias: np.ndarray | None = None,
    own: np.ndarray | None = None,
    what: tuple[str, str] = ("queries", "the gallery"),
) -> Iterator:
    """All scores, computed once and never held: `kept = fold(kept, scores, first)` for each tile, yielded per block.

    scores: float32 (queries of a block, gallery rows of a tile), which fold may overwrite; first: the gallery row of
    the first column; kept: None at first. Tiles of any number type become float32 (unit rows for cosine) as they pass.
    """
    if metric not in ("cosine", "inner"):
        raise ValueError(f"a bias and its references need the metric cosine or inner, not {metric!r}")
    take = unit_rows if metric == "cosine" else checked
    bias = None if bias is None else checked_bias(bias, len(gallery))
    own = checked_own(own, len(queries))
    workers = os.cpu_count() or 1
    span = max(BLOCK, min(16 * BLOCK, 2**21 // k))  # queries at a time: their results are held, and tiles are read anew
    buffers = threading.local()  # each thread writes its tiles into the same memory again

    def advance(kept, start: int, block: np.ndarray, tile: np.ndarray, first: int):
        if not hasattr(buffers, "scores"):
            buffers.scores = np.empty(BLOCK * TILE, np.float32)
        scores = buffers.scores[: len(block) * len(tile)].reshape(len(block), len(tile))
        np.matmul(block, tile.T, out=scores)
        if bias is not None:
            scores -= bias[first : first + len(tile)]
        if own is not None:
            column = own[start : start + len(block)] - first
            inside = np.flatnonzero((column >= 0) & (column < len(tile)))
            scores[inside, column[inside]] = -np.inf
        return fold(kept, scores, first)

    # One product per core, rather than all cores on each product: then they also share the choosing.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(queries), span):
            part = take(queries[start : start + span], what[0], start)
            size = min(BLOCK, -(-len(part) // workers))
            starts = range(0, len(part), size)
            kept = [None] * len(starts)
            for first in range(0, len(gallery), TILE):
                tile = take(gallery[first : first + TILE], what[1], first)
                jobs = [(kept[i], start + at, part[at : at + size], tile, first) for i, at in enumerate(starts)]
                kept = list(pool.map(lambda job: advance(*job), jobs))
            yield from kept


def nearest(kept: tuple | None, scores: np.ndarray, first: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest scores so far and their gallery rows, largest first; of equal scores the first row comes first."""
    queries, width = len(scores), min(k, scores.shape[1])
    if kept is not None and kept[0].shape[1] == k:
        query, row = np.nonzero(scores > kept[0][:, -1:])
    else:
        query, row = np.nonzero(scores >= np.partition(scores, -width, axis=1)[:, -width, None])
    values, row = scores[query, row], row + first
    if kept is not None:
        width = min(k, width + kept[0].shape[1])
        query = np.concatenate([np.arange(queries).repeat(kept[0].shape[1]), query])
        values, row = np.concatenate([kept[0].ravel(), values]), np.concatenate([kept[1].ravel(), row])
    order = np.lexsort((-values, query))  # stable: earlier rows stay in front of equal ones
    query = query[order]
    order = order[np.arange(len(order)) - np.searchsorted(query, query) < width]
    return values[order].reshape(queries, width), row[order].reshape(queries, width)


def hub_bias(
    gallery: np.ndarray,
    references: np.ndarray,
    k: int = 128,
    alpha: float = 0.75,
    metric: str = "cosine",
    own: np.ndarray | None = None,
    index: faiss.Index | None = None,
) -> np.ndarray:
    """Nearest Neighbor Normalization: how much too near each gallery row is to queries in general, float32 (n,).

    The bias is alpha times the mean of the k largest scores of a gallery row with reference queries; subtracted from
    its scores (`search(..., bias=bias)`) it takes hubs back. Source: NNN (2410.24114), equation 1; there alpha is 0.75
    and k 128 for CLIP.

    references: queries that stand for those to come, such as training captions; never the queries one measures on. own:
    (n,) the reference that is the gallery row itself, left out; -1 for none. index: an approximate index of the
    references; blocks in which it finds fewer than k are searched exactly. Raises ValueError for what cannot be used.
    """
    if not np.isfinite(alpha) or alpha < 0:
        raise ValueError(
            f"alpha={alpha} is not a share of the mean score; choose a number from 0, which changes nothing, to about 1.5"
        )
    if index is None:
        return np.float32(alpha) * reference_means(gallery, references, [k], metric, own)[0]
    check_k(k, len(references) - (own is not None), "references")
    means = np.empty(len(gallery), np.float32)
    for start in range(0, len(gallery), BLOCK):
        rows = slice(start, start + BLOCK)
        own_here = None if own is None else checked_own(own, len(gallery))[rows]
        scores, found = search(gallery[rows], references, k, metric, own_here, index)
        if (found < 0).any():  # what an index misses is -1 with a score of minus infinity, which no mean may hold
            scores, _ = search(gallery[rows], references, k, metric, own_here)
        means[rows] = scores.mean(axis=1)
    return np.float32(alpha) * means


def reference_means(
    gallery: np.ndarray,
    references: np.ndarray,
    ks: Sequence[int],
    metric: str = "cosine",
    own: np.ndarray | None = None,
) -> np.ndarray:
    """The mean of each gallery row's k largest scores with the references, for several k in one pass: (len(ks), n).

    Exact; both sides are read in tiles, so that memory grows with neither. `alpha * reference_means(..., [k])[0]` is
    `hub_bias`, so a sweep over k and alpha costs one pass.
    """
    gallery, references = table_of(gallery, "the gallery"), table_of(references, "the references")
    same_dimension(references, gallery, "references")
    for k in ks:
        check_k(k, len(references) - (own is not None), "references")
    means, most, done = np.empty((len(ks), len(gallery)), np.float32), max(ks), 0
    fold = functools.partial(largest, k=most)
    for top in fold_scores(gallery, references, fold, most, metric, own=own, what=("the gallery", "references")):
        sums = np.cumsum(np.sort(top, axis=1)[:, ::-1], axis=1)
        for line, k in zip(means, ks, strict=True):
            line[done : done + len(top)] = sums[:, k - 1] / np.float32(k)
        done += len(top)
    return means


def largest(kept: np.ndarray | None, scores: np.ndarray, first: int, k: int) -> np.ndarray:
    """The k largest scores so far, in any order."""
    if first < 3 * TILE or kept.shape[1] < k:
        width = min(k, scores.shape[1])
        scores.partition(scores.shape[1] - width, axis=1)
        more = scores[:, -width:]
        if kept is None:
            return more.copy()
    else:  # by now few scores are among the largest, and picking those out costs less than a partition
        hit = np.flatnonzero(scores > kept.min(axis=1, keepdims=True))
        query = hit // scores.shape[1]
        counts = np.bincount(query, minlength=len(scores))
        more = np.full((len(scores), counts.max()), -np.inf, np.float32)
        more[query, np.arange(len(hit)) - (counts.cumsum() - counts)[query]] = scores.ravel()[hit]
    both = np.concatenate([kept, more], axis=1)
    both.partition(max(0, both.shape[1] - k), axis=1)
    return both[:, -k:]


def with_bias(vectors: np.ndarray, bias: np.ndarray | None = None, metric: str = "cosine") -> np.ndarray:
    """Vectors with one more dimension, in which an inner product subtracts the bias: float32 (n, d + 1).

    with_bias(gallery, bias) goes into the index, with_bias(queries) asks it: the extra number of a query is -1. Any
    index for inner products then ranks by the corrected score; one for cosine does not, for it undoes the bias.
    """
    vectors = unit_rows(vectors) if metric == "cosine" else checked(vectors)
    extra = np.full(len(vectors), -1, np.float32) if bias is None else checked_bias(bias, len(vectors))
    return np.concatenate([vectors, extra[:, None]], axis=1)


def checked_bias(bias: np.ndarray, size: int) -> np.ndarray:
    """A bias as float32 (size,), or a ValueError."""
    bias = np.asarray(bias, dtype=np.float32)
    if bias.shape != (size,) or not np.isfinite(bias).all():
        raise ValueError(
            f"a bias needs one finite number for each of {size} gallery rows, not {bias.shape}"
            f"{'' if np.isfinite(bias).all() else ' with NaN or infinite values'}; make it with hub_bias(gallery, ...)"
        )
    return bias


def score_matrix(queries: np.ndarray, gallery: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """All cosines, float32 (queries, gallery), less the bias: for those who add up the scores of several models."""
    queries, gallery = unit_rows(queries, "queries"), unit_rows(gallery, "the gallery")
    same_dimension(queries, gallery)
    scores = queries @ gallery.T
    return scores if bias is None else np.subtract(scores, checked_bias(bias, len(gallery)), out=scores)


def build_index(gallery: np.ndarray, kind: str = "hnsw", metric: str = "cosine") -> faiss.Index:
    """A faiss index: "flat" (exact), or approximate: "hnsw" (a graph), "ivf" (cells, a tenth of which are visited).

    Binary codes are so cheap to compare that with the metric "hamming" every kind is exact.
    """
    gallery = checked(gallery, "the gallery")
    n, d = gallery.shape
    if kind not in ("flat", "hnsw", "ivf"):
        raise ValueError(f"unknown kind of index {kind!r}; choose flat, hnsw or ivf")
    if metric == "hamming":
        index, rows = faiss.IndexBinaryFlat(8 * ((d + 7) // 8)), binary_codes(gallery)
    elif metric in ("cosine", "inner", "l2"):
        rows = unit_rows(gallery, "the gallery") if metric == "cosine" else gallery
        measure = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
        cells = max(1, int(np.sqrt(n)))
        recipes = {"flat": "Flat", "hnsw": "HNSW32,Flat", "ivf": f"IVF{cells},Flat"}
        index = faiss.index_factory(d, recipes[kind], measure)
        if kind == "ivf":
            index.cp.min_points_per_centroid = 1  # small galleries are fine here, no need for faiss to warn
            index.nprobe = max(1, cells // 10)
        index.train(rows)
    else:
        raise ValueError(f"unknown metric {metric!r}; choose cosine, inner, l2 or hamming")
    index.add(rows)
    return index


def binary_codes(vectors: np.ndarray) -> np.ndarray:
    """One bit per dimension, its sign: uint8 (n, ceil(d / 8))."""
    return np.packbits(vectors > 0, axis=1)


def neighbour_recall(found: np.ndarray, exact: np.ndarray) -> float:
    """The share of the exact neighbours (n, k) that another search found."""
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, exact, strict=True)]))


# --- scores ----------------------------------------------------------------------------------------------------------


@dataclass
class Score:
    """One value from 0 to 1 per query; the score is their mean. NaN: the query had nothing to find and does not count."""

    per_query: np.ndarray

    @property
    def mean(self) -> float:
        return float(np.nanmean(self.per_query)) if np.isfinite(self.per_query).any() else float("nan")

    def interval(self, clusters: np.ndarray | None = None, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
        """A bootstrap 95 % interval of the mean, resampling queries, or whole clusters of them.

        The images of a class succeed and fail together: pass their labels as `clusters`, or the interval is too narrow.
        """
        there = np.isfinite(self.per_query)
        if not there.any():
            return float("nan"), float("nan")
        members = np.arange(len(there)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
        totals = np.bincount(members[there], self.per_query[there])
        counts = np.bincount(members[there])
        totals, counts = totals[counts > 0], counts[counts > 0]
        rng = np.random.default_rng(seed)
        drawn = (rng.integers(0, len(counts), len(counts)) for _ in range(resamples))
        return tuple(np.percentile([totals[rows].sum() / counts[rows].sum() for rows in drawn], [2.5, 97.5]).tolist())

    def where(self, mask: np.ndarray) -> "Score":
        """The same score over a part of the queries."""
        return Score(self.per_query[mask])


def text_queries(images: ImageSet) -> tuple[list[str], list[np.ndarray]]:
    """Every caption of a set once, in alphabetical order, and for each the rows of the images that carry it."""
    carried = {}
    for row, captions in enumerate(images.captions or []):
        for caption in dict.fromkeys(caption for caption in captions if caption.strip()):
            carried.setdefault(caption, []).append(row)
    return sorted(carried), [np.array(carried[caption]) for caption in sorted(carried)]


def same_label(query_labels: np.ndarray, gallery_labels: np.ndarray) -> list[np.ndarray]:
    """For each query, the gallery rows that carry its label."""
    order = np.argsort(gallery_labels, kind="stable")
    ordered = np.asarray(gallery_labels)[order]
    starts, ends = np.searchsorted(ordered, query_labels, "left"), np.searchsorted(ordered, query_labels, "right")
    return [order[a:b] for a, b in zip(starts, ends, strict=True)]


def rank_relevant(
    queries: np.ndarray,
    gallery: np.ndarray,
    relevant: Sequence,
    leave_out: Sequence | None = None,
    ties: str = "group",
    bias: np.ndarray | None = None,
) -> np.ndarray:
    """The rank of every relevant gallery row in each query's full ranking: float64 (n, r), ascending, padded with inf.

    Every score below is a function of these ranks. No list is ever sorted: the rank of a row is the number of rows
    that score at least as high, counted while the matrix product of unit rows passes by in small blocks.

    relevant: for each query, the gallery rows to find. leave_out: for each query, rows that do not take part: the
    query itself, junk (-1 for none); they are taken out of `relevant` too. ties: "group" ranks rows of equal score at the end of
    their group, as scikit-learn does; "optimistic" and "pessimistic" put the relevant ones first or last, which
    bounds what any order of ties can give. bias: (gallery,) is subtracted from the scores, see `hub_bias`.
    """
    queries, gallery = unit_rows(queries, "queries"), unit_rows(gallery, "the gallery")
    same_dimension(queries, gallery)
    if ties not in ("group", "optimistic", "pessimistic"):
        raise ValueError(f"unknown rule for ties {ties!r}; choose group, optimistic or pessimistic")
    if len(relevant) != len(queries) or (leave_out is not None and len(leave_out) != len(queries)):
        raise ValueError(
            f"{len(queries)} queries need as many lists of relevant rows (and of rows to leave out), not {len(relevant)}"
        )
    bias = 0 if bias is None else checked_bias(bias, len(gallery))
    workers = os.cpu_count() or 1
    block = max(1, min(256, 2**23 // (workers * len(gallery))))  # at most 32 MB of scores at a time

    def rank_block(start: int) -> list[np.ndarray]:
        scores = queries[start : start + block] @ gallery.T
        scores -= bias
        found = []
        for query, row in enumerate(scores, start):
            if leave_out is not None:
                absent = np.asarray(leave_out[query], dtype=int)
                row[absent[absent >= 0]] = -np.inf
            wanted = row[np.unique(np.asarray(relevant[query], dtype=int))]  # one that is listed twice counts once
            found.append(count_ranks(row, wanted if leave_out is None else wanted[wanted > -np.inf], ties))
        return found

    # One product per core, rather than all cores on each product: then they also share the counting.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
        found = [ranks for part in pool.map(rank_block, range(0, len(queries), block)) for ranks in part]
    ranks = np.full((len(found), max(1, *map(len, found))), np.inf)
    for query, values in enumerate(found):
        ranks[query, : len(values)] = values
    return ranks


def count_ranks(row: np.ndarray, wanted: np.ndarray, ties: str) -> np.ndarray:
    """Ranks of the scores `wanted` among all scores of `row`, ascending; both come from one matrix product."""
    if len(wanted) == 0:
        return wanted
    wanted = np.sort(wanted)[::-1]
    counts = count_above(row, wanted, strict=ties == "optimistic")
    if ties == "group":
        return counts
    return counts - count_above(wanted, wanted, strict=ties == "optimistic") + np.arange(1, len(wanted) + 1)


def count_above(row: np.ndarray, wanted: np.ndarray, strict: bool) -> np.ndarray:
    """How many scores of `row` are at least (strict: above) each of `wanted`, which descends."""
    rivals = row.compress(row >= wanted[-1])  # only scores from the lowest wanted one up matter, mostly they are few
    if len(rivals) * 12 < len(row) or len(wanted) > 16:
        rivals.sort()
        return len(rivals) - rivals.searchsorted(wanted, "right" if strict else "left")
    above = np.greater if strict else np.greater_equal
    return np.array([np.count_nonzero(above(rivals, score)) for score in wanted])


def mean_average_precision(ranks: np.ndarray, k: int | None = None, denominator: str = "relevant") -> Score:
    """Average precision per query from the ranks of `rank_relevant`: non-interpolated, as in GPR1200 and scikit-learn.

    With k, only ranks up to k count, and tools divide by different things: "relevant" (r, pytorch-metric-learning and
    trec_eval), "min" (min(r, k), GLDv2 and UnED) or "hits" (those found, torchmetrics), which rewards finding less.
    """
    number = np.isfinite(ranks).sum(axis=1)
    hits = np.tile(np.arange(1.0, ranks.shape[1] + 1), (len(ranks), 1))
    for j in range(ranks.shape[1] - 2, -1, -1):  # equal ranks count as found together
        hits[:, j] = np.where(ranks[:, j] == ranks[:, j + 1], hits[:, j + 1], hits[:, j])
    counted = np.isfinite(ranks) if k is None else ranks <= k
    total = np.where(counted, hits / ranks, 0).sum(axis=1)
    choices = {"relevant": number, "min": np.minimum(number, k or np.inf), "hits": np.maximum(counted.sum(axis=1), 1)}
    if denominator not in choices:
        raise ValueError(f"unknown denominator {denominator!r}; choose relevant, min or hits")
    return Score(np.where(number, total / np.maximum(choices[denominator], 1), np.nan))


def recall_at_k(ranks: np.ndarray, k: int = 1) -> Score:
    """1 for a query with a relevant row among the first k, else 0 (R@k of the retrieval papers: "hit at k")."""
    return Score(np.where(np.isfinite(ranks[:, 0]), ranks[:, 0] <= k, np.nan))


def mean_precision_at_5(ranks: np.ndarray) -> Score:
    """Relevant rows among the first m, divided by m, where m = min(r, 5): the measure of the GUIE challenge (2210.11141,
    section 1) and of UnED. With two rows to find, one at rank 4 counts for nothing."""
    most = np.minimum(np.isfinite(ranks).sum(axis=1), 5)
    return Score(np.where(most, (ranks <= most[:, None]).sum(axis=1) / np.maximum(most, 1), np.nan))


def revisited_map(queries: np.ndarray, gallery: np.ndarray, ground_truth: Sequence[dict]) -> dict[str, Score]:
    """Revisited Oxford / Paris mAP: {"easy", "medium", "hard"} -> Score. Source: Radenovic et al., CVPR 2018.

    ground_truth: per query a dict of gallery rows under "easy", "hard" and "junk". What a protocol neither wants nor
    counts as wrong is taken out of the ranking; precision is averaged over each step of recall (trapezoid).
    """
    protocols = {
        "easy": (["easy"], ["junk", "hard"]),
        "medium": (["easy", "hard"], ["junk"]),
        "hard": (["hard"], ["junk", "easy"]),
    }

    def rows_of(kinds: list[str]) -> list[np.ndarray]:
        return [np.concatenate([np.asarray(truth[kind], dtype=int) for kind in kinds]) for truth in ground_truth]

    scores = {}
    for name, (wanted, ignored) in protocols.items():
        ranks = rank_relevant(queries, gallery, rows_of(wanted), leave_out=rows_of(ignored), ties="pessimistic")
        scores[name] = trapezoid_average_precision(ranks)
    return scores


def trapezoid_average_precision(ranks: np.ndarray) -> Score:
    """Average precision with each precision averaged with the one just before the rank, as revisitop computes it."""
    number = np.isfinite(ranks).sum(axis=1)
    hits = np.arange(1.0, ranks.shape[1] + 1)
    before = np.where(ranks > 1, (hits - 1) / np.maximum(ranks - 1, 1), 1.0)
    total = np.where(np.isfinite(ranks), (before + hits / ranks) / 2, 0).sum(axis=1)
    return Score(np.where(number, total / np.maximum(number, 1), np.nan))


def knn_accuracy(
    queries: np.ndarray,
    query_labels: np.ndarray,
    gallery: np.ndarray,
    gallery_labels: np.ndarray,
    k: int = 21,
    temperature: float = 0.1,
    own: np.ndarray | None = None,
) -> Score:
    """Accuracy of a vote among the k nearest, each weighted by exp(cosine / temperature).

    k=21 and 0.1 as in MCIP (2409.01936); DINO uses 0.07. k is cut to the size of the gallery.
    """
    k = min(k, len(gallery) - (own is not None))
    scores, rows = search(queries, gallery, k, own=own)
    classes, votes_for = np.unique(gallery_labels, return_inverse=True)
    weights = np.exp((scores - 1) / temperature)  # minus 1 changes no vote and keeps exp small
    votes = np.zeros((len(queries), len(classes)))
    np.add.at(votes, (np.arange(len(queries))[:, None], votes_for[rows]), weights)
    return Score((classes[votes.argmax(axis=1)] == np.asarray(query_labels)).astype(float))


def text_to_image_recall(texts: np.ndarray, images: np.ndarray, relevant: Sequence, k: int = 1) -> Score:
    """R@k of text queries: 1 where any of a text's relevant images is among the k nearest."""
    return recall_at_k(rank_relevant(texts, images, relevant), k)


def class_embeddings(
    encoder: Encoder, names: Sequence[str], templates: Sequence[str] = ("a photo of {}",)
) -> np.ndarray:
    """One text embedding per class: the mean over prompt templates of unit embeddings, made unit again (CLIP, section 3.1)."""
    texts = [template.format(name) for name in names for template in templates]
    means = embed_texts(encoder, texts).reshape(len(names), len(templates), -1).mean(axis=1)
    return unit_rows(means, "class embeddings")


def zero_shot_accuracy(images: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> Score:
    """Accuracy of giving each image the class whose text embedding is nearest. labels: rows of `classes`."""
    _, nearest = search(images, classes, k=1)
    return Score((nearest[:, 0] == np.asarray(labels)).astype(float))


def hubness(
    queries: np.ndarray, gallery: np.ndarray, k: int = 10, own: np.ndarray | None = None, bias: np.ndarray | None = None
) -> tuple[float, np.ndarray]:
    """How unevenly images are found: (skewness, counts), counts[i] = in how many queries' first k row i appears.

    A skewness near 0 means that all rows are found about equally often; hubs, found by far too many queries, make it
    large (Radovanovic et al., JMLR 2010).
    """
    _, rows = search(queries, gallery, k, own=own, bias=bias)
    counts = np.bincount(rows.ravel(), minlength=len(gallery))
    spread = counts.std()
    return float(((counts - counts.mean()) ** 3).mean() / spread**3) if spread else 0.0, counts


# --- fine-tuning -----------------------------------------------------------------------------------------------------

NO_LABELS = "has no labels: put each class into a folder of its own, or add a column 'label'"


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
    batch and about this many others only (Partial FC, 2010.05222); time and memory of a step then do not depend on the
    number of classes, and `fit` updates only the rows that took part.
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
        with torch.autocast(embeddings.device.type, enabled=False):  # half precision would round the margin away
            margin = self.margin[labels] if self.margin.ndim else self.margin
            proxies = self.proxies
            if self.sampled and self.training:
                rows, labels = self.draw(labels)
                proxies = F.embedding(rows, proxies, sparse=True)
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


def split_classes(images: ImageSet, share: float, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Cut off `share` of the classes, at least two: (the rest, those). Select models on them, not on a benchmark.

    Only classes with two images or more are cut off, because a single image has nothing to find. Raises ValueError
    without labels, or when there are too few classes for both sides.
    """
    if images.labels is None:
        raise ValueError(f"{images.name} {NO_LABELS}")
    classes, counts = np.unique(images.labels, return_counts=True)
    measurable = classes[counts > 1]
    number = max(2, min(round(share * len(classes)), len(measurable)))
    if len(classes) - number < 2 or len(measurable) < 2:
        raise ValueError(
            f"{images.name} has {len(classes)} classes; at least {number + 2} are needed, {number} of them, with two images or more, to measure on: add classes"
        )
    held = np.isin(images.labels, np.random.default_rng(seed).choice(measurable, number, replace=False))
    return images.subset(~held), images.subset(held)


def load_splits(train_images: str | Path, test_images: str | Path = "", seed: int = 0) -> tuple[ImageSet, ...]:
    """Labelled images to learn from, to choose on and to measure on: three sets without a class in common.

    "mini" brings its own three. Of other images a tenth of the classes is cut off to choose on and, without
    `test_images`, a fifth to measure on. Raises ValueError without labels, for too few classes, and when classes of
    `test_images` are trained on.
    """
    train = load_images(train_images, "train")
    if train_images == "mini":
        if test_images:
            raise ValueError("test_images belong to train_images of your own; the drawn world brings its test")
        return train, load_images("mini", "validation"), load_images("mini", "test")
    if train.labels is None:
        raise ValueError(f"{train_images} {NO_LABELS}")
    if test_images:
        test = load_images(test_images, "test")
        if test.labels is None or (np.unique(test.labels, return_counts=True)[1] > 1).sum() < 2:
            raise ValueError(f"{test_images} needs labels and at least two classes with two images each, to measure on")
        if shared := sorted(set(test.names) & set(train.names)):
            raise ValueError(
                f"{len(shared)} classes are trained on and measured on, for example {shared[0]}: take them out of one"
            )
    else:
        train, test = split_classes(train, 0.2, seed)
    return *split_classes(train, 0.1, seed), test


def image_to_image(encoder: Encoder, images: ImageSet) -> Score:
    """mAP of finding an image's class among all other images; classes with one image have nothing to find."""
    if encoder.model is not None:
        encoder.model.eval()
    embeddings = embed_images(encoder, images, cache=False)
    relevant = same_label(images.labels, images.labels)
    own = np.arange(len(images))[:, None]
    return mean_average_precision(rank_relevant(embeddings, embeddings, relevant, leave_out=own))


def training_transform(encoder: Encoder, flip: float = 0.5, jitter: float = 0.4) -> transforms.Compose:
    """Random views for training, as GP-NNS makes them: a square of 1.125 times the size, of which a random crop is
    taken, mirrored with probability `flip`, its brightness, contrast and saturation changed by up to `jitter`."""
    size = encoder.image_size
    square = (int(1.125 * size),) * 2
    known = getattr(encoder.preprocess, "transforms", None)
    if known is None:
        raise ValueError(f"how {encoder.name} scales its pixels is not known; write a transform for its training views")
    return transforms.Compose([
        transforms.Resize(square, transforms.InterpolationMode.BICUBIC),
        transforms.RandomCrop(size),
        transforms.RandomHorizontalFlip(flip),
        transforms.ColorJitter(jitter, jitter, jitter),
        transforms.ToTensor(),
        *[step for step in known if isinstance(step, transforms.Normalize)],
    ])  # fmt: skip


class TrainingImages(Dataset):
    """(view, class number) by row; class numbers run from 0. Raises ValueError for a file that cannot be read."""

    def __init__(self, images: ImageSet, transform: Callable[[Image.Image], torch.Tensor]):
        if images.labels is None:
            raise ValueError(f"{images.name} {NO_LABELS}")
        self.images, self.transform = images, transform
        self.names, self.labels = np.unique(images.labels, return_inverse=True)
        if len(self.names) < 2:
            raise ValueError(f"{images.name} has only one class; fine-tuning tells classes apart, so add another")

    def __len__(self) -> int:
        return len(self.images)

    def describe(self) -> bytes:
        """All that decides what is learned: pixels or paths, labels, and how views are made."""
        images = self.images.images
        content = np.asarray(images).tobytes() if isinstance(images, np.ndarray) else repr(images).encode()
        content += b"" if self.images.crops is None else self.images.crops.tobytes()
        return content + self.labels.tobytes() + repr(self.transform).encode()

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        try:
            image = self.images[row]
        except Exception as error:
            raise ValueError(
                f"cannot read {self.images.describe(row)} ({type(error).__name__}); `embed_images` takes such files out of a set"
            ) from error
        return self.transform(image), int(self.labels[row])


class ImageObjective(torch.nn.Module):
    """What `fit` makes small: loss(embeddings of a batch of images, their class numbers)."""

    def __init__(self, encoder: Encoder, loss: torch.nn.Module):
        super().__init__()
        if encoder.model is None:
            raise ValueError(f"{encoder.name} has no weights to train; choose mini, open_clip:... or timm:...")
        self.encoder, self.model, self.loss = encoder, encoder.model, loss

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.loss(self.encoder.image_tower(images), labels)


def image_parameters(encoder: Encoder, rate: float, layer_decay: float = 1.0, weight_decay: float = 0.01) -> list[dict]:
    """Groups for `fit` of all that takes part in embedding an image; the text tower is not among them and stays as it is.

    layer_decay: each block learns this many times as fast as the one after it (timm's rule; patch and position
    embeddings count as the lowest). Biases and norms do not decay. A head of `add_head` is not among them: it is new,
    and learns at a rate of its own.
    """
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


def drop_patches(encoder: Encoder, share: float) -> bool:
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


class Repeatable(Dataset):
    """A dataset in which an item's randomness depends on (seed, draw, row) alone, not on workers or earlier items."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        draw, row = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix(self.seed, draw, row))
            return row, self.dataset[row]


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


def fit(
    objective: torch.nn.Module,
    dataset: Dataset,
    folder: str | Path,
    groups: list[dict],
    epochs: float = 1,
    batch_size: int = 128,
    accumulate: int = 1,
    warmup: int = 0,
    clip: float = 1.0,
    balance: np.ndarray | None = None,
    ema: float | None = None,
    validate: Callable[[], float] | None = None,
    validate_every: int | None = None,
    save_every: int = 500,
    seed: int = 0,
    workers: int | None = None,
    draw: bool = False,
) -> list[dict]:
    """Train: AdamW, rates on a cosine per step, on one device or several, resumable at any step.

    objective(*batch) is the mean loss of a batch, as the default collation of `dataset`'s items makes it. groups: what
    is trained, as {"params", "lr", "weight_decay"}; everything else is frozen and, where a whole module is, in
    evaluation mode: train in stages by calling `fit` once per stage. batch_size: images per batch over all processes;
    `accumulate` batches make a step. clip: the largest gradient norm of each child of the objective. balance: labels
    by row, to draw classes equally often. ema: decay of an average of the weights, which is then validated and kept.
    validate() -> per cent, higher is better: called every `validate_every` steps (default: each epoch), on classes
    that are not trained on; the best weights are kept, without it the last. draw: show the curves while they grow.

    Files go to `folder`/<a hash of settings, first weights, images and loss>: checkpoints, `log.jsonl`, best weights.
    The same call with the same first weights (seed torch before you build the proxies, build everything anew) goes on
    where a killed one stopped, with the same bits on a CPU, and is done at once when it was done.

    Returns the log, also written as JSON lines: step, epoch, loss, rate, gradient, images_per_second, validation.
    Raises FloatingPointError when the loss is not finite, OSError when a checkpoint cannot be written; earlier
    checkpoints stay.
    """
    device = next(objective.parameters()).device
    precision = {torch.float16: "fp16", torch.bfloat16: "bf16", None: "no"}[best_precision(device)]
    patience = accelerate.InitProcessGroupKwargs(timeout=timedelta(hours=12))  # others wait while one validates
    accelerator = accelerate.Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=precision,
        gradient_accumulation_steps=accumulate,
        kwargs_handlers=[patience],
    )
    processes, main = accelerator.num_processes, accelerator.is_main_process
    per_epoch = len(dataset) // batch_size / accumulate
    if per_epoch < 1:
        raise ValueError(
            f"{len(dataset)} images do not fill one step of {accumulate} x {batch_size}; choose a smaller batch_size"
        )
    if batch_size % processes:
        raise ValueError(f"batch_size {batch_size} cannot be shared by {processes} processes; choose a multiple")
    steps = max(1, round(epochs * per_epoch))
    validate_every, log_every = validate_every or round(per_epoch), max(1, steps // 100)

    repeatable = Repeatable(dataset, seed)
    groups = [{**group, "params": list(group["params"])} for group in groups]
    optimizers = make_optimizers(objective.to(accelerator.device), groups)
    settings = [steps, batch_size, accumulate, warmup, clip, ema, seed, validate_every, precision]
    settings.append(None if balance is None else np.asarray(balance).tolist())
    for value in objective.state_dict().values():
        value.copy_(accelerate.utils.broadcast(value))  # processes may have drawn other first weights
    folder = Path(folder) / training_key(objective, repeatable, groups, settings)
    schedules = [CosineLRScheduler(optimizer, steps, warmup_t=warmup, t_in_epochs=False) for optimizer in optimizers]
    average = ModelEmaV3(objective, decay=ema) if ema else None
    wrapped = accelerator.prepare(objective)
    optimizers = [accelerator.prepare(optimizer) for optimizer in optimizers]
    if average:
        accelerator.register_for_checkpointing(average)
    found = sorted(folder.glob("step_*"))
    step = int(found[-1].name.removeprefix("step_")) if found else 0
    if found:
        accelerator.load_state(str(found[-1]))
    log = [row for row in read_log(folder / "log.jsonl") if row["step"] <= step]
    best = max((row["validation"] for row in log if "validation" in row), default=-np.inf)

    first, last = step * accumulate, steps * accumulate
    share = batches(len(dataset), batch_size, first, last, seed, balance, accelerator.process_index, processes)
    if workers is None:
        workers = decoders(dataset.images) if isinstance(dataset, TrainingImages) else 0
    loader = DataLoader(repeatable, batch_sampler=share, num_workers=workers)
    progress = Progress(steps * batch_size * accumulate, "training", done=step * batch_size * accumulate)
    picture, drawn, losses, started = None, 0.0, [], time.time()
    set_training(objective)
    for number, (rows, batch) in enumerate(loader, first):
        for schedule in schedules:
            schedule.step_update(step)
        torch.manual_seed(mix(seed, number, accelerator.process_index))  # a resumed run drops out the same
        with accelerator.accumulate(wrapped):
            loss = wrapped(*accelerate.utils.send_to_device(batch, accelerator.device))
            losses.append(finite(accelerator, loss, "loss", step, rows, folder))
            accelerator.backward(loss)
        if not accelerator.sync_gradients:
            continue
        gradient = clip_gradients(accelerator, objective, clip)
        if precision != "fp16":  # its scaler skips a step whose gradient overflows
            finite(accelerator, gradient, "gradient", step, rows, folder)
        take_step(accelerator, [optimizer.optimizer for optimizer in optimizers])
        step += 1
        if main:
            progress.update(step * batch_size * accumulate)
        if average:
            average.update(objective)
        checking = validate and (step % validate_every == 0 or step == steps)
        if checking or step % log_every == 0 or step == steps:
            row = {"step": step, "epoch": step / per_epoch, "loss": float(np.mean(losses))}
            row["gradient"] = gradient.item() if torch.isfinite(gradient) else None
            row["rate"] = max(group["lr"] for optimizer in optimizers for group in optimizer.param_groups)
            row["images_per_second"] = len(losses) * batch_size / (time.time() - started)
            if checking:
                row["validation"] = validated(accelerator, objective, average, validate)
                if row["validation"] > best and main:
                    save_weights(average.module if average else objective, folder / "best.safetensors")
                best = max(best, row["validation"])
            log.append(row)
            if main:
                write_atomically(folder / "log.jsonl", lambda file: file.write(as_lines(log)))
                if draw and time.time() - drawn > 5:  # a figure takes as long as a step or two
                    picture, drawn = draw_training(log, picture), time.time()
            losses, started = [], time.time()
        if step % save_every == 0 or step == steps:
            save_state(accelerator, folder, step)
    if draw and main:
        draw_training(log, picture)
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    accelerator.free_memory()
    if validate:
        fill(objective, load_file(folder / "best.safetensors"), str(folder))
    elif average:
        fill(objective, average.module.state_dict(), str(folder))
    objective.eval()
    return log


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


def make_optimizers(objective: torch.nn.Module, groups: list[dict]) -> list[torch.optim.Optimizer]:
    """Freeze what no group holds; AdamW for the rest, SparseAdam for the proxies of which only a sample takes part."""
    chosen = {id(value) for group in groups for value in group["params"]}
    sampled = {id(part.proxies) for part in objective.modules() if isinstance(part, ArcMargin) and part.sampled}
    for value in objective.parameters():
        value.requires_grad_(id(value) in chosen)
    # Not every backend of DistributedDataParallel averages sparse gradients: `clip_gradients` does.
    alone = [key for key, value in objective.named_parameters() if id(value) in sampled]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, alone)
    optimizers = []
    for kind, wanted in ((torch.optim.AdamW, False), (torch.optim.SparseAdam, True)):
        parts = [{**group, "params": [v for v in group["params"] if (id(v) in sampled) == wanted]} for group in groups]
        if any(part["params"] for part in parts):
            optimizers.append(kind([part for part in parts if part["params"]]))
    if not optimizers:
        raise ValueError("no group holds a parameter, so there is nothing to train")
    return optimizers


def training_key(objective: torch.nn.Module, dataset: Repeatable, groups: list, settings: list) -> str:
    """A hash that tells one training from another: settings, first weights, images, labels, and a first loss."""
    names = {id(value): name for name, value in objective.named_parameters()}
    about = [group | {"params": [names.get(id(value)) for value in group["params"]]} for group in groups]
    plain = (bool, int, float, str, tuple, type(None))  # settings that a module keeps to itself, such as dropout rates
    modules = [{k: v for k, v in vars(m).items() if isinstance(v, plain)} for m in objective.eval().modules()]
    digest = hashlib.blake2b(repr([settings, about, modules, repr(objective)]).encode(), digest_size=6)
    digest.update(weights_digest(objective))
    if hasattr(dataset.dataset, "describe"):
        digest.update(dataset.dataset.describe())
    count = len(dataset.dataset)
    rows = np.linspace(0, count - 1, min(count, 8)).astype(int)
    _, batch = torch.utils.data.default_collate([dataset[0, int(row)] for row in rows])
    for part in batch:
        digest.update(part.numpy().tobytes() if isinstance(part, torch.Tensor) else repr(part).encode())
    with torch.no_grad():
        device = next(objective.parameters()).device
        digest.update(f"{objective(*accelerate.utils.send_to_device(batch, device)).item():.3g}".encode())
    return digest.hexdigest()


def set_training(objective: torch.nn.Module) -> None:
    """Training mode, except for modules that are frozen as a whole."""
    objective.train()
    for module in objective.modules():
        if (values := list(module.parameters())) and not any(value.requires_grad for value in values):
            module.eval()


def finite(accelerator, value: torch.Tensor, what: str, step: int, rows: torch.Tensor, folder: Path) -> float:
    """The mean over processes of a value that must be finite, or FloatingPointError in all of them."""
    values = accelerator.gather(value.detach().reshape(1)).tolist()
    if not np.isfinite(values).all():
        good = sorted(folder.glob("step_*"))
        raise FloatingPointError(
            f"the {what} became {values} at step {step + 1}, with the batch of rows {accelerate.utils.gather_object(rows.tolist())}. Look at those images, or lower the rates. "
            + (f"The last good checkpoint is {good[-1]}" if good else "No checkpoint had been written yet")
        )
    return float(np.mean(values))


def clip_gradients(accelerator, objective: torch.nn.Module, clip: float) -> torch.Tensor:
    """Scale the gradient of each child of the objective down to the norm `clip`; the largest norm there was."""
    for value in objective.parameters():
        if value.grad is not None and value.grad.is_sparse:
            gradient = value.grad.coalesce()  # every process drew the same rows
            mean = accelerator.reduce(gradient.values(), "mean")
            known = {"is_coalesced": True, "check_invariants": False}
            value.grad = torch.sparse_coo_tensor(gradient.indices(), mean, gradient.shape, **known)
    accelerator.unscale_gradients()
    norms = []
    for part in [child.parameters() for child in objective.children()] + [objective.parameters(recurse=False)]:
        gradients = [value.grad for value in part if value.grad is not None]
        gradients = [gradient._values() if gradient.is_sparse else gradient for gradient in gradients]
        if gradients:  # torch's own clip_grad_norm_ knows no sparse gradients
            norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm())
            for gradient in gradients:
                gradient.mul_((clip / (norms[-1] + 1e-6)).clamp(max=1))
    return torch.stack(norms).max()


def take_step(accelerator, optimizers: list[torch.optim.Optimizer]) -> None:
    """One step of each; the scaler of half precision is updated once, after all of them, as torch asks for."""
    for optimizer in optimizers:
        if accelerator.scaler:
            accelerator.scaler.step(optimizer)
        else:
            optimizer.step()
        optimizer.zero_grad()
    if accelerator.scaler:
        accelerator.scaler.update()


def validated(accelerator, objective, average: ModelEmaV3 | None, validate: Callable[[], float]) -> float:
    """validate() of the averaged weights if there are any; computed by the first process, known to all."""
    objective.eval()
    if average:
        exchange(objective, average.module)
    try:
        value = [validate() if accelerator.is_main_process else None]
    finally:
        if average:
            exchange(objective, average.module)
    accelerate.utils.broadcast_object_list(value)
    set_training(objective)
    if not np.isfinite(value[0]):
        raise ValueError("validation gave no score; at least two classes with two images each are needed to measure on")
    return float(value[0])


def exchange(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Swap the weights of two equal modules."""
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)


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
        raise disk_error(final, error, f"{good[-1]} is intact" if good else "there is no earlier one") from error
    accelerator.wait_for_everyone()


def save_weights(module: torch.nn.Module, path: Path, metadata: dict[str, str] | None = None) -> None:
    """A module's state dict as safetensors, atomically."""
    state = {key: value.detach().cpu().clone().contiguous() for key, value in module.state_dict().items()}
    write_atomically(path, lambda file: file.write(safetensors_bytes(state, metadata)))


def as_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def draw_training(log: list[dict], handle=None):
    """The log as curves by epoch, drawn over the picture of `handle`; returns the handle (None outside a notebook)."""
    if not in_notebook():
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
    return display_over(handle, figure)


# --- results ---------------------------------------------------------------------------------------------------------

PACKAGES = (torch, open_clip, timm, faiss, np)  # whose versions are noted beside results


def result_row(
    model: str,
    task: str,
    metric: str,
    score: Score,
    clusters: np.ndarray | None = None,
    group: str = "all",
    split: str = "test",
) -> dict:
    """One line of a results file: a score from 0 to 100 with its interval."""
    low, high = score.interval(clusters)
    row = {"model": model, "task": task, "split": split, "group": group, "metric": metric}
    numbers = {"value": score.mean, "low": low, "high": high}
    return row | {key: round(100 * number, 3) for key, number in numbers.items()} | {"seeds": 1}


def save_results(run: Run, notebook: str, rows: list[dict], headline: str) -> Path:
    """Write runs/<profile>/<notebook>.json: what ran, where, how long, one line to remember, one tidy row per number."""
    environment = {"python": platform.python_version(), "device": str(run.device), "platform": run.platform}
    environment |= {"seed": run.seed} | {package.__name__: package.__version__ for package in PACKAGES}
    result = {"notebook": notebook, "profile": run.profile, "seconds": round(time.time() - run.started, 1)}
    result |= {"headline": headline, "environment": environment, "rows": rows}
    path = run.folder / f"{notebook}.json"
    write_atomically(path, lambda file: file.write((json.dumps(result, indent=1) + "\n").encode()))
    return path


def load_published(name: str) -> list[dict]:
    """A table of the papers, data/published/<name>.csv: one dict per row, numbers as float, empty cells as None."""
    path = DATA / "published" / f"{name}.csv"
    if not path.exists():
        raise FileNotFoundError(
            f"no published table {name!r}; there are {', '.join(sorted(p.stem for p in path.parent.glob('*.csv')))}"
        )
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: None if value == "" else number_or_text(value) for key, value in row.items()} for row in rows]


# --- pictures --------------------------------------------------------------------------------------------------------

RIGHT, WRONG = "#009E73", "#D55E00"  # green and red that color-blind readers tell apart (Okabe and Ito)
PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000"]
STYLE = {
    "figure.dpi": 90, "figure.constrained_layout.use": True, "font.size": 11, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False,
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE), "image.interpolation": "antialiased",
}  # fmt: skip


def show_images(
    rows: Sequence[Sequence],
    titles: Sequence[Sequence[str]] | None = None,
    frames: Sequence[Sequence] | None = None,
    labels: Sequence[str] = (),
    size: float = 0.8,
) -> Picture:
    """A grid of images with optional titles and frame colors per image, and a label per row.

    Returned as a JPEG, which keeps a notebook with many photographs small.
    """
    columns = max(map(len, rows))
    margin = 0.1 * max([len(line) for label in labels for line in label.split("\n")], default=0)
    tall = size * (1.28 if titles else 1.05)
    width, height = columns * size + margin, len(rows) * tall
    figure = plt.figure(figsize=(width, height), layout="none")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            left, bottom = margin + j * size, (len(rows) - 1 - i) * tall
            box = np.array([left + 0.05 * size, bottom + 0.04 * size, 0.9 * size, 0.9 * size])
            axis = figure.add_axes(box / [width, height, width, height])
            axis.imshow(np.asarray(image))
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            color = frames[i][j] if frames else None
            for spine in axis.spines.values():
                spine.set(visible=color is not None, color=color or "white", linewidth=3.5)
            if titles and titles[i][j]:
                axis.set_title(titles[i][j], fontsize=9.5, pad=3)
        if i < len(labels):
            figure.text(0.05 / width, (bottom + 0.5 * size) / height, labels[i], fontsize=11, va="center")
    return as_jpeg(figure)


def as_jpeg(figure) -> Picture:
    """A finished figure as a JPEG picture for the end of a cell; the figure itself is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpeg", dpi=78, pil_kwargs={"quality": 60, "optimize": True})
    plt.close(figure)
    return Picture(buffer.getvalue(), format="jpeg")


def show_neighbors(
    queries: Sequence,
    gallery: ImageSet,
    rows: np.ndarray,
    scores: np.ndarray | None = None,
    right: np.ndarray | None = None,
) -> Picture:
    """Queries and their neighbours, one line each. queries: PIL images or strings. rows, scores, right: (n, k).

    Right neighbours have a green frame and a check mark, wrong ones a red frame and a cross.
    """
    texts = [re.sub(" (with|and) ", r"\n\1 ", query) if isinstance(query, str) else "" for query in queries]
    form = "{} bits" if scores is not None and scores.dtype.kind != "f" else "{:.2f}"
    lines, titles, frames = [], [], []
    for i, query in enumerate(queries):
        judged = [None] * len(rows[i]) if right is None else right[i]
        first = [] if isinstance(query, str) else [query]
        lines.append(first + [gallery[row] for row in rows[i]])
        frames.append([None] * len(first) + [None if good is None else RIGHT if good else WRONG for good in judged])
        marks = ["" if good is None else "✓ " if good else "✗ " for good in judged]
        numbers = [""] * len(marks) if scores is None else [form.format(score) for score in scores[i]]
        titles.append(["query"] * len(first) + [mark + number for mark, number in zip(marks, numbers, strict=True)])
    return show_images(lines, titles, frames, texts if any(texts) else ())


def live_picture(draw: Callable[..., Picture], controls: dict[str, widgets.Widget]) -> widgets.VBox:
    """Controls, and below them the picture that `draw(**values)` makes, anew on every move.

    The picture is a widget itself: the Output widget of `interact` hides exceptions, and in batch it sometimes blocks
    for ever (nbclient issue 312).
    """
    picture = widgets.Image(format="jpeg", layout={"align_self": "flex-start", "max_width": "100%"})  # never enlarged

    def refresh(_=None) -> None:
        picture.value = draw(**{name: control.value for name, control in controls.items()}).data

    for control in controls.values():
        control.observe(refresh, "value")
    refresh()
    return widgets.VBox([*controls.values(), picture])


def show_table(rows: Sequence[dict], caption: str = "", best: Sequence[str] = ()) -> HTML:
    """Dicts as a table: numbers with one decimal, None as an empty cell, the largest of each column in `best` in bold."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    top = {key: max((row[key] for row in rows if isinstance(row.get(key), (int, float))), default=None) for key in best}

    def cell(row: dict, column: str) -> str:
        value = row.get(column)
        text = "" if value is None else html.escape(str(value))
        text = f"{value:.1f}" if isinstance(value, (float, np.floating)) else text
        text = f"<b>{text}</b>" if column in top and value == top[column] else text
        return f"<td style='text-align:{'left' if isinstance(value, str) else 'right'}'>{text}</td>"

    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(cell(row, column) for column in columns) + "</tr>" for row in rows)
    return HTML(f"<table><caption>{html.escape(caption)}</caption><tr>{head}</tr>{body}</table>")
