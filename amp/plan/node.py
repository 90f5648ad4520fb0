"""Checks whether a node has enough open files, cores and memory for its processes."""

from collections.abc import Iterator

from amp.cores import usable_cores
from amp.data.order import WINDOW
from amp.data.recent import SHARDS
from amp.errors import require
from amp.plan.data import Dataset
from amp.plan.findings import Finding, counted, error, in_bytes, note, ok, warning
from amp.train.config import TrainConfig

FILES_PER_SHARD = 5  # the tar file, and keys and features of its captions and of its knowledge
TENSORS_PER_BATCH = 9  # each uses a file descriptor while a batch is queued
PREFETCHED = 4  # batches per worker
OTHER_FILES = 100  # libraries, logs, sockets, memory-mapped features
CAPTION_BYTES = 1_600  # measured on Flickr8k, docs/data.md


def check_workers(data: Dataset, config: TrainConfig, world: int) -> Iterator[Finding]:
    """Reports how workers share the shards, and checks the number of open files."""
    workers, shards = config.data.workers, data.train.shards
    readers = f"{counted(world, 'process')} x {counted(workers, 'worker')}"
    mixed = min(WINDOW, shards)
    yield ok(f"{readers} read {counted(shards, 'shard')} by index; a batch mixes samples of {counted(mixed, 'shard')}")
    records = any(shard.records is not None for split in data.splits for shard in split.shards)  # one file more
    files = (FILES_PER_SHARD + records) * sum(
        min(part.shards, SHARDS) for part in (data.train, data.val) if part is not None
    )
    files += OTHER_FILES + TENSORS_PER_BATCH * PREFETCHED * workers
    limit = open_files_limit()
    if data.simulated or limit is None:
        yield note(f"a process opens up to {files} files; compare with `ulimit -n` on the nodes")
    elif files <= limit:
        yield ok(f"a process opens up to {files} files; `ulimit -n` allows {limit}")
    else:
        yield error(
            f"a process opens up to {files} files; `ulimit -n` allows {limit}; run `ulimit -n {2 * files}` first"
        )


def open_files_limit() -> int | None:
    """Returns the limit of open files per process; None if unknown."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def check_cores(data: Dataset, config: TrainConfig, gpus: int) -> Iterator[Finding]:
    """Checks that a node has one core for each process and for each decoding worker."""
    workers = config.data.workers
    wanted, here = gpus * (workers + 1), usable_cores()
    text = f"a node needs {wanted} cores: {counted(gpus, 'process')} x (1 + {counted(workers, 'worker')})"
    if data.simulated:
        yield note(text)
    elif wanted <= here:
        yield ok(f"{text}; this machine has {here}")
    else:
        fewer = max(0, here // gpus - 1)
        yield warning(f"{text}; this machine has {here}; decoding would limit training; give --data.workers {fewer}")


def check_host_memory(data: Dataset, config: TrainConfig, gpus: int, offloaded: int) -> Iterator[Finding]:
    """Checks the host memory of a node; `offloaded` is the number of bytes that DeepSpeed offloads per process."""
    in_memory = [data.val] if config.mined_group == 1 else [data.val, data.train]
    texts = CAPTION_BYTES * sum(part.captions for part in in_memory if part is not None)
    if not texts + offloaded:
        return
    wanted, here = gpus * (texts + offloaded), require("psutil", "a plan").virtual_memory().total
    parts = f"{in_bytes(texts)} of captions and knowledge"
    if offloaded:
        parts += f" and {in_bytes(offloaded)} that DeepSpeed offloads"
    text = f"a node needs about {in_bytes(wanted)}: {gpus} x {parts}, in addition to Python itself"
    if data.simulated:
        yield note(text)
    elif wanted < here:
        yield ok(f"{text}; this machine has {in_bytes(here)}")
    else:
        yield warning(f"{text}; this machine has {in_bytes(here)}; start fewer processes per node")
