"""Downloads the shards that training needs next, in the order of the epoch."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import accumulate

from torch.utils.data import Sampler

from amp.data.order import BatchOrder, shards_of_epoch
from amp.data.remote.cache import RemoteShard, ShardCache
from amp.errors import AmpError

AT_ONCE = 8
"""Shards that a process downloads at the same time."""
EPOCHS = 2  # how far ahead
SECONDS = 1.0  # between two looks at a cache that has no room


class Ahead:
    """Fills a cache from a thread while training reads it.

    Each process of a node has one; a shard that one of them downloads is skipped by the others. The shards that are
    needed next, as many as fit, are kept in use, so that no other process or job removes them.

    Args:
        shards: The shards of the training split by number; None for local ones.
        cache: The cache to fill.
    """

    def __init__(self, shards: Sequence[RemoteShard | None], cache: ShardCache):
        self.shards, self.cache = list(shards), cache
        self._order: BatchOrder | None = None
        self._position: tuple[int, int] | None = None  # epoch, and shard of the current batch's first sample
        self._changed, self._stopped = threading.Event(), False
        self._thread: threading.Thread | None = None
        self._failed: set[str] = set()

    def following(self, order: BatchOrder) -> Sampler:
        """A batch sampler that yields what `order` yields, and keeps the downloads ahead of it."""
        self._order = order
        self._starts = [0, *accumulate(order.shard_sizes)]
        return _Followed(order, self)

    def at(self, sample: int, epoch: int) -> None:
        """Notes the position of training: the first sample of a batch."""
        position = epoch, bisect_right(self._starts, sample) - 1
        if position == self._position:
            return
        self._position = position
        self._changed.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="shards ahead")
            self._thread.start()

    def close(self) -> None:
        """Stops the thread. A download that has begun is completed."""
        self._stopped = True
        self._changed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def upcoming(self) -> list[RemoteShard]:
        """The remote shards that are needed next, each once, as many as the cache can hold."""
        assert self._order is not None and self._position is not None
        order, (epoch, current) = self._order, self._position
        found: dict[str, RemoteShard] = {}
        room = self.cache.limit
        for number in range(EPOCHS):
            shards = shards_of_epoch(order.shard_sizes, order.seed, epoch + number, order.taken(epoch + number))
            if not number and current in shards:  # from the window that contains the current batch
                shards = shards[shards.index(current) // order.window * order.window :]
            for index in shards:
                shard = self.shards[index]
                if shard is None or shard.key in found:
                    continue
                if shard.bytes > room:
                    return list(found.values())
                room -= shard.bytes
                found[shard.key] = shard
        return list(found.values())

    def _run(self) -> None:
        running: dict[str, Future] = {}
        pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="shards ahead")
        with pool:
            while not self._stopped:
                self._changed.clear()
                missing = [shard for shard in self.upcoming() if self.cache.find(shard) is None]
                for shard in missing:
                    if len(running) >= AT_ONCE:
                        break
                    if shard.key not in running and shard.key not in self._failed:
                        running[shard.key] = pool.submit(self._fetch, shard)
                if running:
                    wait(running.values(), SECONDS, FIRST_COMPLETED)
                done = {key: future for key, future in running.items() if future.done()}
                running = {key: future for key, future in running.items() if key not in done}
                if not any(future.result() for future in done.values()) and not self._stopped:
                    self._changed.wait(SECONDS if not running else SECONDS / 20)

    def _fetch(self, shard: RemoteShard) -> bool:
        """Downloads a shard. Errors are left to the process that reads the shard, which raises them."""
        if self._stopped:
            return False
        try:
            return self.cache.fetch(shard, wait=False)
        except AmpError:
            self._failed.add(shard.key)
            return False


class _Followed(Sampler):
    def __init__(self, order: BatchOrder, ahead: Ahead):
        self.order, self.ahead = order, ahead

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.order:
            self.ahead.at(*batch[0])
            yield batch
