"""The index of a shard: where the photo and the record of each sample are, so that no tar header has to be read.

`NAME.index.npy` next to `NAME.tar` is an array int64 (samples, 2, 2): offset and size in bytes of the photo in the tar
file, and of the record. The records are in the tar file itself, or in `NAME.records.jsonl`, one per line, for tar files
of other tools that stay as they are.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from amp.data.images.file import MAX_FILE_BYTES
from amp.data.remote.location import Location
from amp.errors import AmpError, shorten

Place = TypeVar("Place", Path, Location)
Span = tuple[int, int]
"""Offset and size in bytes."""
REINDEX = "copy the file again, or make the shards or their index again"


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file next to a tar file, as listed in the manifest.

    Attributes:
        bytes: Size in bytes.
        sha256: SHA-256, hexadecimal.
    """

    bytes: int
    sha256: str


def side_file(content: bytes) -> SideFile:
    """The entry of a file with this content."""
    return SideFile(len(content), hashlib.sha256(content).hexdigest())


def index_of(shard: Place) -> Place:
    """Path of a shard's index."""
    return shard.with_name(f"{shard.name.removesuffix('.tar')}.index.npy")


def records_of(shard: Place) -> Place:
    """Path of the records of a tar file that has none."""
    return shard.with_name(f"{shard.name.removesuffix('.tar')}.records.jsonl")


def index_bytes(spans: Sequence[tuple[Span, Span]]) -> bytes:
    """Content of an index file; `spans` are those of each sample's photo and record."""
    file = io.BytesIO()
    np.save(file, np.array(spans, dtype="<i8").reshape(-1, 2, 2), allow_pickle=False)
    return file.getvalue()


def parse_index(content: bytes, path: Path | Location, expected: SideFile, samples: int, limits: Span) -> np.ndarray:
    """The spans int64 (samples, 2, 2) in an index file.

    Args:
        content: The bytes of the file.
        path: The file, for messages.
        expected: Its entry in the manifest.
        samples: Number of samples of the shard.
        limits: Sizes of the files that contain the photos and the records.

    Raises:
        AmpError: The content isn't what the manifest describes, or points outside of the files.
    """
    found = side_file(content)
    if found != expected:
        raise AmpError(f"{path}: sha256 is {found.sha256}; expected {expected.sha256} (from the manifest); {REINDEX}")
    try:
        spans = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise AmpError(f"{path}: not an index of a shard ({error}); {REINDEX}") from None
    if spans.shape != (samples, 2, 2) or spans.dtype != np.dtype("<i8"):
        raise AmpError(
            f"{path}: an array {spans.dtype} of shape {shorten(spans.shape)}; expected int64 ({samples}, 2, 2); "
            f"{REINDEX}"
        )
    offsets, sizes = spans[..., 0], spans[..., 1]
    inside = (offsets >= 0) & (sizes >= 0) & (sizes <= MAX_FILE_BYTES) & (offsets <= np.array(limits) - sizes)
    if not inside.all():
        row = int(np.argmin(inside.all(axis=1)))
        raise AmpError(
            f"{path}: sample {row} is at {spans[row].tolist()}; expected offsets and sizes inside of the files; "
            f"{REINDEX}"
        )
    return spans
