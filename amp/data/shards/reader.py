"""Random access to the samples of one shard."""

from __future__ import annotations

import os
import tarfile
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from amp.data.images.file import MAX_FILE_BYTES
from amp.data.images.formats import DECODER_OF
from amp.data.shards.headers import tar_members
from amp.data.shards.index import REINDEX, SideFile, index_of, parse_index, records_of
from amp.data.shards.record import REMAKE, parse_record
from amp.errors import AmpError, shorten

IMAGE_EXTENSIONS = tuple(suffix[1:] for suffix in DECODER_OF)
MAX_MEMBER_BYTES = MAX_FILE_BYTES
"""Maximum bytes of an image file or a record."""


class ShardReader:
    """Random access to the samples of one shard.

    Reads use `os.pread`, which has no file position, so several threads and forked processes can share a reader.
    Unpickling (in a spawned worker) opens the files again.

    Args:
        path: A tar file.
        index: Entry of its index in the manifest; None reads the headers of the tar file instead.
        records: Entry of its file of records in the manifest; None if the records are in the tar file.
        samples: Number of samples; only used with an index.
        side: Folder of the index and the file of records; None if they are next to the tar file.

    Raises:
        AmpError: A file is unreadable, truncated or empty, the index doesn't belong to the files, or the tar file
            contains something that doesn't belong in a shard: pickles, links, devices, folders, absolute or parent
            paths, a repeated key, or a sample without image or record.
    """

    def __init__(
        self,
        path: str | Path,
        index: SideFile | None = None,
        records: SideFile | None = None,
        samples: int = 0,
        side: Path | None = None,
    ) -> None:
        self.path = Path(path)
        self._arguments: tuple[Any, ...] = (self.path, index, records, samples, side)
        self._indexed_path = self.path if side is None else side / self.path.name
        self._files: list[int] = []
        self._keys: list[str] | None = None
        try:
            self._files.append(_open(self.path, f"expected a tar shard; {REMAKE}"))
            if index is None:
                self._keys, self._spans = self._read_headers()
            else:
                self._spans = self._read_index(index, records, samples)
        except OSError as error:
            self.close()
            raise AmpError(f"{self.path}: can't be read ({error.strerror}); expected a tar shard; {REMAKE}") from None
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._spans)

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[ShardReader], tuple[Any, ...]]:
        return ShardReader, self._arguments

    def close(self) -> None:
        """Closes the files. Further calls do nothing."""
        files, self._files = getattr(self, "_files", []), []
        for file in files:
            os.close(file)

    @property
    def spans(self) -> np.ndarray:
        """Offset and size of each sample's photo and record, int64 (n, 2, 2)."""
        return self._spans

    @cached_property
    def keys(self) -> list[str]:
        """Keys of the samples, in the order of the tar file."""
        return self._keys if self._keys is not None else [self.record(index)["key"] for index in range(len(self))]

    def read(self, index: int) -> tuple[bytes, dict[str, Any]]:
        """Reads sample number `index`, 0-based: the bytes of its image file, and its record.

        Raises:
            IndexError: `index` is not in `range(len(self))`.
            AmpError: The record is invalid; see `parse_record`.
        """
        return self.photo(index), self.record(index)

    def photo(self, index: int) -> bytes:
        """The bytes of a sample's image file."""
        return self._bytes(index, 0)

    def record(self, index: int) -> dict[str, Any]:
        """The record of a sample; raises like `read`."""
        content = self._bytes(index, 1)
        if self._keys is not None:
            return parse_record(content, self._keys[index], f"{self.path}: {self._keys[index]}.json")
        return parse_record(content, None, f"{self.path}: record {index}")

    def _bytes(self, index: int, which: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: sample {index} of {len(self)}")
        content = self._pread(index, which)
        offset, size = self._spans[index, which].tolist()
        if len(content) != size:
            sample = self._keys[index] if self._keys is not None else f"sample {index}"
            raise AmpError(
                f"{self.path}: {sample}: {len(content)} bytes at offset {offset}; expected {size}; the file "
                f"was truncated while in use; {REMAKE}"
            )
        return content

    def _pread(self, index: int, which: int) -> bytes:
        """The bytes of a sample's photo (0) or record (1); fewer if a file was truncated."""
        if not self._files:
            raise ValueError(f"{self.path}: read after close")
        offset, size = self._spans[index, which].tolist()
        return os.pread(self._files[-1 if which else 0], size, offset)

    def _read_index(self, index: SideFile, records: SideFile | None, samples: int) -> np.ndarray:
        """The spans int64 (n, 2, 2) from the index file. Opens the file of records, if there is one."""
        path = index_of(self._indexed_path)
        file = _open(path, REINDEX)
        try:
            content = os.pread(file, index.bytes + 1, 0)
        finally:
            os.close(file)
        limits = [os.fstat(self._files[0]).st_size] * 2
        if records is not None:
            records_path = records_of(self._indexed_path)
            self._files.append(_open(records_path, REINDEX))
            limits[1] = os.fstat(self._files[1]).st_size
            if limits[1] != records.bytes:
                raise AmpError(
                    f"{records_path}: {limits[1]} bytes; expected {records.bytes} (from the manifest); {REINDEX}"
                )
        return parse_index(content, path, index, samples, (limits[0], limits[1]))

    def _read_headers(self) -> tuple[list[str], np.ndarray]:
        """The keys (n,) and spans int64 (n, 2, 2) from the headers of the tar file."""
        found: dict[str, dict[str, tuple[int, int]]] = {}
        last_key = None
        with open(self._files[0], "rb", closefd=False) as file:
            for member in tar_members(file, self.path, REMAKE):
                key, slot = self._key_and_slot(member)
                sample = found.setdefault(key, {})
                if slot in sample or (sample and key != last_key):
                    raise AmpError(f"{self.path}: {member.name}: key {key!r} occurs twice; {REMAKE}")
                sample[slot] = (member.offset_data, member.size)
                last_key = key
        if not found:
            raise AmpError(f"{self.path}: the shard holds no sample; expected at least one; {REMAKE}")
        for key, sample in found.items():
            for slot, expected in (("image", "an image"), ("json", "a .json record")):
                if slot not in sample:
                    raise AmpError(f"{self.path}: sample {key!r} lacks {expected}; {REMAKE}")
        spans = np.array([(sample["image"], sample["json"]) for sample in found.values()], dtype=np.int64)
        return list(found), spans

    def _key_and_slot(self, member: tarfile.TarInfo) -> tuple[str, str]:
        """The sample key of a member and its slot, "image" or "json"."""
        name = PurePosixPath(member.name)
        # In WebDataset, the key ends at the first dot of the file name.
        stem, _, extension = name.name.partition(".")
        slot = "json" if extension == "json" else "image" if extension in IMAGE_EXTENSIONS else None
        if slot is None or not stem:
            raise AmpError(
                f"{self.path}: member {shorten(member.name)} isn't part of a sample; expected KEY.json or KEY with one "
                f"of {', '.join(IMAGE_EXTENSIONS)} "
                f"(pickles are never read); {REMAKE}"
            )
        return str(name.parent / stem), slot


def _open(path: Path, hint: str) -> int:
    try:
        # Non-blocking, because opening a named pipe would hang.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise AmpError(f"{path}: can't be read ({error.strerror}); {hint}") from None
