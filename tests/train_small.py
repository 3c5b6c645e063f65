"""Small trainings for the tests of `fit`, each in a process of its own, or in several that train together."""

import os
import resource
import signal
from pathlib import Path

import torch
from safetensors.torch import save_file

import gpnns_utils as gu
from gpnns import losses, training_loop
from gpnns.encoders import checkpoints


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Points(torch.utils.data.Dataset):
    """Noisy points around 12 class centres; each reading adds other noise."""

    def __init__(self, kill_at_item: int | None):
        self.centres = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
        self.read, self.kill_at_item = 0, kill_at_item

    def __len__(self) -> int:
        return 96

    def describe(self) -> bytes:
        return self.centres.numpy().tobytes()

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        self.read += 1
        if self.read == self.kill_at_item:
            die()
        return self.centres[row % 12] + torch.randn(10), row % 12


class Objective(torch.nn.Module):
    def __init__(self, dropout: float, sampled: int | None):
        super().__init__()
        layers = [torch.nn.Linear(10, 16), torch.nn.ReLU(), torch.nn.Dropout(dropout), torch.nn.Linear(16, 8)]
        self.tower = torch.nn.Sequential(*layers)
        self.loss = losses.ArcMargin(8, 12, 10, 0.1, sampled=sampled)

    def forward(self, points, labels):
        return self.loss(self.tower(points), labels)


def train_small(
    folder: Path,
    out: Path,
    kill_at_item: int | None = None,
    kill_while_saving: bool = False,
    largest_file: int | None = None,
    folder_of_its_own: bool = False,
    bfloat16: bool = False,
    sampled: int | None = None,
    dropout: float = 0.0,
    ema: float = 0.0,
) -> None:
    """Train, write the weights and scores to `out`, and print what was done.

    kill_at_item: end the process the hard way when this many items were read; kill_while_saving: the same, when a
    checkpoint is all but complete. largest_file: no file can be larger (bytes), as on a full disk. folder_of_its_own:
    for each process, as on nodes that share no disk.
    """
    rank = int(os.environ.get("RANK", 0))
    if bfloat16:
        gu.best_precision = lambda device: torch.bfloat16
    if folder_of_its_own:
        folder = folder / str(rank)
        training_loop.SHARED_WITHIN = 1.0
    torch.manual_seed(rank)  # `fit` gives all processes the first one's weights
    torch.set_num_threads(1)
    objective, dataset, calls = Objective(dropout, sampled), Points(kill_at_item), []
    if kill_while_saving:
        Path.rename = lambda *_: die()
    if largest_file:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    def validate() -> float:
        """Depends on the weights, but does not rise steadily: the best are not always the last."""
        calls.append(rank)
        return float(sum(p.abs().sum().item() for p in objective.parameters())) % 7

    groups = [
        {"params": objective.tower.parameters(), "lr": 1e-2, "weight_decay": 0.01},
        {"params": objective.loss.parameters(), "lr": 3e-2},
    ]
    log = training_loop.fit(
        objective, dataset, folder, groups, epochs=3, batch_size=16, accumulate=2, warmup=2, save_every=2,
        ema=ema, validate=validate, seed=7,
    )  # fmt: skip
    assert rank == 0 or not calls, "only the first process validates"
    if rank == 0:
        state = {key: value.contiguous() for key, value in objective.state_dict().items()}
        state["losses"] = torch.tensor([row["loss"] for row in log])
        state["validation"] = torch.tensor([row["validation"] for row in log if "validation" in row])
        save_file(state, out)
        print(f"finished; items read {dataset.read}; validations {len(calls)}; steps {max(row['step'] for row in log)}")


def save_random(path: Path, largest_file: int) -> None:
    """A checkpoint that does not fit on the disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    encoder = gu.load_encoder("random")
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    checkpoints.save_checkpoint(encoder, path)
