"""Output files that appear whole or not at all, never through a link that somebody else has planted, and folders that
one process at a time writes."""

import errno
import fcntl
import hashlib
import json
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from amp.errors import AmpError

LOCK = ".writer.lock"
# A node that died keeps its locks on NFS for 90 seconds; the job that Slurm starts again after it waits that long.
REQUEUED_SECONDS = 120.0
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # file systems without locks
_held: set[int] = set()  # descriptors of the locks of this process


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
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o666)


@contextmanager
def locked_folder(folder: str | os.PathLike, busy: str, shared: bool = False) -> Iterator[None]:
    """Keeps other processes out of a folder while the block runs. The lock ends with the process, however that ends.

    It is advisory, on the file ``.writer.lock`` of the folder. File systems without locks take none.

    Args:
        folder: An existing folder.
        busy: What the error says after the folder's name where another process holds the lock: what that one does, and
            the next step.
        shared: Only keep out those that want the folder for themselves.

    Raises:
        AmpError: Another process holds the lock.
        OSError: The folder can't be written.
    """
    path = Path(folder) / LOCK
    descriptor = _lock(path, busy, shared)
    try:
        if not shared:
            with suppress(OSError):  # a full disk; the lock itself takes no room
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        if not shared:  # nobody else holds it
            path.unlink(missing_ok=True)
        _held.discard(descriptor)
        os.close(descriptor)


def _lock(path: Path, busy: str, shared: bool) -> int:
    """Descriptor of the locked file."""
    deadline = time.monotonic() + (REQUEUED_SECONDS if os.environ.get("SLURM_RESTART_COUNT") else 0.0)
    while True:
        descriptor = open_log(path, os.O_APPEND)  # open for reading and writing, which NFS wants
        _held.add(descriptor)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            taken = True
        except OSError as error:
            taken = error.errno in _UNSUPPORTED
        if taken and _is_at(path, descriptor):
            return descriptor
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        _held.discard(descriptor)
        os.close(descriptor)
        if not taken and time.monotonic() > deadline:
            raise AmpError(f"{path.parent}: {busy}{f' (held by {holder})' if holder else ''}")
        if not taken:
            time.sleep(0.5)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file still has its name: a holder that has ended meanwhile removed it, and the lock with it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _close_inherited() -> None:
    """In a forked child, such as a decoding worker: it must not keep the lock when the process that took it is dead."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_inherited)


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
