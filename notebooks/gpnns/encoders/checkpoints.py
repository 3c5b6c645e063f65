"""Files of weights: what a file is, the state dict in it under plain names, and writing one.

One place reads every checkpoint: `load_encoder("...@file")`, soups, and trainings that go on.

what a file is -> reading -> unwrapping -> names -> writing
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes

import gpnns_utils as gu


def is_grid(positions: int) -> bool:
    """Whether so many positions are a class token and a square of patches."""
    return positions > 1 and round((positions - 1) ** 0.5) ** 2 == positions - 1


# --- weights ---------------------------------------------------------------------------------------------------------


def save_checkpoint(encoder: gu.Encoder, path: str | Path, /, **about) -> Path:
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
    save_weights(encoder.model, path, {"gpnns": json.dumps(about, default=gu.to_json)}, without=heads)
    about["load"] = f"load_encoder('{encoder.origin.get('encoder', encoder.name)}@{path.name}')"
    gu.write_atomically(
        path.with_suffix(".json"),
        lambda file: file.write((json.dumps(about, indent=1, default=gu.to_json) + "\n").encode()),
    )
    return path


def fill_weights(model: torch.nn.Module, state: dict[str, torch.Tensor], spec: str) -> None:
    """Load weights strictly; a mismatch is a ValueError that names the first tensors concerned."""
    own = model.state_dict()
    if hasattr(model, "logit_scale"):
        state = convert_for_open_clip(model, state, spec)
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


def convert_for_open_clip(model: torch.nn.Module, state: dict[str, torch.Tensor], spec: str) -> dict[str, torch.Tensor]:
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


# --- what a file is --------------------------------------------------------------------------------------------------


def explain_no_checkpoint(path: Path) -> str | None:
    """What a file is that is no checkpoint by itself, and what to do; None where it may be one."""
    if path.is_dir():
        files = [file.name for file in sorted(path.iterdir()) if file.suffix in (".safetensors", ".pt", ".pth", ".bin")]
        named = (
            ", ".join(files[:4]) or "it holds none (DeepSpeed's zero_to_fp32.py, and torch's dcp_to_torch, write one)"
        )
        return f"is a folder; name the file in it: {named}"
    if not path.is_file():
        return "is no regular file: name a file of weights"
    with open(path, "rb") as file:
        start = file.read(200)
    if not start:
        return "is empty (0 bytes), as a download or copy that broke off leaves it: fetch it again"
    if start.startswith(b"version https://git-lfs.github.com"):
        return (
            "is a Git LFS pointer, not the weights: run `git lfs pull` in its repository, or download the file itself"
        )
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page, such as a login or an error: download the file itself"
    part = re.search(r"-(\d{5})-of-(\d{5})", path.stem)
    if part and int(part[2]) > 1:
        return (
            f"is part {int(part[1])} of {int(part[2])} of a checkpoint: read all parts with safetensors.torch.load_file or "
            "torch.load, and save their tensors together in one file"
        )
    if path.suffix == ".json" or start.lstrip().startswith((b'{"', b"{\n")):
        return "is JSON text: name the file of tensors that it belongs to"
    if start.startswith(b"\x89HDF"):
        return "is an HDF5 file, as Keras writes them: its weights belong to another library"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
        if "constants.pkl" in names:
            return (
                "is a TorchScript archive, a model with its code (OpenAI published its CLIP as such), and no code of a file is "
                "run here. For OpenAI's own weights write open_clip:ViT-B-32/openai; of any other that you trust, save "
                "torch.jit.load(path).state_dict() with torch.save, and name that file"
            )
        if "data.pkl" not in names:
            return "is a zip archive of other files: unpack it and name the checkpoint"
    return None


# --- reading ---------------------------------------------------------------------------------------------------------


def load_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a state dict: safetensors, or a pickle of tensors (never anything that could run code).

    Training checkpoints are unwrapped (`unwrapped`: "state_dict", "model", their averages) and tensors get their plain
    names (`plain_names`). Raises FileNotFoundError, or ValueError that says what the file is when it is no state dict.
    """
    return simplify_names(read_state(path), path)


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """`load_checkpoint` before names are made plain."""
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path.absolute()}")
    if found := explain_no_checkpoint(path):
        raise ValueError(f"{path} {found}")
    try:  # not by timm: its older versions fall back to pickles that can run code, and none maps large files
        if is_safetensors(path):
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except MemoryError:
        raise
    except Exception as error:
        # torch's own words advise to run the file's code; safetensors' say what is wrong
        reason = str(error) if is_safetensors(path) else type(error).__name__
        if code := re.search(r"(?:global: GLOBAL|unsupported GLOBAL|class) ([\w.]+)", str(error)):
            raise ValueError(
                f"{path} is not a readable checkpoint of plain tensors: it also holds {code[1]}, and such objects "
                "can run code when they are read. If you trust the file, save its weights alone: "
                "torch.save(torch.load(path, weights_only=False)['state_dict'], new_path)"
            ) from error
        raise ValueError(
            f"{path} is not a readable checkpoint of plain tensors ({reason}): it is damaged, cut off, or of another kind. "
            "Fetch or write it again"
        ) from error
    state = unwrap_state(state, path)
    for key, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            kind = "quantised" if value.is_quantized else "without content (meta)" if value.is_meta else "sparse"
            raise ValueError(
                f"{path}: {key} is {kind}; save the model with plain tensors, value.to_dense() or dequantize()"
            )
    return state


def is_safetensors(path: Path) -> bool:
    """By its bytes, whatever its name: the length of a JSON header, then the header. Of a damaged file, by its name."""
    with open(path, "rb") as file:
        start = file.read(9)
    if start[:2] == b"PK" or start[:1] == b"\x80":  # zip, or a pickle
        return False
    return start[8:9] == b"{" or path.suffix.lower() == ".safetensors"


# --- unwrapping ------------------------------------------------------------------------------------------------------

WEIGHTS = ("state_dict", "model", "model_state_dict", "module", "net", "weights")  # where trainings keep them
AVERAGE = re.compile(r"(^|_)(ema|swa|avg|average|averaged)(_|$)")  # and how an average of them over steps is called


def unwrap_state(content, path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a training checkpoint; where it holds an average too, that, as timm takes it, and a warning.

    ValueError when there is none, or several of which none is called as the weights mostly are.
    """
    if is_state(content):
        return content
    parts = [key for key, value in content.items() if isinstance(value, dict)] if isinstance(content, dict) else []
    states = [key for key in parts if is_state(content[key])]
    averages = [key for key in parts if AVERAGE.search(str(key))]
    average = next((key for key in averages if holds_state(content[key])), None)
    weights = next((key for key in WEIGHTS if key in parts), None)
    if averages and not average:
        unnamed = (
            f"{path} holds an average ({averages[0]!r}) whose tensors have no names; the weights themselves are taken"
        )
        warnings.warn(unnamed, stacklevel=4)
    others = [key for key in states if key not in (weights, *averages)]
    if weights in states and not average and any(content[weights].keys() == content[key].keys() for key in others):
        weights = None  # two models alike
    if average and weights:
        warnings.warn(
            f"{path} holds weights ({weights!r}) and their average ({average!r}): the average is taken. For the others, save "
            f"torch.load(path)[{weights!r}] alone",
            stacklevel=4,
        )
    if average or weights:
        return unwrap_state(content[average or weights], path)
    if len(states) == 1:
        return content[states[0]]
    if states:
        raise ValueError(
            f"{path} holds several models: {', '.join(map(str, states))}; save one, torch.load(path)[...], alone"
        )
    plain = [str(k) for k, v in content.items() if not isinstance(v, torch.Tensor)] if isinstance(content, dict) else []
    found = f"; it holds {', '.join(plain[:5])}" if plain else ""
    raise ValueError(f"{path} holds no state dict (a dict of tensors, perhaps under 'state_dict'){found}")


def is_state(content) -> bool:
    """Whether this is a dict of tensors by name."""
    named = isinstance(content, dict) and bool(content) and all(isinstance(key, str) for key in content)
    return named and all(isinstance(value, torch.Tensor) for value in content.values())


def holds_state(content) -> bool:
    return is_state(content) or (isinstance(content, dict) and any(map(holds_state, content.values())))


# --- names -----------------------------------------------------------------------------------------------------------


def simplify_name(key: str) -> str:
    """A tensor's name without the prefixes of DistributedDataParallel and torch.compile."""
    return re.sub(r"^(module\.|_orig_mod\.)+", "", key)


HEAD = "embedding_head.linear.weight"  # of `add_head`; (dimensions, width of the features)
GUIE = {"vit_backbone.": "", "head.emb.weight": HEAD}  # what GUIE's 4th place calls a model and its head


def is_guie(state: dict[str, torch.Tensor]) -> bool:
    """Whether this is a checkpoint of G-Universal-CLIP, GUIE's 4th place."""
    return all(any(part in key for key in state) for part in GUIE)


def simplify_names(state: dict[str, torch.Tensor], path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors under the model's own names (`plain_name`; of GUIE's 4th place without `vit_backbone.` and class proxies).

    ValueError when two tensors get the same name.
    """
    state = {key: value for key, value in state.items() if key != "n_averaged"}  # a count that torch's swa_utils keep
    named = {simplify_name(key): value for key, value in state.items()}
    if len(named) < len(state):
        twice = next(name for name in named if [*map(simplify_name, state)].count(name) > 1)
        found = ", ".join(key for key in state if simplify_name(key) == twice)
        raise ValueError(f"{path} holds several tensors for {twice} ({found}); save one of the models alone")
    if is_guie(named):
        for theirs, ours in GUIE.items():
            named = {key.replace(theirs, ours): value for key, value in named.items() if key != "head.arc.weight"}
    return named


# --- writing ---------------------------------------------------------------------------------------------------------


def read_checkpoint_settings(path: str | Path) -> dict:
    """What `save_checkpoint` noted in the file itself; {} for any other file."""
    path = Path(path).expanduser()
    if not path.is_file() or not is_safetensors(path):
        return {}
    with safe_open(path, "pt") as file:
        noted = (file.metadata() or {}).get("gpnns", "{}")
    with contextlib.suppress(ValueError):
        return found if isinstance(found := json.loads(noted), dict) else {}
    return {}


def save_weights(
    module: torch.nn.Module, path: Path, metadata: dict[str, str] | None = None, without: str = ""
) -> None:
    """A module's state dict as safetensors, atomically; `without` the tensors whose names begin so."""
    state = {key: value for key, value in module.state_dict().items() if not (without and key.startswith(without))}
    state = {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}
    gu.write_atomically(path, lambda file: file.write(safetensors_bytes(state, metadata)))
