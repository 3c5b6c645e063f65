"""An Encoder: towers, their preprocessing, and a fingerprint that changes when their embeddings do.

It stands below `gpnns_utils`, which embeds with it, and imports nothing of the course.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image


@dataclass
class Encoder:
    """A model that turns images, and perhaps texts, into vectors of `dim` numbers.

    preprocess: PIL image -> tensor (3, height, width). image_tower: batch of those -> (b, dim). encode_text: tokens ->
    (b, dim), or a list of strings where there is no tokenizer; None for images only. Build one yourself for any model;
    `embed_images` needs nothing else. `copy.deepcopy` gives one with weights of its own.
    """

    name: str
    preprocess: Callable[[Image.Image], torch.Tensor]
    image_tower: torch.nn.Module | Callable
    encode_text: Callable[[torch.Tensor], torch.Tensor] | Callable[[list[str]], torch.Tensor] | None = None
    device: torch.device = torch.device("cpu")
    model: torch.nn.Module | None = None  # the whole model, both towers, when there is one
    origin: dict = field(default_factory=dict)  # how to build it again: its name, and what `add_head` changed
    tokenizer: Callable[[list[str]], torch.Tensor] | None = None  # strings -> int64 (b, context)
    image_size: int = field(init=False)
    dim: int = field(init=False)
    known: dict[str, tuple] = field(init=False, repr=False, compare=False, default_factory=dict)  # of `fingerprint`

    def __post_init__(self):
        self.device = torch.device(self.device)
        probe = self.probe()
        self.image_size, self.dim = probe.shape[-1], self.features(self.image_tower, probe[None]).shape[-1]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"known": {}}  # a copy, or one in another process, has other weights

    @property
    def has_text(self) -> bool:
        """Whether it embeds texts too."""
        return self.encode_text is not None

    def text_tower(self, texts: list[str]) -> torch.Tensor:
        """What the model makes of texts: (b, dim), not yet unit rows. ValueError for an encoder of images only."""
        if self.encode_text is None:
            raise ValueError(f"{self.name} encodes images only")
        return self.encode_text(texts if self.tokenizer is None else self.tokenizer(texts).to(self.device))

    def probe(self) -> torch.Tensor:
        """A test picture after preprocessing."""
        return self.preprocess(make_probes()[0])

    def features(self, tower: Callable, batch: Any) -> np.ndarray:
        """What a tower makes of a batch, in full precision."""
        with torch.inference_mode():
            return tower(batch.to(self.device) if isinstance(batch, torch.Tensor) else batch).float().cpu().numpy()

    def fingerprint(self, of: str = "images") -> str:
        """A hash of what decides the embeddings of "images" or "texts": weights, layers, preprocessing, a probe.

        Preprocessing is known by what it makes of pictures of several kinds, and by its own description if it has one.
        It is the encoder's part of the cache key, asked for on each use, because training changes weights in place;
        while `take_state` sees no change, the last answer holds. New text weights leave image embeddings valid.
        """
        modules = self.list_modules(of)
        objects, values = self.take_state(modules)
        old_objects, old_values, known = self.known.get(of, ((), None, ""))
        if values == old_values and list(map(id, objects)) == list(map(id, old_objects)):
            return known
        digest = hashlib.blake2b(of.encode(), digest_size=12)
        for module in modules:
            digest.update(describe_transform(f"{type(module).__name__}({module.extra_repr()})").encode())
        for tensor in list_tensors(modules):
            digest.update(view_bytes(tensor))
        if of == "images":
            digest.update(describe_transform(self.preprocess).encode())
            for picture in make_probes():
                digest.update(self.preprocess(picture).float().numpy().tobytes())
            output = self.features(self.image_tower, self.probe()[None])
        else:
            output = self.features(self.text_tower, ["two red flowers and a blue vase, 37 of 64"])
        output = np.nan_to_num(output, posinf=1, neginf=-1)  # coarsely rounded: last bits depend on the thread count
        digest.update((np.round(output / max(np.abs(output).mean(), 1e-9), 1) + 0.0).tobytes())
        self.known[of] = objects, values, digest.hexdigest()
        return digest.hexdigest()

    def list_modules(self, of: str) -> list[torch.nn.Module]:
        """The modules behind the tower of "images" or "texts"; where a model has both, `visual` makes the images'."""
        tower, modules, seen = self.image_tower if of == "images" else self.encode_text, [], set()
        for whole in (getattr(tower, "__self__", tower), self.model):
            if isinstance(whole, torch.nn.Module):
                both = self.has_text and hasattr(whole, "visual")
                for name, module in whole.named_modules(seen):
                    if not both or (name.partition(".")[0] == "visual") == (of == "images"):
                        modules.append(module)
        return modules

    @torch.inference_mode()
    def take_state(self, modules: list[torch.nn.Module]) -> tuple[list, list]:
        """What embeddings depend on, at the cost of a look: objects, to be compared by identity (the list keeps them
        alive, so that no new one has their address), and values. What changes a tensor in place counts up its version;
        what goes around that, as by `.data`, shows in 16 of its numbers."""
        objects = [self.preprocess, self.image_tower, self.encode_text, self.tokenizer, self.model, *modules]
        for module in modules:
            objects += [*vars(module).values(), *module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        values, samples = [repr(self.preprocess)], defaultdict(list)
        for tensor in list_tensors(modules):
            shape, strides, version = tensor.shape, tensor.stride(), None if tensor.is_inference() else tensor._version
            objects.append(tensor)
            values.append((tensor.data_ptr(), version, shape, strides, tensor.dtype))
            if tensor.numel():
                reach = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
                sample = tensor.as_strided((min(reach, 16),), (max(reach // 16, 1),))
                samples[tensor.device, tensor.dtype].append(sample)
        values += [bytes(view_bytes(torch.cat(sample))) for sample in samples.values()]
        return objects, values


def list_tensors(modules: list[torch.nn.Module]) -> list[torch.Tensor]:
    """The parameters and buffers that the modules themselves hold, without those of their children."""
    found = (value for module in modules for value in (*module._parameters.values(), *module._buffers.values()))
    return [value for value in found if value is not None]


def view_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The content of a tensor of any dtype and device as uint8 (bytes,)."""
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()


def digest_weights(module: torch.nn.Module) -> bytes:
    """A hash of all tensors of a module, with their names."""
    digest = hashlib.blake2b(digest_size=16)
    for key, tensor in module.state_dict().items():
        digest.update(key.encode())
        digest.update(view_bytes(tensor))
    return digest.digest()


def describe_transform(step: Any) -> str:
    """What a transform says of itself; addresses in memory, which change with every process, are taken out."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(step))


PROBES = (  # height, width, border, its color, the lowest number in it and one above the highest
    (61, 97, 0, 0, 0, 256),
    (700, 900, 40, 255, 40, 200),
    (230, 30, 4, 0, 40, 200),
    (30, 230, 0, 0, 0, 24),
    (20, 17, 0, 0, 230, 254),
)


@functools.cache
def make_probes() -> list[Image.Image]:
    """Pictures that tell one preprocessing from another: noise, large and small, tall and wide, dark and pale, with
    white and with black borders, as scans and films have."""
    random, pictures = np.random.default_rng(0), []
    for height, width, border, color, low, high in PROBES:
        picture = np.full((height, width, 3), color, dtype=np.uint8)
        inner = picture[border : height - border, border : width - border]
        inner[:] = random.integers(low, high, inner.shape)
        pictures.append(Image.fromarray(picture))
    return pictures
