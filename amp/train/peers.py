"""Reports which process of a run was lost and why, instead of waiting or printing a traceback of sockets.

A process that fails leaves its reason in the store through which the group was formed. The others fail in their next
collective: at once if the connection breaks, otherwise after the run's time limit. They then read that reason, or find
out which ranks no longer answer.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from amp.distributed import rank, world_size
from amp.errors import AmpError

PATIENCE = 5.0  # seconds for the others to report that they are alive, or why not


class PeerLost(AmpError):
    """Another process of the run has died or hangs."""


@contextmanager
def watching_peers() -> Iterator[None]:
    """Tells the other ranks why this one fails inside the block, and turns failed collectives into `PeerLost`."""
    try:
        yield
    except Exception as error:
        if world_size() == 1:
            raise
        if not is_exchange_error(error):
            leave_reason(error)
            raise
        raise PeerLost(
            f"{diagnosis()} ({first_line(error)}). The same command resumes from the last checkpoint"
        ) from error


def is_exchange_error(error: Exception) -> bool:
    """Whether an exception comes from a collective; gloo's are plain RuntimeErrors."""
    words = ("gloo", "nccl", "connection", "socket")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def leave_reason(error: Exception) -> None:
    """Stores this rank's failure for the other ranks."""
    with suppress(RuntimeError):  # the store may have died with its host; the error is raised anyway
        store().set(failure_key(rank()), f"{type(error).__name__}: {first_line(error)}")


def diagnosis() -> str:
    """Describes which ranks are lost and why, according to the store."""
    ranks = range(world_size())
    try:
        shared = store()
        shared.set(f"amp/alive/{rank()}", "")
        deadline = time.monotonic() + PATIENCE
        while True:
            failed = [r for r in ranks if shared.check([failure_key(r)])]
            if failed:
                return "; ".join(f"rank {r} stopped: {shared.get(failure_key(r)).decode()}" for r in failed)
            silent = [str(r) for r in ranks if not shared.check([f"amp/alive/{r}"])]
            if not silent or time.monotonic() > deadline:
                break
            time.sleep(0.1)
    except RuntimeError:
        return "the process that hosts the ranks' store is gone: rank 0 or its launcher"
    if not silent:
        return "a collective between the ranks failed although all of them answer"
    lost = f"rank {', '.join(silent)} of {len(ranks)}"
    return f"{lost} no longer answers: killed, out of memory, hung, or its machine is lost"


def store() -> dist.Store:
    """The store of the process group; torch has no public name for it."""
    return dist.distributed_c10d._get_default_store()


def failure_key(of: int) -> str:
    return f"amp/failed/{of}"


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:500]
