"""An Encoder: towers, their preprocessing, and a fingerprint that changes when their embeddings do.

It stands below `gpnns_utils`, which embeds with it, and imports nothing of the course.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

# --- an encoder ------------------------------------------------------------------------------------------------------


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
        self.device = torch.device(self.device)
        probe = self.probe()
        self.image_size, self.dim = probe.shape[-1], self.features(self.image_tower, probe[None]).shape[-1]

    def probe(self) -> torch.Tensor:
        """A test picture after preprocessing."""
        return self.preprocess(make_probes()[0])

    def in_two_parts(self) -> tuple[Callable, Callable]:
        """`preprocess` for a worker, PIL image -> uint8 tensor, and for the device, a batch of those -> float: a quarter
        of the bytes travels between them. Where the CPU would not make the same of it to the last bit: all of it, no change."""
        from torchvision import transforms

        steps = list(getattr(self.preprocess, "transforms", ()))
        normalize = steps.pop() if steps and isinstance(steps[-1], transforms.Normalize) else (lambda batch: batch)
        if steps and isinstance(steps[-1], transforms.ToTensor):
            in_worker = transforms.Compose([*steps[:-1], transforms.PILToTensor()])

            def on_device(batch: torch.Tensor) -> torch.Tensor:
                return normalize(batch.float().div(255))

            if all(torch.equal(on_device(in_worker(p)[None])[0], self.preprocess(p)) for p in make_probes()):
                return in_worker, on_device
        return self.preprocess, lambda batch: batch

    def features(self, tower: Callable, batch) -> np.ndarray:
        """What a tower makes of a batch, in full precision."""
        with torch.inference_mode():
            return tower(batch.to(self.device) if isinstance(batch, torch.Tensor) else batch).float().cpu().numpy()

    def fingerprint(self, of: str = "images") -> str:
        """A hash of what decides the embeddings of "images" or "texts": weights, layers, preprocessing, a probe's output.

        Preprocessing is known by what it makes of pictures of several kinds, and by its own description if it has one.

        It is the encoder's part of the cache key, taken anew on each use, because training changes weights in place.
        Where a model has two towers each has its own: new text weights leave cached image embeddings valid.
        """
        digest = hashlib.blake2b(of.encode(), digest_size=12)
        for picture in make_probes() if of == "images" else ():
            digest.update(self.preprocess(picture).float().numpy().tobytes())
        digest.update(describe_transform(self.preprocess).encode() if of == "images" else b"")
        whole = self.model if self.model is not None else self.image_tower
        if isinstance(whole, torch.nn.Module):
            visual = getattr(whole, "visual", None) if self.text_tower is not None else None
            digest.update(describe_transform(whole).encode())
            if of == "images":
                digest.update(digest_weights(whole if visual is None else visual))
            else:
                digest.update(digest_weights(whole, without="visual."))
        if of == "images":
            output = self.features(self.image_tower, self.probe()[None])
        else:
            output = self.features(self.text_tower, ["two red flowers and a blue vase, 37 of 64"])
        output = np.nan_to_num(output, posinf=1, neginf=-1)  # coarsely rounded: last bits depend on the thread count
        digest.update((np.round(output / max(np.abs(output).mean(), 1e-9), 1) + 0.0).tobytes())
        return digest.hexdigest()


def describe_transform(step) -> str:
    """What a transform says of itself; addresses in memory, which change with every process, are taken out."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(step))


@functools.cache
def make_probes() -> list[Image.Image]:
    """Pictures that tell one preprocessing from another: noise; bars with white, and with black borders, as scans and
    films have; tall and wide; gray; large and small; a dark and a pale one."""
    random = np.random.default_rng(0)

    def framed(height: int, width: int, border: int, color: int) -> np.ndarray:
        picture = np.full((height, width, 3), color, dtype=np.uint8)
        inner = picture[border : height - border, border : width - border]
        inner[:] = np.linspace(40, 200, inner.size).reshape(inner.shape)
        return picture

    pictures = [random.integers(0, 256, (61, 97, 3), dtype=np.uint8)]
    pictures += [framed(90, 70, 12, 255), framed(70, 110, 12, 0), framed(30, 230, 0, 0), framed(230, 30, 0, 0)]
    pictures += [random.integers(0, 256, (50, 50, 1), dtype=np.uint8).repeat(3, axis=2), framed(700, 900, 40, 255)]
    pictures += [random.integers(low, low + 24, (20, 17, 3), dtype=np.uint8) for low in (0, 230)]
    return [Image.fromarray(picture) for picture in pictures]


def digest_weights(module: torch.nn.Module, without: str | None = None) -> bytes:
    """A hash of all tensors of a module, with their names, except those whose name begins with `without`."""
    digest = hashlib.blake2b(digest_size=16)
    for key, tensor in module.state_dict().items():
        if without is None or not key.startswith(without):
            digest.update(key.encode() + tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()
