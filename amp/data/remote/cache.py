"""A cache of whole remote shards on the disk of a node, shared by all its processes and jobs."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from amp.data.remote import fetch
from amp.data.remote.location import Location
from amp.data.shards.index import SideFile, index_of, records_of
from amp.errors import AmpError
from amp.locks import file_lock

IN_USE_SECONDS = 10.0
"""A shard that was read this recently isn't removed."""
TOUCH_SECONDS = 1.0
FULL_SECONDS = 5.0  # until a full cache is tried again
_PART, _GONE = ".part-", ".gone-"


@dataclass(frozen=True)
class RemoteShard:
    """The files of a remote shard with their entries in the manifest.

    Attributes:
        tar: Location of the tar file.
        tar_file: Its entry.
        index: Entry of its index; None for shards of older releases.
        records: Entry of its file of records; None if the tar file contains the records.
        samples: Number of samples.
    """

    tar: Location
    tar_file: SideFile
    index: SideFile | None
    records: SideFile | None
    samples: int

    @cached_property
    def files(self) -> dict[Location, SideFile]:
        """All files of the shard. The tar file is last."""
        side = {index_of(self.tar): self.index, records_of(self.tar): self.records, self.tar: self.tar_file}
        return {location: file for location, file in side.items() if file is not None}

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())

    @cached_property
    def key(self) -> str:
        """Name of the shard in a cache: equal names mean equal content, wherever it comes from."""
        content = "|".join(file.sha256 for file in self.files.values())
        return f"{self.tar.name}.{hashlib.sha256(content.encode()).hexdigest()[:16]}"


class ShardCache:
    """Whole shards in a local folder, one subfolder per shard.

    A shard is downloaded by one process while the others wait, verified with the manifest, and appears complete or not
    at all. If there is no room, shards that were not read for the longest time are removed, but never one that was read
    in the last `IN_USE_SECONDS`: two jobs with a cache that is too small would otherwise keep downloading the same
    shards. What doesn't fit is read without the cache.

    Files are opened for each read, so that a removed shard doesn't occupy the disk, and forked processes share nothing.

    Args:
        folder: Folder of the cache, created if it is missing.
        limit: Maximum size in bytes.

    Raises:
        AmpError: The folder can't be created.
    """

    def __init__(self, folder: str | os.PathLike, limit: float):
        self.folder, self.limit = Path(folder), int(limit)
        self._touched: dict[str, float] = {}
        self._full_until = 0.0
        try:
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AmpError(
                f"{self.folder}: can't be created ({error.strerror}); expected a folder for data.shard_cache; give one "
                "that you may write to"
            ) from None

    def find(self, shard: RemoteShard) -> Path | None:
        """The tar file of a shard, marked as in use; None if the shard isn't complete in the cache."""
        folder = self.folder / shard.key
        return folder / shard.tar.name if self._mark_in_use(shard) and folder.is_dir() else None

    def read(self, shard: RemoteShard, file: Location, start: int, stop: int) -> bytes | None:
        """Part of a file of a shard; None if the shard isn't in the cache."""
        if not self._mark_in_use(shard):
            return None
        try:
            descriptor = os.open(f"{self.folder}/{shard.key}/{file.name}", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # removed since it was marked
            return None
        try:
            return os.pread(descriptor, stop - start, start)
        finally:
            os.close(descriptor)

    def _mark_in_use(self, shard: RemoteShard) -> bool:
        """Marks a shard once every `TOUCH_SECONDS`. Returns False if it was found missing."""
        if time.monotonic() - self._touched.get(shard.key, -TOUCH_SECONDS) >= TOUCH_SECONDS:
            try:
                os.utime(self.folder / shard.key)
            except OSError:
                self._touched.pop(shard.key, None)
                return False
            self._touched[shard.key] = time.monotonic()
        return True

    def fetch(self, shard: RemoteShard, wait: bool = True) -> bool:
        """Downloads a shard unless it is there.

        Args:
            shard: The shard.
            wait: Wait for another process that downloads it.

        Returns:
            Whether the shard is there. False if there is no room for it, or if another process downloads it.

        Raises:
            AmpError: The shard can't be read, or differs from the manifest.
        """
        if self.find(shard) is not None:
            return True
        if time.monotonic() < self._full_until:
            return False
        with self._lock(shard.key, wait) as held:
            if not held:
                return False
            if self.find(shard) is not None:  # another process was faster
                return True
            part = self.folder / f"{_PART}{shard.key}"
            try:
                if not self._make_room(shard, part):
                    self._full_until = time.monotonic() + FULL_SECONDS
                    return False
                self._download(shard, part)
                with self._lock(".room", True):  # nobody may miss it while counting
                    os.rename(part, self.folder / shard.key)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise AmpError(
                        f"{self.folder}: can't be written ({error.strerror}); expected a folder for data.shard_cache; "
                        "give one that you may write to"
                    ) from None
                self._disk_is_full()
                return False
            finally:
                shutil.rmtree(part, ignore_errors=True)
            return True

    def _download(self, shard: RemoteShard, part: Path) -> None:
        for location, expected in shard.files.items():
            if location == shard.tar:
                fetch.check_size(location, expected.bytes)  # at once, instead of after reading gigabytes
            with open(part / location.name, "r+b") as file:
                fetch.download(location, expected.bytes, expected.sha256, file)
                file.flush()
                os.fsync(file.fileno())  # a power cut must not leave a complete name with missing content

    def _make_room(self, shard: RemoteShard, part: Path) -> bool:
        """Reserves the space of a shard by files of full size. Returns False if it doesn't fit."""
        with self._lock(".room", True):
            self._remove_left_over(shard.key)
            sizes = {folder: _size_of(folder) for folder in self._folders()}
            missing = sum(sizes.values()) + shard.bytes - self.limit
            for _, folder in sorted(self._removable()):
                if missing <= 0:
                    break
                missing -= sizes.get(folder, 0)
                self._remove(folder)
            if missing > 0:
                return False
            part.mkdir()
            for location, expected in shard.files.items():
                with open(part / location.name, "xb") as file:
                    file.truncate(expected.bytes)
            return True

    def _folders(self) -> list[Path]:
        """Folders of shards, complete or not."""
        with suppress(OSError):
            return [path for path in self.folder.iterdir() if path.name != "locks"]
        return []

    def _removable(self) -> Iterator[tuple[float, Path]]:
        """Complete shards that are not in use, with the time of their last use."""
        now = time.time()
        for folder in self._folders():
            if not folder.name.startswith((_PART, _GONE)):
                with suppress(OSError):
                    used = folder.stat().st_mtime
                    if now - used >= IN_USE_SECONDS:
                        yield used, folder

    def _remove(self, folder: Path) -> None:
        """Removes a shard. Its name disappears at once, so that nobody finds half of it."""
        gone = self.folder / f"{_GONE}{uuid.uuid4().hex}"
        with suppress(OSError):
            os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _remove_left_over(self, mine: str) -> None:
        """Removes the temporary folders of killed processes. The caller holds the locks `.room` and `mine`."""
        for folder in self._folders():
            if folder.name.startswith(_GONE):
                shutil.rmtree(folder, ignore_errors=True)
            elif folder.name.startswith(_PART):
                key = folder.name.removeprefix(_PART)
                if key == mine:
                    shutil.rmtree(folder, ignore_errors=True)
                    continue
                with self._lock(key, False) as held:
                    if held:
                        shutil.rmtree(folder, ignore_errors=True)

    def _disk_is_full(self) -> None:
        """Makes some room for the next attempt, and reports it."""
        self._full_until = time.monotonic() + FULL_SECONDS
        with self._lock(".room", True):
            for _, folder in sorted(self._removable())[:1]:
                self._remove(folder)
        with suppress(OSError):
            free = shutil.disk_usage(self.folder).free / 1e9
            print(
                f"{self.folder}: the disk is full ({free:.2f} GB are free); shards that don't fit are read without "
                "the cache; make room, or lower data.shard_cache_gb",
                file=sys.stderr,
                flush=True,
            )

    @contextmanager
    def _lock(self, name: str, wait: bool) -> Iterator[bool]:
        with file_lock(self.folder / "locks" / name, wait) as held:
            yield held


def _size_of(folder: Path) -> int:
    total = 0
    with suppress(OSError):
        for path in folder.iterdir():
            with suppress(OSError):
                total += path.stat().st_size
    return total
