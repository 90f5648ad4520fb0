"""Checks whether a node has enough open files, cores and memory for its processes."""

from collections.abc import Iterator

from amp.cores import usable_cores
from amp.data.order import WINDOW
from amp.data.split import MAX_OPEN
from amp.errors import require
from amp.plan.data import Dataset
from amp.plan.findings import Finding, counted, error, in_bytes, note, ok, warning
from amp.train.config import TrainConfig

TENSORS_A_BATCH = 9  # each has a file descriptor while a batch is queued
PREFETCHED = 4  # batches per worker
OTHER_FILES = 100  # libraries, logs, sockets, memory-mapped features
CAPTION_BYTES = 1_600  # measured on Flickr8k, docs/data.md


def check_workers(data: Dataset, config: TrainConfig, world: int) -> Iterator[Finding]:
    """How the stream is divided among workers, and how many files that opens."""
    workers, shards = config.data.workers, data.train.shards
    readers = f"{counted(world, 'process')} x {counted(workers, 'worker')}"
    mixed = min(WINDOW, shards)
    yield ok(f"{readers} read {counted(shards, 'shard')} by index, however many there are; a batch mixes {mixed}")
    files = min(shards, MAX_OPEN) + OTHER_FILES + (min(data.val.shards, MAX_OPEN) if data.val else 0)
    files += TENSORS_A_BATCH * PREFETCHED * workers
    limit = open_files_limit()
    if data.simulated or limit is None:
        yield note(f"a process opens up to {files} files; compare `ulimit -n` of the nodes")
    elif files <= limit:
        yield ok(f"a process opens up to {files} files; `ulimit -n` allows {limit}")
    else:
        yield error(
            f"a process opens up to {files} files; `ulimit -n` allows {limit}; run `ulimit -n {2 * files}` first"
        )


def open_files_limit() -> int | None:
    """Limit of open files of a process; None if unknown."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def check_cores(data: Dataset, config: TrainConfig, gpus: int) -> Iterator[Finding]:
    """Whether there is one core for each process of a node and each of its decoding workers."""
    workers = config.data.workers
    wanted, here = gpus * (workers + 1), usable_cores()
    text = f"a node wants {wanted} cores: {counted(gpus, 'process')} x (1 + {counted(workers, 'worker')})"
    if data.simulated:
        yield note(text)
    elif wanted <= here:
        yield ok(f"{text}; {here} are here")
    else:
        fewer = max(0, here // gpus - 1)
        yield warning(f"{text}; {here} are here: on such nodes decoding slows training; give --data.workers {fewer}")


def check_host_memory(data: Dataset, gpus: int, offloaded: int) -> Iterator[Finding]:
    """Host memory of all processes of a node; `offloaded` is what DeepSpeed offloads per process."""
    texts = CAPTION_BYTES * (data.train.captions + (data.val.captions if data.val else 0))
    wanted, here = gpus * (texts + offloaded), require("psutil", "a plan").virtual_memory().total
    parts = f"{in_bytes(texts)} of captions and knowledge"
    if offloaded:
        parts += f" and {in_bytes(offloaded)} that DeepSpeed offloads"
    text = f"a node keeps about {in_bytes(wanted)}: {gpus} x {parts}, besides Python itself"
    if data.simulated:
        yield note(text)
    elif wanted < here:
        yield ok(f"{text}; this machine has {in_bytes(here)}")
    else:
        yield warning(f"{text}; this machine has {in_bytes(here)}: start fewer processes a node")
