"""Training from servers of all kinds gives the bits of local shards, with faults, kills and any cache."""

import functools
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from support.drawn_data import draw_shards
from support.hub_server import HubServer
from support.processes import run_ranks
from support.proxy import Proxy
from support.servers import S3_ENVIRONMENT, gcs, nginx, s3
from support.training_run import TrainingRun, small_run

from amp.data.remote import cache as cache_module
from amp.data.remote import fetch, retries
from amp.data.remote.cache import ShardCache
from amp.data.split import ShardSplit
from amp.locks import file_lock
from amp.train.config import CheckpointSettings, StageSettings, TrainConfig

pytestmark = pytest.mark.system

IMAGES, SHARDS = 62, 13


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """13 shards of 5 samples at most."""
    return draw_shards(tmp_path_factory.mktemp("many"), {"train": IMAGES})


@pytest.fixture(scope="module")
def http(many, tmp_path_factory):
    with nginx(many, tmp_path_factory.mktemp("nginx") / "server") as port:
        yield port


@pytest.fixture(scope="module")
def bucket(many, tmp_path_factory):
    with s3(many, tmp_path_factory.mktemp("s3") / "server") as port:
        yield port


@pytest.fixture(scope="module")
def google(many, tmp_path_factory):
    with gcs(many, tmp_path_factory.mktemp("gcs") / "server") as url:
        yield url


@pytest.fixture(scope="module")
def hub(many):
    with HubServer(many).serve() as server:
        yield server.url


def configured(many, clip_folder, folder: Path, cache: Path) -> TrainConfig:
    """Four epochs of 15 global batches of 4, with crops, captions, negatives and dropout."""
    return small_run(
        many,
        clip_folder,
        folder,
        {"batch_size": 4, "augment": "crop"},
        cache,
        stages=[1],
        stage1=StageSettings(epochs=4, lr=3e-3, warmup_steps=3),
        knowledge_dropout=0.2,
        checkpoint=CheckpointSettings(every_steps=2, keep=2),
    )


@pytest.fixture
def config(many, clip_folder, tmp_path, cache_folder) -> TrainConfig:
    """See `configured`."""
    return configured(many, clip_folder, tmp_path, cache_folder)


@pytest.fixture(scope="module")
def from_local_shards(many, clip_folder, cache_folder, tmp_path_factory):
    """A function of (world, seed) that returns the weights and the samples of an undisturbed run on local shards."""

    @functools.cache
    def trained(world: int, seed: int) -> tuple[dict, list[str]]:
        folder = tmp_path_factory.mktemp("local")
        config = replace(configured(many, clip_folder, folder, cache_folder), seed=seed)
        assert run_of(config, world, "alone", folder / "audit", str(many), prepared).wait() == [0] * world
        return adapter_bytes(config, "alone"), samples(folder / "audit")

    return trained


def prepared(
    rank: int, server: dict | None = None, in_use: float = 10.0, log_seconds: float = 10.0, block: int = 8 << 20
) -> None:
    """Runs in each process before training. `server` is the environment that names the server."""
    import fsspec

    os.environ.update(S3_ENVIRONMENT, **(server or {}))
    fsspec.config.set_conf_env(fsspec.config.conf)  # it was imported in the fork server
    retries.FIRST_WAIT, retries.LOG_SECONDS = 0.005, log_seconds
    cache_module.IN_USE_SECONDS, fetch.BLOCK = in_use, block


def source_of(name: str, request, many: Path) -> tuple[str, dict[str, str]]:
    """Source of the shards, and the environment that names the server."""
    if name == "local":
        return str(many), {}
    if name == "http":
        return f"http://127.0.0.1:{request.getfixturevalue('http')}", {}
    if name == "gs":
        server = {"STORAGE_EMULATOR_HOST": request.getfixturevalue("google"), "FSSPEC_GS_TOKEN": "anon"}
        return "gs://bucket/shards", server
    if name == "hf":
        return "hf://datasets/me/drawn/shards", {"FSSPEC_HF_ENDPOINT": request.getfixturevalue("hub")}
    return "s3://bucket/shards", s3_at(request.getfixturevalue("bucket"))


def s3_at(port: int) -> dict[str, str]:
    return {"FSSPEC_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}"}


def run_of(config: TrainConfig, world: int, name: str, audit: Path, shards: str, before, **data) -> TrainingRun:
    data = {"batch_size": 4 // world, "shards": shards, **data}
    config = replace(config, out=f"{config.out}-{name}", data=replace(config.data, **data))
    return TrainingRun(config, world, audit, before)


def adapter_bytes(config: TrainConfig, name: str) -> dict:
    """Bytes of the weights, without the record of the settings, which name the shards."""
    from safetensors.torch import load_file

    path = Path(f"{config.out}-{name}") / "stage1" / "adapter.safetensors"
    return {key: value.numpy().tobytes() for key, value in load_file(path).items()}


def samples(audit: Path) -> list[str]:
    """The distinct lines of an audit: the samples of each step and rank. A repeated step has the same line."""
    return sorted(set(audit.read_text().splitlines()))


@pytest.mark.parametrize(
    ("world", "rows"),
    [
        (1, [("local", 0, False), ("http", 0, True), ("http", 1, False), ("s3", 2, True), ("s3", 1, False)]),
        (1, [("local", 0, False), ("gs", 1, True)]),
        (1, [("local", 0, False), ("hf", 1, True)]),
        (2, [("local", 2, False), ("http", 2, True), ("s3", 0, True)]),
    ],
    ids=["one process", "gs", "hf", "two processes"],
)
def test_every_source_gives_the_same_bits(config, many, request, world, rows, tmp_path):
    """With and without a cache, with 0 to 2 workers."""
    expected = None
    config = replace(config, stage1=replace(config.stage1, epochs=2))
    for kind, workers, cached in rows:
        shards, server = source_of(kind, request, many)
        name = f"{kind}-{workers}-{cached}"
        audit = tmp_path / f"audit-{name}"
        folder = str(tmp_path / f"shards-{name}") if cached else None
        run = run_of(
            config, world, name, audit, shards, partial(prepared, server=server), workers=workers, shard_cache=folder
        )
        assert run.wait() == [0] * world, run.said(0)
        found = adapter_bytes(config, name), samples(audit)
        expected = expected or found
        assert found == expected, name
        if folder is not None:
            assert len(list(Path(folder).glob("train-*"))) == SHARDS
    assert len(expected[1]) == 2 * 15 * world


@pytest.mark.parametrize(
    ("kind", "world"),
    [
        ("http", 1),
        pytest.param("http", 2, marks=pytest.mark.slow),
        pytest.param("s3", 1, marks=pytest.mark.slow),
        ("s3", 2),
    ],
)
def test_killed_at_random_steps_with_any_cache_it_ends_as_if_never_killed(
    config, from_local_shards, many, request, kind, world, tmp_path
):
    """Three kills with HTTP and two with S3, each with one and two processes."""
    shards, server = source_of(kind, request, many)
    draw, cache, kills = random.Random(f"{kind}{world}"), tmp_path / "shard_cache", 0
    states = ["full", "empty", "half"] if kind == "http" else ["half", "empty"]
    wanted = len(states)
    while True:
        run = run_of(
            config, world, "killed", tmp_path / "audit", shards, partial(prepared, server=server),
            workers=draw.choice([0, 1, 2]), shard_cache=str(cache),
        )  # fmt: skip
        if kills == wanted:
            assert run.wait() == [0] * world, run.said(0)
            break
        assert run.wait_for_steps(draw.randint(5, 12))
        time.sleep(draw.random() * 0.06)
        run.signal(signal.SIGKILL)
        run.wait()
        kills += 1
        state, folders = states.pop(), sorted(cache.glob("train-*"))
        for folder in {"full": [], "empty": folders, "half": folders[::2]}[state]:
            shutil.rmtree(folder)
    assert kills == wanted
    assert (adapter_bytes(config, "killed"), samples(tmp_path / "audit")) == from_local_shards(world, 0)
    assert not list(cache.glob(".part-*"))


def retries_in(log: str) -> int:
    """The last count in a log."""
    return int(re.findall(r"^(\d+) retr(?:y|ies) so far", log, re.MULTILINE)[-1])


@pytest.mark.parametrize(("kind", "cached"), [("http", False), ("http", True), ("s3", False)])
def test_no_sample_is_lost_or_repeated_by_faults_and_each_retry_is_counted(
    config, from_local_shards, request, kind, cached, tmp_path
):
    port = request.getfixturevalue("http" if kind == "http" else "bucket")
    kinds = ("reset", "503", "early end", "drop") if kind == "http" else ("reset", "503", "early end")
    with Proxy(port, rate=0.5 if cached else 0.35, kinds=kinds, path="train-").serve() as proxy:
        shards = proxy.url if kind == "http" else "s3://bucket/shards"
        server = s3_at(int(proxy.url.rpartition(":")[2]))
        proxied = partial(prepared, server=server, log_seconds=0.0, block=4_000)
        run = run_of(
            config, 1, "faults", tmp_path / "audit", shards, proxied,
            workers=1, shard_cache=str(tmp_path / "shard_cache") if cached else None,
        )  # fmt: skip
        assert run.wait() == [0], run.said(0)
    injected = sum(proxy.injected.values())
    print(f"{kind}, cached {cached}: {injected} faults in {proxy.requests} requests: {dict(proxy.injected)}")
    assert injected >= (30 if cached else 80) and len(proxy.injected) == len(kinds)
    assert retries_in(run.said(0)) == injected
    assert (adapter_bytes(config, "faults"), samples(tmp_path / "audit")) == from_local_shards(1, 0)


def test_two_jobs_share_a_small_cache(config, from_local_shards, http, tmp_path):
    """Two runs with other seeds, a cache that holds a third of the shards, and shards that are removed at once."""
    cache, limit = tmp_path / "shard_cache", 5 * 24_000
    runs = [
        run_of(
            replace(config, seed=seed), 1, f"job-{seed}", tmp_path / f"job-{seed}", f"http://127.0.0.1:{http}",
            partial(prepared, in_use=0.0), workers=1, shard_cache=str(cache), shard_cache_gb=limit / 1e9,
        )
        for seed in (0, 1)
    ]  # fmt: skip
    largest = 0
    while any(process.is_alive() for run in runs for process in run.processes):
        largest = max(largest, size_of(cache))
        time.sleep(0.01)
    assert [run.wait() for run in runs] == [[0], [0]], runs[0].said(0)
    for seed in (0, 1):
        assert (adapter_bytes(config, f"job-{seed}"), samples(tmp_path / f"job-{seed}")) == from_local_shards(1, seed)
    assert 0 < largest <= limit


def size_of(cache: Path) -> int:
    """Bytes of the files of shards, while no process makes room."""
    if not (cache / "locks").is_dir():
        return 0
    sizes = {}
    with file_lock(cache / "locks" / ".room"):
        for shard in os.scandir(cache):
            try:
                size = sum(file.stat().st_size for file in os.scandir(shard))
            except FileNotFoundError:  # completed at this moment
                continue
            sizes[shard.name.removeprefix(".part-")] = size
    return sum(sizes.values())


def read_again_and_again(url: str, folder: Path, limit: float, rounds: int) -> list[bytes]:
    cache_module.IN_USE_SECONDS = 0.0
    split = ShardSplit(url, "train", cache=ShardCache(folder, limit))
    for _ in range(rounds):
        found = [split.decoded(index, bytes) for index in range(len(split))]
    return found


def test_shards_are_removed_while_other_processes_read_them(many, http, tmp_path):
    local = ShardSplit(many, "train")
    expected = [local.decoded(index, bytes) for index in range(len(local))]
    arguments = f"http://127.0.0.1:{http}", tmp_path / "shard_cache", 60_000, 3
    found = run_ranks(read_again_and_again, tmp_path / "ranks", *arguments, world=3)
    assert found == [expected] * 3
    assert size_of(tmp_path / "shard_cache") <= 60_000


def test_a_full_file_system(many, http, tmp_path, capfd):
    """ENOSPC itself: a cache on a file system that is smaller than its limit."""
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(small)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs to be root and allowed to mount a file system")
    try:
        local = ShardSplit(many, "train")
        split = ShardSplit(f"http://127.0.0.1:{http}", "train", cache=ShardCache(small, 1e9))
        for index in range(len(local)):
            assert split.decoded(index, bytes) == local.decoded(index, bytes)
        said = capfd.readouterr().err
        assert "the disk is full" in said and "without the cache" in said
        assert 1 <= len(list(small.glob("train-*"))) < SHARDS and not list(small.glob(".part-*"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_the_thread_ahead_ends_with_the_run(config, http, tmp_path):
    from support.processes import forget_accelerate

    from amp.train.engine import train

    forget_accelerate()
    data = replace(config.data, shards=f"http://127.0.0.1:{http}", shard_cache=str(tmp_path / "shard_cache"))
    train(replace(config, data=data, stage1=replace(config.stage1, epochs=1)))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shards ahead")]
    forget_accelerate()
