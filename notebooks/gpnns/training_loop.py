"""`fit`, the loop of all trainings (notebooks 03 to 05, 08, 09), which a killed run goes on with.

the loop -> several processes -> its parts
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import cloudpickle
import matplotlib.pyplot as plt
import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast, broadcast_object_list, gather_object, recursively_apply, send_to_device
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn import Module
from torch.utils.data import Dataset, default_collate

import gpnns_utils as gu
from gpnns import training_data
from gpnns.encoders import checkpoints
from gpnns.encoders.encoder import digest_weights
from gpnns.images import decoding

SHARED_WITHIN = 30.0  # seconds in which a file of one node must be seen by the others: network folders are slow


class Repeatable(Dataset):
    """A dataset in which an item's randomness depends on (seed, draw, row) alone, not on workers or earlier items."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        draw, row = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seeds(self.seed, draw, row))
            return row, self.dataset[row]


def to_arrays(items: list) -> list:
    """The items of a batch with arrays in place of tensors, as `read_in_workers` sends them."""
    return recursively_apply(Tensor.numpy, items)


def mix_seeds(*numbers: int) -> int:
    """One seed from several numbers: their tuple's hash, which is fast and the same in every process."""
    return hash(numbers) % 2**32


def draw_batches(
    count: int, size: int, first: int, last: int, seed: int, balance: np.ndarray | None, part: int, parts: int
) -> Iterator[list[tuple[int, int]]]:
    """(draw, row) of every image in batches number `first` to `last`: a pure function of the seed. The draw, mostly the
    epoch, tells views of an image apart.

    balance: labels; classes are then drawn equally often, whatever their size. part, parts: one process's share.
    """
    if balance is not None:
        _, numbers, counts = np.unique(balance, return_inverse=True, return_counts=True)
        shares = 1 / counts[numbers] / len(counts)
    shuffled, order = None, np.empty(0, dtype=int)
    for number in range(first, last):
        epoch, place = divmod(number, count // size)
        if epoch != shuffled:
            random, shuffled = np.random.default_rng([seed, epoch]), epoch
            order = random.permutation(count) if balance is None else random.choice(count, count, p=shares)
        places = range(place * size, (place + 1) * size)[part::parts]
        # Balanced drawing repeats images within an epoch: each time they shall look different.
        yield [(epoch if balance is None else epoch * count + i, int(order[i])) for i in places]


def fit(
    objective: Module,
    dataset: Dataset,
    folder: str | Path,
    groups: list[dict],
    epochs: float = 1,
    batch_size: int = 128,
    accumulate: int = 1,
    warmup: float = 0.0,
    lr_min: float = 0.0,
    clip: float = 1.0,
    balanced: bool = False,
    ema: float = 0.0,
    validate: Callable[[], float] | None = None,
    validate_every: int | None = None,
    save_every: int | None = None,
    seed: int = 0,
    draw: bool = False,
) -> list[dict]:
    """Train: AdamW, rates on a cosine per step, on one device or several, resumable at any step.

    objective(*batch) is the mean loss of a batch, as the default collation of `dataset`'s items makes it. dataset: items by
    row, and `describe()`, bytes that change when they do. groups: what is trained, as {"params", "lr", "weight_decay"};
    everything else is frozen and, where a whole module is, in evaluation mode: train in stages by calling `fit` once per
    stage. batch_size: images per batch over all processes; `accumulate` batches make a step. warmup: steps in which the
    rates rise from 0, or below 1 their share of all. lr_min: the rate that the cosine ends at. clip: the largest gradient
    norm of each child of the objective. balanced: draw the classes of `dataset.labels` equally often. ema: decay of an
    average of the weights, which is then validated and kept, 0 for none. validate() -> per cent, higher is better: called
    every `validate_every` steps (default: each epoch), on classes that are not trained on; the best weights are kept,
    without it the last. save_every: steps from one checkpoint to the next (default: a twentieth of all, 100 at least).
    draw: show the curves while they grow.

    Files go to `folder`/<a hash of settings, first weights, images and loss>: checkpoints, `log.jsonl`, best weights. The
    same call with the same first weights (seed torch before you build the proxies, build everything anew) goes on where a
    killed one stopped, with the same bits on a CPU, and is done at once when it was done.

    Returns the log, also written as JSON lines: step, epoch, loss, rate, gradient, images_per_second, validation. Raises
    ValueError for settings that cannot work, FloatingPointError when the loss is not finite, OSError when a checkpoint
    cannot be written or nodes do not share `folder`; earlier checkpoints stay.
    """
    check_settings(groups, epochs, clip, ema)
    accelerator = start_accelerator(objective, accumulate)
    per_epoch = count_steps_per_epoch(accelerator, dataset, batch_size)
    steps = max(1, round(epochs * per_epoch))
    validate_every, save_every = validate_every or round(per_epoch), save_every or max(100, steps // 20)
    log_every, warmup = max(1, steps // 100), int(warmup * steps if warmup < 1 else warmup)
    if not 0 <= warmup <= steps:
        raise ValueError(f"warmup={warmup} steps do not fit into {steps}; shorten it, or train longer")
    groups, labels = freeze_the_rest(objective, groups), dataset.labels if balanced else None
    settings = [steps, batch_size, accumulate, warmup, lr_min, clip, balanced, ema, seed, validate_every]
    settings.append(accelerator.mixed_precision)
    repeatable, process = Repeatable(dataset, seed), accelerator.process_index
    folder = Path(folder).expanduser() / hash_training(objective, repeatable, groups, settings, process)
    check_shared_folder(accelerator, folder)

    optimizer = torch.optim.AdamW(groups)
    schedule = CosineLRScheduler(optimizer, steps, lr_min=lr_min, warmup_t=warmup, t_in_epochs=False)
    average = ModelEmaV3(objective, decay=ema) if ema else None
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    accelerator.register_for_checkpointing(*filter(None, [average]))
    step, log = resume(accelerator, folder)

    first, last = step * accumulate, steps * accumulate
    share = draw_batches(len(dataset), batch_size, first, last, seed, labels, process, accelerator.num_processes)
    files = isinstance(dataset, training_data.TrainingImages)
    workers = decoding.count_decoders(dataset.images, len(dataset)) if files else 0
    loader = decoding.read_in_workers(repeatable, share, workers, to_arrays)
    progress = gu.Progress(last * batch_size, "training", done=first * batch_size)
    losses, started, picture, drawn = [], time.time(), None, 0.0
    set_training_mode(objective)
    for number, items in enumerate(loader, first):
        rows, batch = default_collate(items)
        schedule.step_update(step)
        torch.manual_seed(mix_seeds(seed, number, process))  # a resumed run drops out the same
        with accelerator.accumulate(wrapped):
            loss = wrapped(*send_to_device(batch, accelerator.device))
            losses.append(check_finite(accelerator, loss, "loss", step, rows, folder))
            accelerator.backward(loss)
        if not accelerator.sync_gradients:
            continue
        gradient = clip_gradients(accelerator, objective, clip)
        if accelerator.mixed_precision != "fp16":  # its scaler skips a step whose gradient overflows
            check_finite(accelerator, gradient, "gradient", step, rows, folder)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if average:
            average.update(objective)
        checking = validate and (step % validate_every == 0 or step == steps)
        if checking or step % log_every == 0 or step == steps:
            row = {"step": step, "epoch": step / per_epoch, "loss": float(np.mean(losses))}
            row["gradient"] = gradient.item() if torch.isfinite(gradient) else None
            row["rate"] = max(group["lr"] for group in optimizer.param_groups)
            row["images_per_second"] = len(losses) * batch_size / (time.time() - started)
            if checking:
                row["validation"] = validate_weights(accelerator, objective, average, validate, log, folder)
            log.append(row)
            losses, started = [], time.time()
        if accelerator.is_main_process:
            progress.update(step * accumulate * batch_size)
            if log and log[-1]["step"] == step:
                lines = "".join(json.dumps(row) + "\n" for row in log).encode()
                gu.write_atomically(folder / "log.jsonl", lambda file, lines=lines: file.write(lines))
                if draw and time.time() - drawn > 5:  # a figure takes as long as a step or two
                    picture, drawn = draw_training(log, picture), time.time()
        if step % save_every == 0 or step == steps:
            save_state(accelerator, folder, step)
    if draw and accelerator.is_main_process:
        draw_training(log, picture)
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    accelerator.free_memory()
    if validate:
        with name_damage(folder / "best.safetensors"):
            checkpoints.fill_weights(objective, load_file(folder / "best.safetensors"), str(folder))
    elif average:
        checkpoints.fill_weights(objective, average.module.state_dict(), str(folder))
    objective.eval()
    return log


def check_settings(groups: list[dict], epochs: float, clip: float, ema: float) -> None:
    """ValueError for settings that would train nothing, or away from the goal."""
    rates = [group.get("lr") for group in groups]
    if wrong := [rate for rate in rates if not isinstance(rate, (int, float)) or not 0 <= rate < math.inf]:
        raise ValueError(f"a learning rate is a number from 0, not {wrong[0]!r}")
    if not 0 < epochs < math.inf:
        raise ValueError(f"epochs={epochs} trains nothing; choose a number above 0")
    if not clip > 0:
        raise ValueError(f"clip={clip} leaves no gradient; choose a number above 0, or math.inf for no limit")
    if ema and not 0 < ema < 1:
        raise ValueError(f"ema={ema} averages no weights; choose a decay between 0 and 1, such as 0.999, or 0 for none")


def fit_in_processes(
    objective: Module, dataset: Dataset, folder: str | Path, groups: list[dict], processes: int = 1, **settings
) -> list[dict]:
    """`fit` on several GPUs from within a notebook, each of the processes on one; 0 for all GPUs there are.

    The processes are started anew, so it does no harm that the notebook has used a GPU already; objective, dataset and
    what `validate` reaches are copied to them. Afterwards `fit` finds their training done and loads its weights here.
    """
    processes = processes or max(1, torch.cuda.device_count())
    if processes > 1:
        groups = freeze_the_rest(objective, groups)
        work = cloudpickle.dumps((objective, dataset, Path(folder).absolute(), groups, settings | {"draw": False}))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(fit_in_process, (processes, port, work), processes)
    return fit(objective, dataset, folder, groups, **settings)


def fit_in_process(rank: int, processes: int, port: int, work: bytes) -> None:
    """One of the processes of `fit_in_processes`; accelerate finds the others by these variables."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    objective, dataset, folder, groups, settings = cloudpickle.loads(work)
    fit(objective, dataset, folder, groups, **settings)
    torch.distributed.destroy_process_group()


def start_accelerator(objective: Module, accumulate: int) -> Accelerator:
    """accelerate for this process, in the precision that the device gains from; all processes get the first's weights."""
    device = next(objective.parameters()).device
    precision = {torch.float16: "fp16", torch.bfloat16: "bf16", None: "no"}[gu.best_precision(device)]
    patience = [InitProcessGroupKwargs(timeout=timedelta(hours=12))]  # others wait while one validates
    options = {"mixed_precision": precision, "gradient_accumulation_steps": accumulate, "kwargs_handlers": patience}
    accelerator = Accelerator(cpu=device.type == "cpu", **options)
    for value in objective.to(accelerator.device).state_dict().values():
        value.copy_(broadcast(value))
    return accelerator


def count_steps_per_epoch(accelerator: Accelerator, dataset: Dataset, batch_size: int) -> float:
    """Steps in which an epoch passes by, a last incomplete batch left out. ValueError where not even one is filled."""
    accumulate, processes = accelerator.gradient_accumulation_steps, accelerator.num_processes
    if len(dataset) < batch_size * accumulate or batch_size % processes:
        asked = f"one step of {accumulate} x {batch_size}, shared by {processes} processes"
        raise ValueError(f"{len(dataset)} images do not fill {asked}; choose a smaller batch_size, a multiple of these")
    return len(dataset) // batch_size / accumulate


def freeze_the_rest(objective: Module, groups: list[dict]) -> list[dict]:
    """Leave to train what `groups` hold, and nothing else; the groups as AdamW takes them, parameters listed."""
    groups = [{**group, "params": list(group["params"])} for group in groups]
    chosen = {id(value) for group in groups for value in group["params"]}
    if not chosen:
        raise ValueError("no group holds a parameter, so there is nothing to train")
    for value in objective.parameters():
        value.requires_grad_(id(value) in chosen)
    return groups


def hash_training(objective: Module, dataset: Repeatable, groups: list, settings: list, process: int = 0) -> str:
    """A hash that tells one training from another: settings, first weights, images, labels, and a first loss."""
    if not hasattr(dataset.dataset, "describe"):
        raise ValueError("the data set needs describe(): bytes that change when its items do, to tell trainings apart")
    names = {id(value): name for name, value in objective.named_parameters()}
    about = [group | {"params": [names.get(id(value)) for value in group["params"]]} for group in groups]
    plain = (bool, int, float, str, tuple, type(None))  # settings that a module keeps to itself, such as dropout rates
    modules = [{k: v for k, v in vars(m).items() if isinstance(v, plain)} for m in objective.eval().modules()]
    items = dataset.dataset.describe() if process == 0 else None  # reads every image: once is enough
    told = repr([settings, about, modules, repr(objective)]).encode()
    digest = hashlib.blake2b(told + digest_weights(objective) + broadcast_object_list([items])[0], digest_size=6)
    count = len(dataset.dataset)  # some items and their loss tell changes of code, which nothing above would show
    rows = np.linspace(0, count - 1, min(count, 8)).astype(int)
    _, batch = default_collate([dataset[0, int(row)] for row in rows])
    for part in batch:
        digest.update(part.numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
    with torch.no_grad():
        loss = objective(*send_to_device(batch, next(objective.parameters()).device))
    digest.update(f"{loss.item():.3g}".encode())
    return digest.hexdigest()


def check_shared_folder(accelerator: Accelerator, folder: Path) -> None:
    """OSError in every process, before the first step, unless all of them see the first one's files in `folder`.

    Each node reads its checkpoints and the best weights there; without a shared folder that fails hours later.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if accelerator.num_processes == 1:
        return
    token, note = broadcast_object_list([uuid.uuid4().hex])[0], folder / "shared"
    if accelerator.is_main_process:
        note.write_text(token)
    until, sees = time.time() + SHARED_WITHIN, False
    while not sees and time.time() < until:
        sees = note.exists() and note.read_text() == token
        time.sleep(0 if sees else 0.2)
    if blind := [rank for rank, there in enumerate(gather_object([sees])) if not there]:
        advice = "choose a folder that all nodes share, such as one on a network disk, under the same path on each"
        raise OSError(f"processes {blind} do not see what process 0 writes to {folder}: {advice}")


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the last one at the end."""
    return sorted(folder.glob("step_*"))


def resume(accelerator: Accelerator, folder: Path) -> tuple[int, list[dict]]:
    """Load the last checkpoint in `folder`, if there is one: the steps that were taken, and the log of those."""
    if not (found := find_checkpoints(folder)):
        return 0, []
    step = int(found[-1].name.removeprefix("step_"))
    with name_damage(found[-1]):
        accelerator.load_state(str(found[-1]))
    written = folder / "log.jsonl"  # not there yet when checkpoints come before the first row
    with name_damage(written):
        lines = written.read_text().splitlines() if written.exists() else []
        return step, [row for row in map(json.loads, lines) if row["step"] <= step]


@contextlib.contextmanager
def name_damage(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file leads to into a ValueError that names it and says what to delete."""
    try:
        yield
    except (MemoryError, torch.cuda.OutOfMemoryError, PermissionError):
        raise  # not the file's fault
    except Exception as error:
        what = f"{path} is damaged ({type(error).__name__}: {str(error)[:200]}), as after a power cut"
        raise ValueError(f"{what}; delete the folder {path.parent} and run again, to train anew") from error


def set_training_mode(objective: Module) -> None:
    """Training mode, except for modules that are frozen as a whole, and for batch norm: the statistics that a pretrained
    network has are better than those of a few thousand images of one kind. With new ones the drawn letters of Omniglot were
    found less well than before any training (mAP 44.0, then 37.9), with the old ones far better (61.5)."""
    objective.train()
    for module in objective.modules():
        values = list(module.parameters())
        frozen = values and not any(value.requires_grad for value in values)
        if frozen or isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()


def check_finite(accelerator: Accelerator, value: Tensor, what: str, step: int, rows: Tensor, folder: Path) -> float:
    """The mean over processes of a value that must be finite, or FloatingPointError in all of them."""
    values = accelerator.gather(value.detach().reshape(1)).tolist()
    if not np.isfinite(values).all():
        told = f"the {what} became {values} at step {step + 1}, with the batch of rows {gather_object(rows.tolist())}"
        good = [f"The last good checkpoint is {path}" for path in find_checkpoints(folder)[-1:]]
        raise FloatingPointError(f"{told}. Look at those images, or lower the rates. {''.join(good)}")
    return float(np.mean(values))


def clip_gradients(accelerator: Accelerator, objective: Module, clip: float) -> Tensor:
    """Scale the gradient of each child of the objective down to the norm `clip`; the largest norm there was.

    The encoder and the proxies apart, as GP-NNS does, but after the scale of half precision is taken off.
    """
    accelerator.unscale_gradients()
    parts = [child.parameters() for child in objective.children()] + [objective.parameters(recurse=False)]
    parts = [[value for value in part if value.grad is not None] for part in parts]  # what is frozen has none
    return torch.stack([torch.nn.utils.clip_grad_norm_(part, clip) for part in parts if part]).max()


def validate_weights(
    accelerator: Accelerator, objective: Module, average: ModelEmaV3 | None, validate: Callable, log: list, folder: Path
) -> float:
    """validate() of the averaged weights if there are any, which are kept when it is the best so far; computed by the
    first process, known to all."""
    objective.eval()
    own = copy.deepcopy(objective.state_dict()) if average else None
    try:
        if average:
            objective.load_state_dict(average.module.state_dict())
        value = broadcast_object_list([validate() if accelerator.is_main_process else None])[0]
        if not np.isfinite(value):
            raise ValueError("validation gave no score; measure on at least two classes with two images each")
        best = max((row["validation"] for row in log if "validation" in row), default=-np.inf)
        if value > best and accelerator.is_main_process:
            checkpoints.save_weights(objective, folder / "best.safetensors")
    finally:
        if average:
            objective.load_state_dict(own)
    set_training_mode(objective)
    return float(value)


def save_state(accelerator: Accelerator, folder: Path, step: int) -> None:
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
            for old in find_checkpoints(folder)[:-1]:
                shutil.rmtree(old)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save and safetensors have errors of their own
        if isinstance(error, RuntimeError) and "writ" not in str(error):
            raise  # not the disk's fault
        shutil.rmtree(partial, ignore_errors=True)
        intact = [f"{good} is intact" for good in find_checkpoints(folder)[-1:]]
        raise gu.disk_error(final, error, *intact or ["there is no earlier one"]) from error
    accelerator.wait_for_everyone()


def draw_training(log: list[dict], handle: object = None) -> object:
    """The log as curves by epoch, drawn over the picture of `handle`; returns the handle (None outside a notebook)."""
    if not gu.in_notebook():
        return None
    keys = ("loss", "validation", "rate", "images_per_second")
    shown = {key: rows for key in keys if (rows := [row for row in log if key in row])}
    figure, axes = plt.subplots(1, len(shown), figsize=(2.1 * len(shown), 1.8), squeeze=False)
    for axis, (key, rows) in zip(axes[0], shown.items(), strict=True):
        axis.plot([row["epoch"] for row in rows], [row[key] for row in rows], "o-" if key == "validation" else "-")
        axis.set_title("validation mAP (%)" if key == "validation" else key.replace("_", " "), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.set(xlabel="epochs", ylim=(0, None) if key == "images_per_second" else None)
    plt.close(figure)
    return gu.display_over(handle, figure)
