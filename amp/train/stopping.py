"""Signals that stop a run: a scheduler's warning before the time limit, preemption, or Ctrl-C."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from amp.distributed import rank, world_size
from amp.errors import INTERRUPTED

SIGNALS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGTERM") if hasattr(signal, name))  # Windows lacks one
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: the same command resumes the run


class Stopped(SystemExit):
    """Raised when a run was stopped and its checkpoint saved; ends the process.

    Args:
        number: The signal. The exit status is 130 after Ctrl-C, else `EXIT_STATUS`, after which a job can restart.
    """

    def __init__(self, number: int):
        super().__init__(INTERRUPTED if number == signal.SIGINT else EXIT_STATUS)


class StopRequest:
    """Records a signal of `SIGNALS` instead of dying from it. A context manager that restores the old handlers.

    Ctrl-C is recorded only inside `taking_steps`, because elsewhere there is nothing to save. Only the main thread of a
    process receives signals, so this does nothing in other threads.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread
                break
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def taking_steps(self) -> AbstractContextManager[None]:
        """Inside this block, the first Ctrl-C is recorded, so that the steps so far are saved. A second one
        interrupts."""
        return self._on_interrupt(self._note_first)

    def validating(self) -> AbstractContextManager[None]:
        """Inside this block, within `taking_steps`, Ctrl-C interrupts at once: a checkpoint has just been saved."""
        return self._on_interrupt(signal.default_int_handler)

    @contextmanager
    def _on_interrupt(self, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
        try:
            before = signal.getsignal(signal.SIGINT)
            if before is not signal.SIG_IGN:  # as for background jobs of a shell
                signal.signal(signal.SIGINT, handler)
        except ValueError:  # not the main thread
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def _note_first(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.default_int_handler)
        self.received = self.received or number
        if rank() == 0:
            os.write(2, b"\ninterrupted; a checkpoint is saved after this step; Ctrl-C again ends at once\n")

    def agreed(self, device: torch.device) -> int:
        """The signal that any rank has received, or 0. A collective: all ranks must call it."""
        if world_size() == 1:
            return self.received
        flag = torch.tensor([self.received], device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)


def prepare_worker(worker: int) -> None:
    """Prepares a decoding worker for signals.

    A signal to the whole job must not kill workers before the checkpoint is saved. SIGTERM from their own process still
    ends them. If that process is killed, they end with it instead of waiting for it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS and Windows, which have no schedulers that signal a whole job
        return
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_for_parent, args=(os.getppid(),), daemon=True).start()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _exit_for_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
