"""Losses (notebooks 03 and 04): the margin, its rivals, and what holds images and captions together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import accelerate
import numpy as np
import torch
import torch.nn.functional as F

# --- the margin ------------------------------------------------------------------------------------------------------


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

    forward(embeddings (n, dim), labels int64 (n,)) -> the mean loss, computed in float32 whatever comes in. Labels count
    from 0, as `TrainingImages` numbers them; they are not checked in each step, which would wait for the device. Source:
    ArcFace (1801.07698); GP-NNS trains with scale 30 and margin 0.1 radians, and proxies xavier_uniform.

    margin: one number, or one per class. centers: proxies per class, of which the nearest counts (sub-center ArcFace).
    start: (classes, dim) directions to start from, such as `class_means`. sampled: compare with the classes of the
    batch and about this many others only (Partial FC, 2010.05222); time and memory of the loss then do not depend on
    the number of classes. AdamW still updates every proxy: about 0.7 CPU seconds a step for 100,000 classes x 512.
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
        if not (np.isfinite(margin).all() and np.min(margin) >= 0 and np.max(margin) <= np.pi / 2):
            hint = f"20 degrees are {np.radians(20):.2f}, and papers have 0.1 to 0.5"
            raise ValueError(f"margin={margin} is no angle in radians from 0 to {np.pi / 2:.2f}; {hint}")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale={scale} sharpens no softmax; papers have 20 to 64")
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
                proxies = proxies[rows]
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


def make_arc_margin(
    scale: float = 30.0, margin: float | Sequence[float] = 0.1, centers: int = 1, start: str = "means"
) -> Callable[[np.ndarray, np.ndarray], ArcMargin]:
    """What makes ArcMargin of the class means (classes, dim) and the images per class (classes,).

    margin: in radians; two of them go to the most and the least frequent classes (`margins_by_count`). start: proxies at
    the class means ("means") or at random ("xavier").
    """
    if start not in ("means", "xavier"):
        raise ValueError(f"start is means or xavier, not {start!r}")

    def make(means: np.ndarray, counts: np.ndarray) -> ArcMargin:
        margins = margins_by_count(counts, *margin) if np.ndim(margin) else margin
        first = means if start == "means" else None
        return ArcMargin(means.shape[1], len(means), scale, margins, centers, start=first)

    return make


# --- other losses ----------------------------------------------------------------------------------------------------


class Softmax(torch.nn.Module):
    """The plain softmax that GP-NNS compares with: dot products as they are, no unit vectors, no scale, no margin.

    start: (classes, dim) directions of the first proxies. forward as in ArcMargin.
    """

    def __init__(self, start: np.ndarray):
        super().__init__()
        self.proxies = torch.nn.Parameter(F.normalize(torch.as_tensor(start, dtype=torch.float32)))

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(embeddings.float(), self.proxies), labels)


class ProxyAnchor(torch.nn.Module):
    """Each proxy of a batch's classes pulls its own images and pushes all others, by soft maxima over the batch.

    start: (classes, dim) directions of the first proxies. Source: Proxy Anchor (2003.13911), equation 4; margin 0.1 and,
    as in GP-NNS, sharpness sqrt(dim). forward as in ArcMargin.
    """

    def __init__(self, start: np.ndarray, margin: float = 0.1):
        super().__init__()
        self.proxies = torch.nn.Parameter(torch.as_tensor(start, dtype=torch.float32).clone())
        self.margin, self.sharpness = margin, start.shape[1] ** 0.5

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        cosines = F.linear(F.normalize(embeddings.float()), F.normalize(self.proxies))
        own = F.one_hot(labels, len(self.proxies)).bool()
        pull = torch.where(own, -self.sharpness * (cosines - self.margin), -torch.inf)
        push = torch.where(own, -torch.inf, self.sharpness * (cosines + self.margin))
        return F.softplus(pull[:, own.any(dim=0)].logsumexp(0)).mean() + F.softplus(push.logsumexp(0)).mean()


def margins_by_count(counts: np.ndarray, low: float = 0.05, high: float = 0.5) -> np.ndarray:
    """A margin per class, from `high` for the rarest to `low` for the most frequent, by counts ** -1/4. Source: the code of
    GUIE's fourth place (2210.11141)."""
    rarity = np.asarray(counts, dtype=float) ** -0.25
    spread = rarity.max() - rarity.min()
    return low + (high - low) * (rarity - rarity.min()) / (spread or 1)


# --- captions --------------------------------------------------------------------------------------------------------


def multi_caption_loss(
    embeddings: torch.Tensor, captions: torch.Tensor, own: torch.Tensor, scale: float = 30.0, margin: float = 0.1
) -> torch.Tensor:
    """MCIP's loss of images (n, d) among unit captions (m, d), own: bool (n, m), which captions belong to which image.

    A softmax over all captions of the batch, the own ones made harder by a margin, against equal shares for them; plus a
    tenth of the largest -log share of a caption, each times what its target lacks to 1: mostly that of the farthest caption
    of another image, which is thereby pulled back a little. An image without captions has this last term alone. Source:
    2409.01936, MCArcMargin.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        if own.shape[1] == 0:
            return 0.0 * embeddings.float().sum()
        cosines = F.linear(F.normalize(embeddings.float()), captions.float())
        harder = arc_margin(cosines, torch.tensor(margin, device=cosines.device))
        surprise = -F.log_softmax(scale * torch.where(own, harder, cosines), dim=1)
        target = own / own.sum(dim=1, keepdim=True).clamp(min=1)
        return ((target * surprise).sum(dim=1) + 0.1 * ((1 - target) * surprise).amax(dim=1)).mean()


SHARED = ("right", "wrong")  # what another image's copy of a caption is to an image that has it too


def check_shared(shared: str) -> None:
    """ValueError for another word, which would train as if it were "right"."""
    if shared not in SHARED:
        raise ValueError(f"shared_captions is one of {', '.join(SHARED)}, not {shared!r}")


def batch_captions(rows: torch.Tensor, shared: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """The captions of a batch, rows (m,) of the bank, and which image has which, bool (n, m); rows: (n, top) int64, -1 for
    none. A caption of two images is one that belongs to both or, with shared="wrong", two of which each has one: so do the
    originals of MCIP and CLIP, to which the other's copy is a wrong answer."""
    image, place = torch.nonzero(rows >= 0, as_tuple=True)
    if shared == "wrong":
        return rows[image, place], image == torch.arange(len(rows), device=rows.device)[:, None]
    columns, where = rows[image, place].unique(return_inverse=True)
    own = torch.zeros(len(rows), len(columns), dtype=torch.bool, device=rows.device)
    own[image, where] = True
    return columns, own


def info_nce(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """CLIP's loss of unit rows (n, d), both directions; pairs with equal caption numbers (n,) are right for each other."""
    logits = scale * images @ texts.T
    right = (numbers[:, None] == numbers).float()
    right = right / right.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
