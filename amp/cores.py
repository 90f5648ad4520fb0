"""The cores that a process may use, shared out between its threads and its decoding workers."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from amp.errors import AmpError

CGROUPS = Path("/sys/fs/cgroup")
PROCESSES = Path("/proc")


@dataclass(frozen=True)
class CoreShare:
    """How the processes of a run use the cores of their machine.

    Attributes:
        processes: Processes of the run on this machine.
        threads: Threads that each of them computes with.
        workers: Decoding processes of each of them.
        cores: Cores that all of them may use together.
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
    """Shares the cores out: processes x (threads + decoding workers) is at most their number, with at least one thread.

    OMP_NUM_THREADS wins, except the 1 that `accelerate launch` and torchrun set where it is not set.

    Args:
        workers: Decoding workers wanted by each process. Without a GPU they get a quarter of the cores at most: the
            process itself computes on the others, and decodes as well where it has less than four.
        gpu: Whether the model is on a GPU.

    Raises:
        AmpError: A negative number of workers.
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
    """Worker processes by `share_cores`."""
    return share_cores(wanted, gpu).workers


def use_cores(workers: int, gpu: bool, before: int | None = None) -> CoreShare:
    """Sets torch's number of threads to that of `share_cores`.

    Args:
        workers, gpu: As for `share_cores`.
        before: Threads of an interrupted run, which are taken where there are cores for them and OMP_NUM_THREADS
            doesn't say another number: sums of another number of threads are rounded in another way.
    """
    import torch

    share = share_cores(workers, gpu)
    if before and wanted_threads() is None and share.processes * before <= share.cores:
        share = replace(share, threads=before)
    torch.set_num_threads(share.threads)
    return share


def usable_cores() -> int:
    """Cores that this process may run on, and that its container leaves it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for quota, period in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroups 2 and 1
        try:
            words = (CGROUPS / quota).read_text().split()
            words += (CGROUPS / period).read_text().split() if period else []
            if int(words[0]) > 0:
                cores = min(cores, max(1, int(words[0]) // int(words[1])))
        except (OSError, ValueError, IndexError):  # no such file; "max", which is no limit
            continue
    return cores


def processes_here() -> int:
    """Processes of this run on this machine, as the launcher says."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def wanted_threads() -> int | None:
    """The user's OMP_NUM_THREADS; None where it is not set, or where the launcher has set it."""
    value = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if not value.isdecimal() or int(value) < 1 or (value == "1" and _set_by_launcher()):
        return None
    return int(value)


def _set_by_launcher() -> bool:
    """Whether OMP_NUM_THREADS is missing in the environment that this process's launcher was started with."""
    marks = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # of accelerate launch and of torchrun
    ours = [mark for mark in marks if mark in os.environ]
    try:
        entries = (PROCESSES / str(os.getppid()) / "environ").read_bytes().split(b"\0")
    except OSError:
        return False
    theirs = {entry.partition(b"=")[0].decode(errors="replace") for entry in entries}
    return any(mark not in theirs for mark in ours) and "OMP_NUM_THREADS" not in theirs


def _counted(number: int, word: str, plural: str = "s") -> str:
    return f"{number} {word}{'' if number == 1 else plural}"
