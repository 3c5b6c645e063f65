"""Files of weights: what a file is, the state dict in it under plain names, and writing one.

One place reads every checkpoint: `load_encoder("...@file")`, soups, and trainings that go on.

writing and filling in -> reading -> unwrapping and names
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes

import gpnns_utils as gu


def is_grid(positions: int) -> bool:
    """Whether so many positions are a class token and a square of patches."""
    return positions > 1 and round((positions - 1) ** 0.5) ** 2 == positions - 1


# --- writing and filling in ------------------------------------------------------------------------------------------


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
    text = json.dumps(about, indent=1, default=gu.to_json) + "\n"
    gu.write_atomically(path.with_suffix(".json"), lambda file: file.write(text.encode()))
    return path


def save_weights(module: torch.nn.Module, path: Path, metadata: dict | None = None, without: str = "") -> None:
    """A module's state dict as safetensors, atomically; `without` the tensors whose names begin so."""
    state = {key: value for key, value in module.state_dict().items() if not (without and key.startswith(without))}
    state = {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}
    gu.write_atomically(path, lambda file: file.write(safetensors_bytes(state, metadata)))


def fill_weights(model: torch.nn.Module, state: dict[str, torch.Tensor], spec: str) -> None:
    """Load weights strictly; a mismatch is a ValueError that names the first tensors concerned."""
    own = model.state_dict()
    if hasattr(model, "logit_scale"):
        state = convert_for_open_clip(model, state, spec)
    problems = [f"{key} is missing" for key in own if key not in state]
    for key, value in state.items():
        if key not in own:
            problems.append(f"{key} is not part of the model")
        elif value.shape != own[key].shape:
            problems.append(f"{key} has shape {tuple(value.shape)}, not {tuple(own[key].shape)}")
        elif own[key].is_floating_point() and not value.is_floating_point():
            problems.append(f"{key} holds {value.dtype}, no weights in floating point (dequantise them first)")
    if problems:
        shown = "; ".join(problems[:3]) + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise ValueError(f"the weights of {spec} do not fit its architecture: {shown}")
    model.load_state_dict(state)


def convert_for_open_clip(model: torch.nn.Module, state: dict[str, torch.Tensor], spec: str) -> dict[str, torch.Tensor]:
    """What open_clip's own loader (`open_clip.load_checkpoint`) makes of older and foreign weights before filling in.

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
    resizers = dict.fromkeys(("positional_embedding", "text.positional_embedding"), models.resize_text_pos_embed)
    for key, resize in {"visual.positional_embedding": models.resize_pos_embed, **resizers}.items():
        given, wanted = state.get(key), own.get(key)
        if given is None or wanted is None or given.ndim != 2 or not given.is_floating_point():
            continue
        # As many numbers for each position, and a square of patches; else no other size would help.
        grid = is_grid(len(given)) if resize is models.resize_pos_embed else len(given) > 0
        if grid and given.shape != wanted.shape and given.shape[1:] == wanted.shape[1:]:
            state[key] = given.float()  # the CPU resizes no half precision
            resize(state, model)
            warnings.warn(
                f"{spec}: {key} was trained for {len(given)} positions and is resized to {len(wanted)}, as open_clip "
                "does; results are lower than at its own size until it is fine-tuned",
                stacklevel=2,
            )
    return state


# --- reading ---------------------------------------------------------------------------------------------------------


def load_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a state dict: safetensors, or a pickle of tensors (never anything that could run code).

    Training checkpoints are unwrapped (`unwrap_state`) and tensors get their plain names (`simplify_names`). Raises
    FileNotFoundError, or ValueError that says what the file is when it is no state dict.
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
        try:
            content = load_file(path)
        except SafetensorError:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except MemoryError:
        raise
    except Exception as error:  # torch's own words advise to run the file's code
        reason = f"({type(error).__name__}): it is damaged, cut off, or of another kind. Fetch or write it again"
        if code := re.search(r"(?:global: GLOBAL|unsupported GLOBAL|class) ([\w.]+)", str(error)):
            reason = (
                f": it also holds {code[1]}, and such objects can run code when they are read. If you trust the file, "
                "save its weights alone: torch.save(torch.load(path, weights_only=False)['state_dict'], new_path)"
            )
        if "TorchScript" in str(error):
            reason = (
                ": it is a TorchScript archive, a model with its code, and no code of a file is run here. For OpenAI's "
                "own weights write open_clip:ViT-B-32/openai; of any other that you trust, save "
                "torch.jit.load(path).state_dict() with torch.save, and name that file"
            )
        raise ValueError(f"{path} is not a readable checkpoint of plain tensors{reason}") from error
    return unwrap_state(content, path)


def read_checkpoint_settings(path: str | Path) -> dict:
    """What `save_checkpoint` noted in the file itself; {} for any other file."""
    with contextlib.suppress(OSError, ValueError, SafetensorError):
        with safe_open(Path(path).expanduser(), "pt") as file:
            noted = json.loads((file.metadata() or {}).get("gpnns", "{}"))
        return noted if isinstance(noted, dict) else {}
    return {}


PAGE = "is a web page, such as a login or an error: download the file itself"
STARTS = {  # of files that are no checkpoints
    b"version https://git-lfs.github.com": "is a Git LFS pointer: run `git lfs pull`, or download the weights it names",
    b"<!doctype html": PAGE,
    b"<html": PAGE,
}


def explain_no_checkpoint(path: Path) -> str | None:
    """What a file is that is no checkpoint by itself, and what to do; None where it may be one."""
    if path.is_dir():
        files = [file.name for file in sorted(path.iterdir()) if file.suffix in (".safetensors", ".pt", ".pth", ".bin")]
        return f"is a folder; name the file in it: {', '.join(files[:4]) or 'it holds none'}"
    if not path.is_file():
        return "is no regular file: name a file of weights"
    with open(path, "rb") as file:
        start = file.read(200).lstrip().lower()
    if not path.stat().st_size:
        return "is empty (0 bytes), as a download or copy that broke off leaves it: fetch it again"
    return next((what for known, what in STARTS.items() if start.startswith(known)), None)


# --- unwrapping and names --------------------------------------------------------------------------------------------

WEIGHTS = ("state_dict", "model", "model_state_dict", "module", "net", "weights")  # where trainings keep them
AVERAGE = re.compile(r"(^|_)(ema|swa|avg|average|averaged)(_|$)")  # and how an average of them over steps is called


def unwrap_state(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a training checkpoint; where it holds an average too, that, as timm takes it, and a warning.

    ValueError when there is none, or several of which none is called as the weights mostly are.
    """
    if is_state(content):
        return content
    content = content if isinstance(content, dict) else {}
    parts = [key for key, value in content.items() if isinstance(value, dict)]
    averages = [key for key in parts if AVERAGE.search(str(key))]
    average = next((key for key in averages if holds_state(content[key])), None)
    weights = next((key for key in WEIGHTS if key in parts), None)
    others = [key for key in parts if key not in (weights, *averages) and is_state(content[key])]
    if average and weights:
        warnings.warn(
            f"{path} holds weights ({weights!r}) and their average ({average!r}): the average is taken. For the "
            f"others, save torch.load(path)[{weights!r}] alone",
            stacklevel=4,
        )
    elif averages and not average:
        what = f"an average ({averages[0]!r}) whose tensors have no names"
        warnings.warn(f"{path} holds {what}; the weights themselves are taken", stacklevel=4)
    alike = weights and not average and any(content[weights].keys() == content[key].keys() for key in others)
    if (average or weights) and not alike:
        return unwrap_state(content[average or weights], path)
    if len(others) == 1 and not weights:
        return content[others[0]]
    if others:
        names = ", ".join(map(str, [weights, *others] if weights else others))
        raise ValueError(f"{path} holds several models: {names}; save one, torch.load(path)[...], alone")
    plain = [str(key) for key, value in content.items() if not isinstance(value, torch.Tensor)]
    found = f"; it holds {', '.join(plain[:5])}" if plain else ""
    raise ValueError(f"{path} holds no state dict (a dict of tensors, perhaps under 'state_dict'){found}")


def is_state(content: Any) -> bool:
    """Whether this is a dict of tensors by name."""
    named = isinstance(content, dict) and bool(content) and all(isinstance(key, str) for key in content)
    return named and all(isinstance(value, torch.Tensor) for value in content.values())


def holds_state(content: Any) -> bool:
    return is_state(content) or (isinstance(content, dict) and any(map(holds_state, content.values())))


HEAD = "embedding_head.linear.weight"  # of `add_head`; (dimensions, width of the features)
GUIE = {"vit_backbone.": "", "head.emb.weight": HEAD}  # what GUIE's 4th place calls a model and its head


def is_guie(state: dict[str, torch.Tensor]) -> bool:
    """Whether this is a checkpoint of G-Universal-CLIP, GUIE's 4th place."""
    return all(any(part in key for key in state) for part in GUIE)


def simplify_names(state: dict[str, torch.Tensor], path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors under the model's own names, without the prefixes of DistributedDataParallel and torch.compile; of
    GUIE's 4th place without `vit_backbone.` and class proxies. ValueError when two tensors get the same name.
    """
    plain = {key: re.sub(r"^(module\.|_orig_mod\.)+", "", key) for key in state}
    plain.pop("n_averaged", None)  # a count that torch's swa_utils keep
    named = {name: state[key] for key, name in plain.items()}
    if len(named) < len(plain):
        twice = next(name for name in named if [*plain.values()].count(name) > 1)
        found = ", ".join(key for key, name in plain.items() if name == twice)
        raise ValueError(f"{path} holds several tensors for {twice} ({found}); save one of the models alone")
    if is_guie(named):
        for theirs, ours in GUIE.items():
            named = {key.replace(theirs, ours): value for key, value in named.items() if key != "head.arc.weight"}
    return named
