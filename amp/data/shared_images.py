"""Passes decoded images from DataLoader workers to the main process through a reusable shared-memory buffer.

A DataLoader allocates new shared memory for each batch. The kernel clears and maps it page by page, which takes a tenth
as long as decoding, and a file descriptor is passed between the processes. Here each page is mapped once per run, and
images are only copied.
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
    """Buffer with places for batches of images, the same number of places for each worker of a loader.

    Args:
        shape: Shape of a batch's images, (B, ...).
        dtype: Type of the images.
        workers: Number of workers of the loader.
        places: Number of batches per worker. If all places of a worker are in use, the batch goes through the loader's
            own shared memory.
        pin: Whether images are copied to page-locked memory in the main process.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, workers: int, places: int, pin: bool):
        shape = (workers, places, *shape)
        # Allocate as default_collate does; share_memory_() would first write to all of the memory.
        memory = torch.UntypedStorage._new_shared(torch.Size(shape).numel() * dtype.itemsize)
        self._places = torch.empty(0, dtype=dtype).set_(memory).view(shape)
        self._free = [Semaphore(places) for _ in range(workers)]
        self._pin = pin
        self._next = 0
        self._number = next(_numbers)
        _known[self._number] = self

    def put(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Stacks the images of a batch into a free place. Called in a worker.

        Places are used in turn, because the batches of a worker are taken in order.

        Returns:
            An object that is unpickled in the main process as the tensor of images.
        """
        info = get_worker_info()
        assert info is not None, "`put` is called in a loader's worker"
        worker = info.id
        if not self._free[worker].acquire(block=False):
            return default_collate(list(images))
        place, self._next = self._next, (self._next + 1) % self._places.shape[1]
        torch.stack(tuple(images), out=self._places[worker, place])
        return cast(torch.Tensor, _Placed(self._number, worker, place))

    def take(self, worker: int, place: int) -> torch.Tensor:
        """Copies the images that a worker put into a place, and frees the place. Called in the main process."""
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
