"""Reads the headers of tar files that may come from anywhere."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from amp.data.images.file import MAX_FILE_BYTES
from amp.errors import AmpError, shorten
from amp.json_text import is_unicode


def tar_members(file: BinaryIO, path: Path, hint: str, folders: bool = False) -> Iterator[tarfile.TarInfo]:
    """Yields the headers of the files in an uncompressed tar file. Reads no content.

    Args:
        file: The open tar file, at its start.
        path: The tar file, for messages.
        hint: Next step, for messages.
        folders: Whether to pass over folders instead of refusing them.

    Raises:
        AmpError: The file is no tar file, is compressed, damaged or truncated, or contains a link, a device, an
            absolute or parent path, a name that isn't UTF-8, or a member that is too large.
    """
    count = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not (folders and member.isdir()):
                    _check(member, path, hint)
                    yield member
                count += 1
            end = tar.offset  # position of the first block that isn't a header
    except (AmpError, OSError):
        raise
    except Exception as error:  # tarfile raises almost any exception on damaged headers
        raise AmpError(
            f"{path}: not a readable tar file ({error or type(error).__name__}); expected an uncompressed tar shard; "
            f"{hint}"
        ) from None
    # tarfile silently ends at a damaged header or a missing end marker. A complete archive has at least two zero blocks
    # after its last member.
    if os.pread(file.fileno(), 2 * tarfile.BLOCKSIZE, end) != bytes(2 * tarfile.BLOCKSIZE):
        raise AmpError(
            f"{path}: damaged or truncated after {count} members (no end-of-archive marker); copy it again, or {hint}"
        )


def _check(member: tarfile.TarInfo, path: Path, hint: str) -> None:
    where = f"{path}: member {shorten(member.name)}"
    if not member.isreg() or member.issparse():
        raise AmpError(f"{where} is a link, a folder or a device; expected plain files only; {hint}")
    if not 0 <= member.size <= MAX_FILE_BYTES:
        raise AmpError(f"{where} has {shorten(member.size)} bytes; expected at most {MAX_FILE_BYTES}; {hint}")
    if not is_unicode(member.name):
        raise AmpError(f"{where} has a name that is not UTF-8; expected a UTF-8 name; {hint}")
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise AmpError(f"{where} has an absolute or parent path; expected a name inside the shard; {hint}")
