"""Output files that appear complete or not at all. Links that somebody else has planted are never followed."""

import errno
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from amp.errors import AmpError

# Windows lacks these two.
_NO_LINK, _CLOSE_ON_EXEC = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_CLOEXEC", 0)
_BYTES = getattr(os, "O_BINARY", 0)  # Windows only: without it files are opened in text mode


@contextmanager
def whole_file(path: str | os.PathLike, sync: bool = False) -> Iterator[BinaryIO]:
    """Yields a new file that is renamed to `path` when the block ends, or removed if it fails.

    A link at `path` is replaced; its target is unchanged. The temporary name can't be guessed and must not exist, so no
    planted link is followed. The umask decides who may read the file.

    Args:
        path: Path of the file. Its folder must exist.
        sync: Force the content to disk before renaming, so that a power cut never leaves the name without its content.

    Raises:
        OSError: The folder can't be written, the disk is full, or `path` is a device.
    """
    path = Path(path)
    refuse_device(path)
    temporary = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb", opener=_no_link) as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # the error of a full disk names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def refuse_device(path: str | os.PathLike) -> None:
    """Refuses the path of a device, a pipe or a socket: replacing /dev/null by a file breaks the whole machine.

    Raises:
        OSError: The path is one of these, is a link to one, or lies in /dev, where /dev/stdout can be anything.
    """
    other = os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
    if other or os.path.dirname(os.path.abspath(path)) == "/dev":
        raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))


def write_atomically(path: str | os.PathLike, content: bytes | memoryview) -> Path:
    """Writes a file under a temporary name in the same folder, then renames it, so that no reader sees a partial file.

    Raises:
        AmpError: The folder can't be created or written to.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(content)
    except OSError as error:
        raise AmpError(
            f"{path}: can't be written ({error.strerror}); give a path in a folder that you may write to"
        ) from error
    return path


def check_writable(*paths: str | os.PathLike) -> None:
    """Checks, before long work, that `write_atomically` can write these files. Creates their folders.

    Raises:
        AmpError: A file can't be written. The message names the first one.
    """
    for path in map(Path, paths):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            refuse_device(path)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise AmpError(
                f"{path}: can't be written ({error.strerror}); give a path in a folder that you may write to"
            ) from error


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        OSError: The file can't be read, or is a pipe, whose content can be read only once.
    """
    if Path(path).is_fifo():
        raise OSError(errno.ESPIPE, "a pipe, which can be read only once", str(path))
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes JSON as a `whole_file` and forces it to disk.

    Raises:
        OSError: See `whole_file`.
    """
    text = json.dumps(content, indent=1, ensure_ascii=False)
    with whole_file(path, sync=True) as file:
        # A command line may contain bytes that are not UTF-8, which are written as escapes.
        file.write(f"{text}\n".encode("utf-8", "backslashreplace"))


def open_log(path: str | os.PathLike, flags: int = os.O_TRUNC) -> int:
    """Opens a file that is written over time, and creates it if it is missing. Returns its descriptor.

    `flags` is `os.O_TRUNC` to start anew, or `os.O_APPEND`.

    Raises:
        OSError: The file can't be written, or is a link, whose target must not be changed.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | _CLOSE_ON_EXEC | _NO_LINK | _BYTES | flags, 0o666)


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | _NO_LINK, 0o666)
