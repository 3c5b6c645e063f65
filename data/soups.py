"""Averages of weights: soups, and what else is made of the weights of several models.

States are state dicts, name to tensor; none of them is changed, and what comes back is new memory.

the mean -> towards the start
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F

State = Mapping[str, torch.Tensor]

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
        warnings.warn(
            "these models have batch norm, whose averaged statistics may not fit the averaged weights: try "
            "torch.optim.swa_utils.update_bn, and keep what validation prefers (notebook 05, exercise 4)",
            stacklevel=2,
        )
    soup = {}
    for key, value in states[0].items():
        if value.is_floating_point():
            same = all(state[key].dtype == value.dtype and torch.equal(state[key], value) for state in states)
            parts = zip(weights.tolist(), states, strict=True)
            value = full(value) if same else sum(weight * full(state[key]) for weight, state in parts)
        soup[key] = value.clone()
    return soup


def full(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def check_fit(states: Sequence[State]) -> None:
    """ValueError unless there are states, all with the same names and shapes, and each with memory of its own."""
    if not states:
        raise ValueError("there is nothing to average: give at least one checkpoint")
    for number, state in enumerate(states[1:], 1):
        odd = sorted(states[0].keys() ^ state.keys())
        if odd := odd or [key for key in state if state[key].shape != states[0][key].shape]:
            raise ValueError(
                f"checkpoint 0 and checkpoint {number} are not of one architecture; they differ in {', '.join(odd[:3])} "
                f"({len(odd)} tensors)"
            )
    if key := shared_memory(states):
        raise ValueError(
            f"{key} is the same memory in several state dicts: they are one model's own tensors, and their mean is what was "
            "loaded last. clone() them, or read them from files"
        )


def shared_memory(states: Sequence[State]) -> str | None:
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
            moves = torch.stack([(full(state[key]) - full(start[key])).flatten() for state in states])
            c = agreement(moves)
            soup[key] = full(start[key]) + count * c / (1 + (count - 1) * c) * (mean - full(start[key]))
    return soup


def agreement(moves: torch.Tensor) -> float:
    """The mean cosine between rows (n, size), at least 0; 1 when nothing moved."""
    unit = F.normalize(moves.double())
    cosines = (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)]
    return max(0.0, cosines.mean().item()) if moves.any() else 1.0


def lines(before: State, after: State, shallow: float) -> dict[str, torch.Tensor]:
    """LiNeS (2410.17146): the change of block l of L is scaled by shallow + (1 - shallow) l / (L - 1), and by `shallow` outside
    of the blocks; also everywhere, said in a line, where the names of the tensors show fewer than two blocks. Raises
    ValueError as `average`."""
    check_fit([before, after])
    depth = depths(after)
    if not any(depth.values()):
        print(f"LiNeS finds no depth in the names of these tensors: all of them get the share {shallow:g}")
    return mixed(before, after, lambda key: shallow + (1 - shallow) * depth[key])


def mixed(before: State, after: State, share_of: Callable[[str], float]) -> dict[str, torch.Tensor]:
    """share_of(name) of `after`, the rest of `before`; integers are those of `after`."""
    return {
        key: torch.lerp(full(before[key]), full(value), share_of(key)) if value.is_floating_point() else value.clone()
        for key, value in after.items()
    }


def depths(names: Sequence[str]) -> dict[str, float]:
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
