"""Output files that appear whole or not at all, and never follow a link that somebody else has planted."""

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

# Windows lacks the first two.
_NO_LINK, _CLOSE_ON_EXEC = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_CLOEXEC", 0)
_BYTES = getattr(os, "O_BINARY", 0)  # Windows only, where files are opened as text without it


@contextmanager
def whole_file(path: str | os.PathLike, sync: bool = False) -> Iterator[BinaryIO]:
    """Yields a new file that takes the name `path` when the block ends, and is removed when it fails.

    A link at `path` is replaced, what it points at stays as it was. The temporary name can't be guessed and must not
    exist, so no link at it is followed. Who may read the file is decided by the umask.

    Args:
        path: Of the file; its folder must be there.
        sync: Force the content to the disk before it gets its name: no name without its content after a power cut.

    Raises:
        OSError: The folder can't be written, the disk is full, or a device has the name.
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
        error.filename = error.filename or str(path)  # a full disk doesn't say which file it was
        raise
    finally:
        temporary.unlink(missing_ok=True)


def refuse_device(path: str | os.PathLike) -> None:
    """Refuses the name of a device, a pipe or a socket: a file in place of /dev/null breaks the whole machine.

    Raises:
        OSError: The name belongs to one or to a link to one, or lies in /dev, as /dev/stdout, which leads to anything.
    """
    other = os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
    if other or os.path.dirname(os.path.abspath(path)) == "/dev":
        raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))


def write_atomically(path: str | os.PathLike, content: bytes | memoryview) -> Path:
    """Writes a file under a temporary name beside it, then renames it, so that no reader sees half of it.

    Raises:
        AmpError: The folder can't be made or written to.
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
    """Checks before the work that `write_atomically` can write these files after it. Makes their folders.

    Raises:
        AmpError: Naming the first that can't be written.
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
    """sha256 of a file, hexadecimal.

    Raises:
        OSError: Unreadable, or a pipe: its content would be gone for whoever reads it next.
    """
    if Path(path).is_fifo():
        raise OSError(errno.ESPIPE, "a pipe, which can be read only once", str(path))
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes JSON as a `whole_file`, forced to the disk.

    Raises:
        OSError: As `whole_file`.
    """
    text = json.dumps(content, indent=1, ensure_ascii=False)
    with whole_file(path, sync=True) as file:
        # A command line may hold bytes that are no text; JSON has an escape for each.
        file.write(f"{text}\n".encode("utf-8", "backslashreplace"))


def open_log(path: str | os.PathLike, flags: int = os.O_TRUNC) -> int:
    """Descriptor of a file that is written over time, made if absent; `flags` says whether anew or at its end.

    Raises:
        OSError: It can't be written, or is a link: what that points at must not be changed.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | _CLOSE_ON_EXEC | _NO_LINK | _BYTES | flags, 0o666)


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | _NO_LINK, 0o666)
