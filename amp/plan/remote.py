"""Checks remote shards before a run: whether they can be read, how fast, and whether the cache has room."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from amp.data.order import WINDOW
from amp.errors import Problems
from amp.plan.data import Dataset
from amp.plan.disk import existing
from amp.plan.findings import Finding, counted, error, in_bytes, note, ok, warning
from amp.train.config import TrainConfig

MEASURED_BYTES = 64 << 20


def check_remote(data: Dataset, config: TrainConfig) -> Iterator[Finding]:
    """Requests the size of each remote shard, measures the bandwidth on one, and compares the cache with the shards.

    Raises:
        AmpError: A shard can't be read, or its size isn't that in the manifest.
    """
    shards = {shard.key: shard for split in data.splits for info in split.shards if (shard := info.remote)}
    if not shards:
        return
    from amp.data.remote import fetch

    problems = Problems()

    def look_up(shard) -> None:
        with problems.collect():
            fetch.check_size(shard.tar, shard.tar_file.bytes)

    fetch.in_parallel(look_up, shards.values())
    problems.found.sort()  # by name, not by the time of the answer
    problems.check()
    total = sum(shard.bytes for shard in shards.values())
    yield ok(f"{counted(len(shards), 'remote shard')} can be read, {in_bytes(total)}; sizes as in the manifests")
    largest = max(shards.values(), key=lambda shard: shard.tar_file.bytes)
    size, start = min(largest.tar_file.bytes, MEASURED_BYTES), time.perf_counter()
    for _ in fetch.blocks(largest.tar, size):
        pass
    seconds = time.perf_counter() - start
    rate = size / seconds
    yield ok(
        f"{largest.tar}: {in_bytes(rate)} per second over one connection, measured on {in_bytes(size)}; all shards "
        f"take {total / rate / 60:,.1f} minutes at this rate; several are downloaded at a time"
    )
    if config.data.shard_cache is None:
        yield warning(
            "data.shard_cache is null: each sample is read from the server, several at a time; "
            "give --data.shard_cache FOLDER on a local disk to download each shard once"
        )
        return
    yield from _check_cache(data, config, total)


def _check_cache(data: Dataset, config: TrainConfig, total: int) -> Iterator[Finding]:
    assert config.data.shard_cache is not None
    limit, folder = 1e9 * config.data.shard_cache_gb, config.data.shard_cache
    train = sorted((shard.bytes for info in data.splits[0].shards if (shard := info.remote)), reverse=True)
    windows = 2 * sum(train[:WINDOW])  # the shards that are mixed now, and the next ones
    needed = min(limit, total)
    free = shutil.disk_usage(existing(folder)).free
    held = sum(path.stat().st_size for path in Path(folder).glob("*.tar.*/*") if path.is_file())
    text = f"{folder}: up to {in_bytes(needed)} of shards; {in_bytes(free)} are free"
    if free + held < needed:
        yield error(f"{text}; make room, or lower data.shard_cache_gb")
    else:
        yield ok(text)
    if limit < min(total, windows):
        yield warning(
            f"data.shard_cache_gb is {config.data.shard_cache_gb:g}; {min(total, windows) / 1e9:.3g} hold the shards "
            "that are mixed with each other and the next ones; with less, single samples are read from the server too"
        )
    else:
        how = "each shard is downloaded once" if limit >= total else "each epoch downloads shards again"
        yield note(f"data.shard_cache_gb is {config.data.shard_cache_gb:g}: {how}")
