"""Reads remote objects, whole or in parts, with retries and verification."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

from amp.data.remote.location import INFO_OPTIONS, READ_OPTIONS, Location, file_system
from amp.data.remote.retries import FIRST_TRIES, TRIES, ShortBody, retrying
from amp.errors import AmpError

BLOCK = 8 << 20
"""Bytes per request. A request that fails repeats at most one block."""
AT_ONCE = 16
CHANGED = "the object was changed or its copy is incomplete; copy the shards there again, with their manifest"
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Found:
    """What a server says about an object: its size and a tag of its content; None if it doesn't say."""

    bytes: int | None
    tag: str | None


def in_parallel(function: Callable[[Item], Result], items: Iterable[Item], at_once: int = AT_ONCE) -> list[Result]:
    """Calls a function for all items in threads. Returns the results in order, or raises the first error."""
    items = list(items)
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(at_once, len(items))) as pool:
        return list(pool.map(function, items))


def read_whole(location: Location) -> bytes:
    """Reads a small object of unknown size, such as a manifest; raises like `retrying`."""
    return retrying(location, lambda: bytes(file_system(location).cat_file(location.full)), FIRST_TRIES)


def look_up(location: Location, tries: int = FIRST_TRIES) -> Found:
    """Size and tag of an object, without its content; raises like `retrying`."""

    def request() -> Found:
        system, options = file_system(location), INFO_OPTIONS.get(location.scheme, {})
        if not options.get("refresh"):
            system.invalidate_cache()
        try:
            info = system.info(location.full, **options)
        except FileNotFoundError as error:  # fsspec's HTTP file system reports every failed request as a missing file
            if isinstance(error.__cause__, Exception):
                raise error.__cause__ from None
            raise
        tag = next((info[name] for name in ("ETag", "etag", "blob_id") if info.get(name)), None)  # S3 and HTTP, gs, hf
        return Found(info.get("size"), tag)

    return retrying(location, request, tries)


def read_range(location: Location, start: int, stop: int) -> bytes:
    """Reads the bytes `start` to `stop` of an object.

    Raises:
        AmpError: See `retrying`; or the server sends more than was requested.
    """
    if start == stop:
        return b""

    def request() -> bytes:
        options = READ_OPTIONS.get(location.scheme, {})
        content = bytes(file_system(location).cat_file(location.full, start=start, end=stop, **options))
        if len(content) > stop - start:
            raise AmpError(
                f"{location}: the server sent {len(content)} bytes; expected {stop - start} (bytes {start} to {stop}); "
                "use a server that supports range requests, such as nginx, Apache or S3"
            )
        if len(content) < stop - start:
            raise ShortBody(f"{len(content)} of {stop - start} bytes")
        return content

    return retrying(location, request, TRIES)


def blocks(location: Location, size: int) -> Iterator[bytes]:
    """The content of an object of known size. After an error, reading continues at the block that failed."""
    for start in range(0, size, BLOCK):
        yield read_range(location, start, min(size, start + BLOCK))


def read_verified(location: Location, size: int, sha256: str) -> bytes:
    """Reads a small object and compares it with the manifest.

    Raises:
        AmpError: See `retrying`; or the content differs.
    """
    content = b"".join(blocks(location, size))
    _compare(location, hashlib.sha256(content).hexdigest(), sha256)
    return content


def download(location: Location, size: int, sha256: str, file: BinaryIO) -> None:
    """Writes an object to a file and compares it with the manifest.

    Raises:
        AmpError: See `retrying`; or the content differs.
        OSError: The disk is full.
    """
    digest = hashlib.sha256()
    for block in blocks(location, size):
        digest.update(block)
        file.write(block)
    if digest.hexdigest() != sha256:
        check_size(location, size)
    _compare(location, digest.hexdigest(), sha256)


def check_size(location: Location, size: int) -> Found:
    """Compares the size of an object with the manifest.

    Raises:
        AmpError: See `retrying`; or the size differs.
    """
    found = look_up(location)
    if found.bytes is not None and found.bytes != size:
        raise AmpError(f"{location}: {found.bytes} bytes; expected {size} (from the manifest); {CHANGED}")
    return found


def sha256_at(location: Location, size: int) -> str:
    """SHA-256 of an object, hexadecimal, which reads all of it."""
    check_size(location, size)
    digest = hashlib.sha256()
    for block in blocks(location, size):
        digest.update(block)
    return digest.hexdigest()


def _compare(location: Location, found: str, expected: str) -> None:
    if found != expected:
        raise AmpError(f"{location}: sha256 is {found}; expected {expected} (from the manifest); {CHANGED}")
