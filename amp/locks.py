"""Locks of folders and files, released when the process that holds them ends for any reason."""

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from amp.errors import AmpError
from amp.files import open_log

fcntl: Any
try:
    fcntl = import_module("fcntl")
except ImportError:  # Windows
    fcntl, msvcrt = None, import_module("msvcrt")

LOCK = ".writer.lock"
# A dead node keeps its locks on NFS for 90 seconds. A job that Slurm requeues afterwards waits longer than that.
REQUEUED_SECONDS = 120.0
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # file systems without locks
_LOCKED_BYTE = 2**30  # on Windows nobody else can read locked bytes, so this one lies beyond the content
_held: set[int] = set()  # descriptors of this process's locks


def try_lock(descriptor: int, shared: bool = False) -> bool:
    """Locks an open file until it is closed, unless another process holds it. The lock is advisory.

    The package filelock has no shared locks, so this is our own code. On file systems without locks, and for shared
    locks on Windows, nothing is locked.

    Returns:
        False if another process holds the lock.
    """
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        elif not shared:
            os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        return error.errno in _UNSUPPORTED
    return True


@contextmanager
def file_lock(path: str | os.PathLike, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of a file, which is created and stays, while the block runs. Yields whether the lock is held.

    A process that is forked while the block runs doesn't keep the lock.

    Args:
        path: File in an existing folder.
        wait: Wait for another process or thread that holds the lock.

    Raises:
        OSError: The file can't be created.
    """
    descriptor = open_log(path, os.O_APPEND)
    _held.add(descriptor)
    try:
        while not (held := try_lock(descriptor)) and wait:
            time.sleep(0.02)
        yield held
    finally:
        _held.discard(descriptor)
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child that is being forked may still have the descriptor
        os.close(descriptor)


@contextmanager
def locked_folder(folder: str | os.PathLike, busy: str, shared: bool = False) -> Iterator[None]:
    """Keeps other processes out of a folder while the block runs.

    The lock is on the file `.writer.lock` in the folder; see `try_lock`.

    Args:
        folder: An existing folder.
        busy: Rest of the error message, after the folder's name, if another process holds the lock: what that process
            does, and the next step.
        shared: Only keep out processes that want the folder exclusively.

    Raises:
        AmpError: Another process holds the lock.
        OSError: The folder can't be written.
    """
    path = Path(folder) / LOCK
    descriptor = _lock(path, busy, shared)
    try:
        if not shared:
            with suppress(OSError):  # a full disk; the lock itself needs no space
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        if not shared:  # no other process holds the lock
            with suppress(PermissionError):  # Windows doesn't remove open files
                path.unlink(missing_ok=True)
        _held.discard(descriptor)
        os.close(descriptor)


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Yields whether this process has the lock file `path`, without waiting for it. The file is removed afterwards.

    On file systems without locks every process has it; see `try_lock`.

    Raises:
        OSError: The folder can't be written.
    """
    descriptor = open_log(path, os.O_APPEND)
    _held.add(descriptor)
    mine = try_lock(descriptor) and _is_at(path, descriptor)
    try:
        yield mine
    finally:
        if mine:
            with suppress(PermissionError):  # Windows doesn't remove open files
                path.unlink(missing_ok=True)
        _held.discard(descriptor)
        os.close(descriptor)


def _lock(path: Path, busy: str, shared: bool) -> int:
    """Opens and locks the file. Returns its descriptor."""
    deadline = time.monotonic() + (REQUEUED_SECONDS if os.environ.get("SLURM_RESTART_COUNT") else 0.0)
    while True:
        descriptor = open_log(path, os.O_APPEND)  # NFS requires the file to be open for reading and writing
        _held.add(descriptor)
        taken = try_lock(descriptor, shared)
        if taken and _is_at(path, descriptor):
            return descriptor
        os.lseek(descriptor, 0, os.SEEK_SET)
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        _held.discard(descriptor)
        os.close(descriptor)
        if not taken and time.monotonic() > deadline:
            raise AmpError(f"{path.parent}: {busy}{f' (held by {holder})' if holder else ''}")
        if not taken:
            time.sleep(0.5)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file still has its name. A holder that has just ended removed it, and the lock with it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _close_inherited() -> None:
    """Closes the locks in a forked child, such as a decoding worker, which must not keep them when its parent dies."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)
