"""A small training in a process of its own, for the tests of `fit`: `python tests/train_small.py FOLDER OUT [options]`.

Run under torchrun or `accelerate launch` it is one training on several processes.
"""

import argparse
import os
import resource
import signal
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import gpnns_utils as gu

parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("out")
parser.add_argument("--kill-at-item", type=int, help="end the process the hard way when this many items were read")
parser.add_argument("--kill-while-saving", action="store_true", help="the same, when a checkpoint is all but complete")
parser.add_argument("--largest-file", type=int, help="no file can be larger (bytes), as on a full disk")
parser.add_argument("--sampled", type=int)
parser.add_argument("--dropout", type=float, default=0.0)
parser.add_argument("--ema", type=float)
parser.add_argument("--bfloat16", action="store_true")
parser.add_argument("--folder-of-its-own", action="store_true", help="for each process, as on nodes that share no disk")
arguments = parser.parse_args()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Points(torch.utils.data.Dataset):
    """Noisy points around 12 class centres; each reading adds other noise."""

    def __init__(self):
        self.centres = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
        self.read = 0

    def __len__(self) -> int:
        return 96

    def describe(self) -> bytes:
        return self.centres.numpy().tobytes()

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        self.read += 1
        if self.read == arguments.kill_at_item:
            die()
        return self.centres[row % 12] + torch.randn(10), row % 12


class Objective(torch.nn.Module):
    def __init__(self):
        super().__init__()
        layers = [torch.nn.Linear(10, 16), torch.nn.ReLU(), torch.nn.Dropout(arguments.dropout), torch.nn.Linear(16, 8)]
        self.tower = torch.nn.Sequential(*layers)
        self.loss = gu.training.ArcMargin(8, 12, 10, 0.1, sampled=arguments.sampled)

    def forward(self, points, labels):
        return self.loss(self.tower(points), labels)


if arguments.bfloat16:
    gu.best_precision = lambda device: torch.bfloat16
torch.manual_seed(int(os.environ.get("RANK", 0)))  # `fit` gives all processes the first one's weights
torch.set_num_threads(1)
objective, dataset = Objective(), Points()
if arguments.folder_of_its_own:
    arguments.folder += os.environ["RANK"]
    gu.training.SHARED_WITHIN = 1.0
if arguments.kill_while_saving:
    Path.rename = lambda *_: die()
if arguments.largest_file:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (arguments.largest_file, arguments.largest_file))
calls = []


def validate() -> float:
    """Depends on the weights, but does not rise steadily: the best are not always the last."""
    calls.append(os.environ.get("RANK", "0"))
    return float(sum(p.abs().sum().item() for p in objective.parameters())) % 7


groups = [
    {"params": objective.tower.parameters(), "lr": 1e-2, "weight_decay": 0.01},
    {"params": objective.loss.parameters(), "lr": 3e-2},
]
log = gu.training.fit(
    objective, dataset, arguments.folder, groups, epochs=3, batch_size=16, accumulate=2, warmup=2, save_every=2,
    ema=arguments.ema, validate=validate, seed=7,
)  # fmt: skip
if os.environ.get("RANK", "0") == "0":
    state = {key: value.contiguous() for key, value in objective.state_dict().items()}
    state["losses"] = torch.tensor([row["loss"] for row in log])
    state["validation"] = torch.tensor([row["validation"] for row in log if "validation" in row])
    save_file(state, arguments.out)
    print(
        f"finished in {os.environ.get('WORLD_SIZE', 1)} processes; items read {dataset.read}; validations {len(calls)}; steps {int(np.max([r['step'] for r in log]))}"
    )
else:
    assert not calls, "only the first process validates"
