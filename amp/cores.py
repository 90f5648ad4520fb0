"""Divides the available CPU cores between compute threads and decoding workers."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from amp.errors import AmpError

CGROUPS = Path("/sys/fs/cgroup")
PROCESSES = Path("/proc")


@dataclass(frozen=True)
class CoreShare:
    """How the processes of a run on this machine use its cores.

    Attributes:
        processes: Number of processes of the run on this machine.
        threads: Compute threads per process.
        workers: Decoding workers per process.
        cores: Cores that all processes may use together.
    """

    processes: int
    threads: int
    workers: int
    cores: int

    def __str__(self) -> str:
        """Such as "2 processes x 1 thread, 1 decoding worker each, 4 cores"."""
        each = " each" if self.processes > 1 else ""
        return (
            f"{_counted(self.processes, 'process', 'es')} x {_counted(self.threads, 'thread')}, "
            f"{_counted(self.workers, 'decoding worker')}{each}, {_counted(self.cores, 'core')}"
        )


def share_cores(workers: int, gpu: bool) -> CoreShare:
    """Divides the cores between processes, compute threads and decoding workers.

    processes x (threads + decoding workers) is at most the number of cores, except that each process has at least one
    thread. OMP_NUM_THREADS takes precedence, unless it is the 1 that `accelerate launch` and torchrun set by default.

    Args:
        workers: Wanted decoding workers per process. Without a GPU, workers get at most a quarter of a process's cores,
            because the process computes on the others. With fewer than four cores, the process decodes images itself.
        gpu: Whether the model runs on a GPU.

    Raises:
        AmpError: `workers` is negative.
    """
    if workers < 0:
        raise AmpError(f"workers is {workers}, expected at least 0")
    processes, cores = processes_here(), usable_cores()
    own = max(1, cores // processes)
    threads = wanted_threads()
    for_workers = max(1, own - (threads or 1)) if gpu or threads else own // 4
    workers = min(workers, for_workers)
    return CoreShare(processes, threads or max(1, own - workers), workers, cores)


def decoding_workers(wanted: int, gpu: bool) -> int:
    """Decoding workers per process, by `share_cores`."""
    return share_cores(wanted, gpu).workers


def use_cores(workers: int, gpu: bool, before: int | None = None) -> CoreShare:
    """Sets torch's number of threads by `share_cores`.

    Args:
        workers, gpu: See `share_cores`.
        before: Threads of the interrupted run that is resumed. They are kept if there are enough cores and
            OMP_NUM_THREADS doesn't set another number, because sums over another number of threads are rounded
            differently.
    """
    import torch

    share = share_cores(workers, gpu)
    if before and wanted_threads() is None and share.processes * before <= share.cores:
        share = replace(share, threads=before)
    torch.set_num_threads(share.threads)
    return share


def usable_cores() -> int:
    """Number of cores that this process may use, by its CPU affinity and its container's limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for quota, period in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroups 2 and 1
        try:
            words = (CGROUPS / quota).read_text().split()
            words += (CGROUPS / period).read_text().split() if period else []
            if int(words[0]) > 0:
                cores = min(cores, max(1, int(words[0]) // int(words[1])))
        except (OSError, ValueError, IndexError):  # no such file, or "max", which means no limit
            continue
    return cores


def processes_here() -> int:
    """Number of processes of this run on this machine, as set by the launcher."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def wanted_threads() -> int | None:
    """The user's OMP_NUM_THREADS; None if it is not set, or was set by the launcher."""
    value = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if not value.isdecimal() or int(value) < 1 or (value == "1" and _set_by_launcher()):
        return None
    return int(value)


def _set_by_launcher() -> bool:
    """Whether the launcher, the parent process, set OMP_NUM_THREADS, because it was itself started without it."""
    marks = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # set by accelerate launch and by torchrun
    ours = [mark for mark in marks if mark in os.environ]
    try:
        entries = (PROCESSES / str(os.getppid()) / "environ").read_bytes().split(b"\0")
    except OSError:
        return False
    theirs = {entry.partition(b"=")[0].decode(errors="replace") for entry in entries}
    return any(mark not in theirs for mark in ours) and "OMP_NUM_THREADS" not in theirs


def _counted(number: int, word: str, plural: str = "s") -> str:
    return f"{number} {word}{'' if number == 1 else plural}"
