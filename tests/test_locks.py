"""Folder locks: one process at a time, and no lock outlives its process."""

import errno
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from amp import locks
from amp.errors import AmpError
from amp.locks import locked_folder, try_lock

# Takes the lock and forks a child that outlives it, as decoding workers of a training run may.
HOLDER = """
import os, sys, time
from amp.locks import locked_folder
with locked_folder(sys.argv[1], "busy"):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        child = int(holder.stdout.readline())
        try:
            with (
                pytest.raises(AmpError, match=rf"{tmp_path}: a run is here; wait \(held by process {holder.pid} on "),
                locked_folder(tmp_path, "a run is here; wait"),
            ):
                raise AssertionError("two processes hold the lock")
            holder.kill()
            holder.wait()
            os.kill(child, 0)  # the child is alive and has inherited the descriptor
            with locked_folder(tmp_path, "busy"):
                pass
            assert not list(tmp_path.iterdir())
        finally:
            holder.kill()
            os.kill(child, signal.SIGKILL)


def test_shared_holders_keep_out_those_that_want_the_folder_for_themselves(tmp_path):
    def holds(shared: bool):
        return locked_folder(tmp_path, "busy", shared)

    with holds(shared=True), holds(shared=True), pytest.raises(AmpError, match=r"busy$"), holds(shared=False):
        pass
    with holds(shared=False), pytest.raises(AmpError, match="busy"), holds(shared=True):
        pass


def test_a_job_that_slurm_starts_again_waits_for_its_predecessor(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    first = locked_folder(tmp_path, "busy")
    first.__enter__()
    begin = time.monotonic()
    monkeypatch.setattr(time, "sleep", lambda seconds: first.__exit__(None, None, None))
    with locked_folder(tmp_path, "busy"):
        assert time.monotonic() - begin < 5
        assert (tmp_path / locks.LOCK).is_file()  # its own file, not the one that its predecessor has removed
    monkeypatch.setattr(locks, "REQUEUED_SECONDS", -1.0)
    with locked_folder(tmp_path, "busy"), pytest.raises(AmpError, match="busy"), locked_folder(tmp_path, "busy"):
        pass


def test_a_file_system_without_locks_takes_none(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with locked_folder(tmp_path, "busy"), locked_folder(tmp_path, "busy"):
        pass


def test_windows_locks_a_byte_behind_the_content(tmp_path, monkeypatch):
    """Uses a stand-in for msvcrt; not run on Windows."""
    taken = {}

    def locking(descriptor, mode, count):
        place = os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR)
        if place in taken:
            raise PermissionError(errno.EACCES, "Permission denied")
        taken[place] = descriptor

    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(locks, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2), raising=False)
    held = rf"busy \(held by process {os.getpid()} on "
    with locked_folder(tmp_path, "busy"), pytest.raises(AmpError, match=held), locked_folder(tmp_path, "busy"):
        pass
    assert {at for _, at in taken} == {locks._LOCKED_BYTE}
    with open(tmp_path / "shared", "wb") as file:
        assert try_lock(file.fileno(), shared=True) and try_lock(file.fileno(), shared=True)
