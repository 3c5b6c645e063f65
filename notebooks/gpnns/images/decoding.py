"""Images read and prepared by several processes, batch by batch."""

from __future__ import annotations

import collections
import os
import warnings
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from gpnns.images import image_set
from gpnns.images.image_set import ImageSet


class DecodedImages(Dataset):
    """Preprocessed images by row; None for one that cannot be read."""

    def __init__(self, images: ImageSet, preprocess: Callable):
        self.images, self.preprocess = images, preprocess

    def __getitem__(self, row: int) -> torch.Tensor | None:
        image = image_set.open_or_none(lambda: self.images[row])
        return None if image is None else self.preprocess(image)


def stack_readable(items: list[torch.Tensor | None]) -> tuple[int, list[int], np.ndarray]:
    """A batch of `DecodedImages`: its size, which of its images were readable, and those as one array."""
    readable = [i for i, item in enumerate(items) if item is not None]
    pixels = torch.stack([items[i] for i in readable]) if readable else torch.empty(0)
    pixels = pixels.float() if pixels.dtype == torch.bfloat16 else pixels  # which numpy does not know
    return len(items), readable, pixels.numpy()


def count_decoders(images: ImageSet, count: int) -> int:
    """How many processes should decode `count` of the images: none for arrays and for a handful of files."""
    return 0 if isinstance(images.images, np.ndarray) or count < 64 else min(8, os.cpu_count() or 1)


def read_in_workers(dataset: Dataset, batches: Iterable, workers: int, collate: Callable) -> Iterator:
    """What `collate` makes of the items of each batch, in order, read by worker processes; 0 for this one.

    collate must return numpy arrays, which travel through pipes. torch would put every tensor into shared memory, of
    which Docker gives 64 MB in all, and keep a file open for it. Where workers cannot be started or are lost, half as
    many go on where they were, and at last this process alone, with the same results and a warning.
    """
    batches, asked, broken = iter(batches), collections.deque(), []

    def draw(again: list) -> Iterator:
        yield from again
        try:
            for batch in batches:
                asked.append(batch)
                yield batch
        except Exception as error:  # not the workers' fault
            broken.append(error)

    while True:
        try:
            loader = DataLoader(dataset, batch_sampler=draw(list(asked)), num_workers=workers, collate_fn=collate)
            for items in loader:
                asked.popleft()
                yield items
            if broken:
                raise broken[0]
            if asked:
                raise ValueError(
                    f"an item of the rows {asked[0]} raised StopIteration, which would end the reading unseen"
                )
            return
        except (OSError, RuntimeError, MemoryError) as error:
            short = isinstance(error, MemoryError) or any(
                f"[Errno {code}]" in str(error) for code in image_set.EXHAUSTED
            )
            if workers == 0 or broken or ("in DataLoader worker process" in str(error) and not short):
                raise
            workers, lost = workers // 2, workers
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            warnings.warn(
                f"{lost} processes that read images could not go on ({reason}); going on with {workers or 'this one alone'}. "
                "They need memory, open files (see `ulimit -n`) and, in a container, some shared memory (docker run "
                "--shm-size=1g)",
                stacklevel=2,
            )
