"""Averages of weights: soups, and what else is made of the weights of several models.

States are state dicts, name to tensor; none of them is changed, and what comes back is new memory.

ingredients -> the mean -> towards the start
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import gpnns_utils as gu
from gpnns import training
from gpnns.encoders import checkpoints

State = Mapping[str, torch.Tensor]
Ingredients = tuple[gu.Encoder, gu.Encoder, dict[str, State]]

# --- ingredients -----------------------------------------------------------------------------------------------------


def make_ingredients(
    run: gu.Run,
    encoder: str,
    checkpoints: Sequence[str | Path],
    images: gu.ImageSet,
    choose_on: gu.ImageSet,
    variety: Sequence[Mapping],
    recipe: Mapping,
    **settings,
) -> Ingredients:
    """What a soup is made of: (the encoder before any fine-tuning, the one that all ingredients start from, the state dict of
    each ingredient by name). Prints where they come from.

    checkpoints: files that were fine-tuned from `encoder`, which is then also their start. Without any, the start is
    `find_checkpoint_of_03` or else the encoder itself, and each entry of `variety`, keys that take the place of those of
    `recipe`, becomes an ingredient: trained on three quarters of the classes, drawn anew for each, as GUIE's fourth place
    did. settings: of `fine_tune`. A training that was stopped goes on, a finished one is loaded. Raises ValueError for
    files that are not two or more different ones of one architecture.
    """
    if checkpoints:
        return load_ingredients([Path(file).expanduser() for file in checkpoints], encoder)
    spec, source = training.find_checkpoint_of_03(run, encoder, images) or (encoder, f"{encoder} itself")
    start, states, folder = gu.load_encoder(spec), {}, run.folder / "05_training"
    vectors, images = gu.embed_images(start, images)
    for number, change in enumerate(variety):
        part = training.choose_three_quarters(images, run.seed, number)
        own = settings | {"seed": run.seed + number, "embeddings": vectors[part]}
        tuned, _ = training.fine_tune_by_recipe(
            gu.load_encoder(spec), images.subset(part), choose_on, folder, {**recipe, **change}, **own
        )
        states[f"ingredient_{number}"] = {key: value.cpu() for key, value in tuned.model.state_dict().items()}
    print(f"{len(states)} ingredients, trained here; they start from {source}")
    return gu.load_encoder(encoder), start, states


def load_ingredients(files: list[Path], encoder: str) -> Ingredients:
    """`make_ingredients` from files, under the names that the model has for their tensors. A head is new in the files: their
    start gets the mean of theirs, from which none moved."""
    if len({file.resolve() for file in files}) < max(2, len(files)):
        raise ValueError(f"a soup needs two different checkpoints or more, not {', '.join(map(str, files))}")
    noted = checkpoints.read_checkpoint_settings(files[0])
    encoder = noted.get("tuned_from", noted.get("encoder", encoder)) if encoder == "mini" else encoder
    states = {str(file): checkpoints.load_checkpoint(file) for file in files}
    try:
        start = gu.load_encoder(f"{encoder.partition('@')[0]}@{files[0]}")
        for file, state in states.items():
            checkpoints.fill_weights(start.model, state, file)
            states[file] = {key: value.cpu().clone() for key, value in start.model.state_dict().items()}
    except ValueError as error:
        hint = "Name what they were fine-tuned from in the parameter encoder, such as open_clip:ViT-B-16/openai"
        raise ValueError(f"{error}. {hint}") from error
    head = [key for key in start.model.state_dict() if key.startswith("embedding_head.")]
    heads = [{key: state[key] for key in head} for state in states.values()]
    checkpoints.fill_weights(start.model, gu.load_encoder(encoder).model.state_dict() | average(heads), encoder)
    known = {encoder: start.model.state_dict()}
    for file, state in states.items():
        for name, other in known.items():
            if all(torch.equal(state[key].to(value), value) for key, value in other.items()):
                why = "leave it out, as nothing was learned between them"
                raise ValueError(f"{file} holds the same weights as {name}: {why}")
        known[file] = state
    print(f"{len(states)} ingredients from files; their start is {encoder}")
    return start, start, states


# --- the mean --------------------------------------------------------------------------------------------------------


def average(states: Sequence[State], weights: Sequence[float] | None = None) -> dict[str, torch.Tensor]:
    """The weighted mean of state dicts, tensor by tensor, in float32 or better: a soup (model soups, 2203.05482).

    weights: one for each state, which sum to 1; equal ones when None. Integers, such as counters, have no mean: the first
    state's are kept. Raises ValueError for wrong weights and for states that do not fit together (`check_fit`). Warns of
    batch norm, whose averaged statistics may not fit the averaged weights.
    """
    check_fit(states)
    weights = np.full(len(states), 1 / len(states)) if weights is None else np.asarray(weights, dtype=float)
    if weights.shape != (len(states),) or abs(weights.sum() - 1) > 1e-6:
        raise ValueError(f"{len(states)} checkpoints need as many weights that sum to 1, not {weights}")
    if len(states) > 1 and any(key.endswith("running_var") for key in states[0]):
        advice = "try torch.optim.swa_utils.update_bn, and keep what validation prefers (notebook 05, exercise 4)"
        told = "these models have batch norm, whose averaged statistics may not fit the averaged weights"
        warnings.warn(f"{told}: {advice}", stacklevel=2)
    soup = {}
    for key, value in states[0].items():
        if value.is_floating_point():
            same = all(state[key].dtype == value.dtype and torch.equal(state[key], value) for state in states)
            parts = zip(weights.tolist(), states, strict=True)
            value = to_float32(value) if same else sum(weight * to_float32(state[key]) for weight, state in parts)
        soup[key] = value.clone()
    return soup


def to_float32(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def check_fit(states: Sequence[State]) -> None:
    """ValueError unless there are states, all with the same names and shapes, and each with memory of its own."""
    if not states:
        raise ValueError("there is nothing to average: give at least one checkpoint")
    for number, state in enumerate(states[1:], 1):
        odd = sorted(states[0].keys() ^ state.keys())
        if odd := odd or [key for key in state if state[key].shape != states[0][key].shape]:
            told = f"they differ in {', '.join(odd[:3])} ({len(odd)} tensors)"
            raise ValueError(f"checkpoint 0 and checkpoint {number} are not of one architecture; {told}")
    if key := find_shared_memory(states):
        why = "they are one model's own tensors, and their mean is what was loaded last. clone() them, or read files"
        raise ValueError(f"{key} is the same memory in several state dicts: {why}")


def find_shared_memory(states: Sequence[State]) -> str | None:
    """The first tensor that two state dicts hold in the same memory, None where there is none."""
    for key in states[0]:
        places = [state[key].data_ptr() for state in states if state[key].numel()]
        if len(set(places)) < len(places):
            return key
    return None


# --- towards the start -----------------------------------------------------------------------------------------------


def model_stock(states: Sequence[State], start: State) -> dict[str, torch.Tensor]:
    """Model Stock (2403.19522): go back towards the start by how little the models agree, tensor by tensor.

    With the mean cosine c between the moves of N models from the start, t = N c / (1 + (N - 1) c) of their mean move is
    kept; for more than two models the mean over pairs is mergekit's choice. Raises ValueError as `average`.
    """
    check_fit([start, *states])
    soup, count = average(states), len(states)
    for key, mean in soup.items():
        if mean.is_floating_point():
            moves = torch.stack([(to_float32(state[key]) - to_float32(start[key])).flatten() for state in states])
            c = mean_cosine(moves)
            soup[key] = to_float32(start[key]) + count * c / (1 + (count - 1) * c) * (mean - to_float32(start[key]))
    return soup


def mean_cosine(moves: torch.Tensor) -> float:
    """The mean cosine between rows (n, size), at least 0; 1 when nothing moved."""
    unit = F.normalize(moves.double())
    cosines = (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)]
    return max(0.0, cosines.mean().item()) if moves.any() else 1.0


def lines(before: State, after: State, shallow: float) -> dict[str, torch.Tensor]:
    """LiNeS (2410.17146): the change of block l of L is scaled by shallow + (1 - shallow) l / (L - 1), and by `shallow` outside
    of the blocks; also everywhere, said in a line, where the names of the tensors show fewer than two blocks. Raises
    ValueError as `average`."""
    check_fit([before, after])
    depth = find_depths(after)
    if not any(depth.values()):
        print(f"LiNeS finds no depth in the names of these tensors: all of them get the share {shallow:g}")
    return mix_states(before, after, lambda key: shallow + (1 - shallow) * depth[key])


def mix_states(before: State, after: State, share_of: Callable[[str], float]) -> dict[str, torch.Tensor]:
    """share_of(name) of `after`, the rest of `before`; integers are those of `after`."""
    return {
        key: torch.lerp(to_float32(before[key]), to_float32(value), share_of(key))
        if value.is_floating_point()
        else value.clone()
        for key, value in after.items()
    }


def find_depths(names: Sequence[str]) -> dict[str, float]:
    """The depth of each tensor's block within its tower, from 0 (the first, or outside of the blocks) to 1 (the last)."""
    pattern = r"(.*?)(?:resblocks\.|blocks\.|layers\.|stages\.|layer)(\d+)\."
    places = {name: re.match(pattern, name) for name in names}
    blocks = {}
    for place in filter(None, places.values()):
        blocks[place[1]] = sorted({int(place[2]), *blocks.get(place[1], [])})
    ends = {tower: max(1, len(numbers) - 1) for tower, numbers in blocks.items()}
    return {
        name: place and blocks[place[1]].index(int(place[2])) / ends[place[1]] or 0 for name, place in places.items()
    }
