"""Random access to the samples of a remote shard."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from amp.data.remote import fetch
from amp.data.remote.cache import RemoteShard, ShardCache
from amp.data.shards.index import index_of, parse_index, records_of
from amp.data.shards.reader import ShardReader
from amp.errors import AmpError

RECORDS_AHEAD = 64
RECHECK_SECONDS = 60.0


class RemoteReader(ShardReader):
    """Random access to the samples of a remote shard.

    A photo is read from the cache, which downloads the whole shard first. Without a cache, or if the shard doesn't fit,
    only the bytes of the sample are read, through the index. Records that are read one after the other, as all captions
    of a split are before training, never download the shard.

    Args:
        shard: The shard.
        cache: Cache of the node; None reads without one.

    Raises:
        AmpError: A file can't be read or differs from the manifest.
    """

    path: Any

    def __init__(self, shard: RemoteShard, cache: ShardCache | None = None) -> None:
        self.path, self.shard, self.cache = shard.tar, shard, cache
        self._arguments = (shard, cache)
        self._places = shard.tar, shard.tar if shard.records is None else records_of(shard.tar)  # photo, record
        self._files: list[int] = []
        self._keys: list[str] | None = None
        self._next_record = 0
        self._ready: dict[tuple[int, int], bytes] = {}
        self._records: bytes | None = None
        self._tag: str | None = None
        self._checked = -RECHECK_SECONDS
        if shard.index is None:
            self._keys, self._spans = self._from_headers()
            return
        location = index_of(shard.tar)
        content = None if cache is None else cache.read(shard, location, 0, shard.index.bytes)
        if content is None:
            content = fetch.read_verified(location, shard.index.bytes, shard.index.sha256)
        limits = (shard.tar_file.bytes, (shard.records or shard.tar_file).bytes)
        self._spans = parse_index(content, location, shard.index, shard.samples, limits)

    def __reduce__(self) -> tuple[type[RemoteReader], tuple[Any, ...]]:
        return RemoteReader, self._arguments

    def close(self) -> None:
        """Does nothing: files are only open during a read."""

    def record(self, index: int) -> dict[str, Any]:
        one_after_the_other = index == self._next_record
        if one_after_the_other and (index, 1) not in self._ready and self._cached(index, 1) is None:
            self.prefetch(range(index, min(len(self), index + RECORDS_AHEAD)), photos=False)
        self._next_record = index + 1
        return super().record(index)

    @property
    def in_cache(self) -> bool:
        """Whether the whole shard is in the cache."""
        return self.cache is not None and self.cache.find(self.shard) is not None

    def prefetch(self, rows: Sequence[int], photos: bool = True) -> None:
        """Reads samples that are needed next, several at a time."""
        if photos and self.cache is not None and self.cache.fetch(self.shard):
            return
        parts = [(row, which) for row in rows for which in ((0, 1) if photos else (1,))]
        if self.shard.records is not None:  # read whole
            parts = [part for part in parts if part[1] == 0]
        self._ready.update(zip(parts, fetch.in_parallel(lambda part: self._range(*part), parts), strict=True))

    def _pread(self, index: int, which: int) -> bytes:
        content = self._ready.pop((index, which), None)
        if content is None:
            content = self._cached(index, which)
        alone = which == 1 and self.shard.records is not None  # in a small file, which is read whole
        if content is None and not alone and self.cache is not None and self.cache.fetch(self.shard):
            content = self._cached(index, which)
        return self._range(index, which) if content is None else content

    def _cached(self, index: int, which: int) -> bytes | None:
        """Bytes of a sample from the cache; None if the shard isn't there."""
        if self.cache is None:
            return None
        offset, size = self._spans[index, which].tolist()
        return self.cache.read(self.shard, self._places[which], offset, offset + size)

    def _range(self, index: int, which: int) -> bytes:
        """Bytes of a sample from the server."""
        offset, size = self._spans[index, which].tolist()
        records = self.shard.records
        if which == 1 and records is not None:
            if self._records is None:
                self._records = fetch.read_verified(self._places[1], records.bytes, records.sha256)
            return self._records[offset : offset + size]
        self._check()
        return fetch.read_range(self.shard.tar, offset, offset + size)

    def _check(self) -> None:
        """Checks now and then that the object is still the same."""
        if time.monotonic() - self._checked < RECHECK_SECONDS:
            return
        self._checked = time.monotonic()
        found = fetch.check_size(self.shard.tar, self.shard.tar_file.bytes)
        if self._tag is not None and found.tag != self._tag:
            raise AmpError(
                f"{self.path}: its tag (ETag) is {found.tag}; expected {self._tag}, as when it was opened; "
                f"{fetch.CHANGED}"
            )
        self._tag = found.tag

    def _from_headers(self) -> tuple[list[str], Any]:
        """Keys and spans of a shard without an index, which must be in the cache."""
        tar = None
        if self.cache is not None and self.cache.fetch(self.shard):
            tar = self.cache.find(self.shard)
        if tar is None:
            raise AmpError(
                f"{self.path}: has no index ({index_of(self.shard.tar).name}); expected one, to read single samples; "
                "make the shards again with amp make_shards, or give data.shard_cache a folder with room"
            )
        with ShardReader(tar) as reader:
            return reader.keys, reader.spans
