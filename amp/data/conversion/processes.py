"""Worker processes that end with their parent, and share a counter with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from amp.errors import AmpError
from amp.terminal import PlainConsole


@contextmanager
def worker_pool(workers: int, console: PlainConsole, doing: str) -> Iterator[tuple[ProcessPoolExecutor, Callable]]:
    """Yields a pool, and a function that returns how often its workers have called `count_one`.

    Args:
        workers: Number of processes.
        console: Console for a message after Ctrl-C.
        doing: What the pool finishes after Ctrl-C, for that message.

    Raises:
        AmpError: A process was killed.
    """
    # A forked process would inherit the folder's lock, and could inherit a lock of the progress bar's thread that is
    # never released.
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(workers, context, _start_worker, (counter,)) as pool:
        try:
            yield pool, lambda: counter.value
        except KeyboardInterrupt:
            console.say(f"stopping after {doing}")
            raise
        except BrokenProcessPool:
            raise AmpError(
                "a worker process was killed, most likely because memory ran out; run the same command with fewer "
                "--workers; finished shards are kept"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_counter: Any = None  # shared by the workers


def count_one() -> None:
    """Adds one to the counter; called in a worker process."""
    with _counter.get_lock():
        _counter.value += 1


def _start_worker(counter: Any) -> None:
    global _counter
    _counter = counter
    # Ctrl-C reaches the whole process group, but the parent waits for the shards that are being written.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Nothing else ends this process if the parent is killed.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a worker process"
    parent.join()
    os._exit(1)
