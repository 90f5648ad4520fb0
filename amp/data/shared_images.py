"""The way of a batch's images from the worker that decoded them, through memory that is used again.

A DataLoader gives each batch shared memory of its own, which the kernel clears and maps page by page: a tenth of the
time that decoding takes. Here each page is mapped once in a run, and written and read at the pace of a copy; no file is
passed to the other process either.
"""

import itertools
from collections.abc import Sequence
from typing import cast
from weakref import WeakValueDictionary

import torch
from torch.multiprocessing import Semaphore
from torch.utils.data import default_collate, get_worker_info

_numbers = itertools.count()
_known: "WeakValueDictionary[int, SharedImages]" = WeakValueDictionary()


class SharedImages:
    """Places for the images of batches, the same number for each worker of a loader.

    Args:
        shape: Of a batch's images, (B, ...).
        dtype: Theirs.
        workers: Of the loader.
        places: Batches that a worker may be ahead; those beyond go the loader's own way.
        pin: Whether images arrive in page-locked memory.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, workers: int, places: int, pin: bool):
        shape = (workers, places, *shape)
        # As default_collate does it; share_memory_() would write to all of it first.
        memory = torch.UntypedStorage._new_shared(torch.Size(shape).numel() * dtype.itemsize)
        self._places = torch.empty(0, dtype=dtype).set_(memory).view(shape)
        self._free = [Semaphore(places) for _ in range(workers)]
        self._pin = pin
        self._next = 0
        self._number = next(_numbers)
        _known[self._number] = self

    def put(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """In a worker: images of a batch, stacked, as what becomes a tensor of its own when another process unpickles
        it. Takes the worker's places in turn, for its batches arrive in order."""
        info = get_worker_info()
        assert info is not None, "images are put by a loader's worker"
        worker = info.id
        if not self._free[worker].acquire(block=False):
            return default_collate(list(images))
        place, self._next = self._next, (self._next + 1) % self._places.shape[1]
        torch.stack(tuple(images), out=self._places[worker, place])
        return cast(torch.Tensor, _Placed(self._number, worker, place))

    def take(self, worker: int, place: int) -> torch.Tensor:
        """In the loader's process: a copy of what a worker has put there; the place is free again."""
        source = self._places[worker, place]
        images = torch.empty(source.shape, dtype=source.dtype, pin_memory=self._pin).copy_(source)
        self._free[worker].release()
        return images


class _Placed:
    def __init__(self, *where: int):
        self.where = where

    def __reduce__(self):
        return _taken, self.where


def _taken(number: int, worker: int, place: int) -> torch.Tensor:
    return _known[number].take(worker, place)
