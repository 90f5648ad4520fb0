"""Remote shards: the same samples as local ones, retries, verification, the cache, and no secrets in outputs."""

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from support.range_server import RangeServer, cut, dropped, short, silent, status
from support.training_run import small_run

from amp.data.order import BatchOrder
from amp.data.remote import cache as cache_module
from amp.data.remote import fetch, location, reader, retries
from amp.data.remote.ahead import Ahead
from amp.data.remote.cache import ShardCache
from amp.data.remote.location import Location
from amp.data.shards import ShardManifest
from amp.data.shards.captions import load_shard_captions
from amp.data.split import ShardSplit
from amp.errors import AmpError, public_command, without_secrets
from amp.plan.data import Dataset
from amp.plan.remote import check_remote

FAULTS = ("dropped", "503", "429", "500", "cut", "short")
SECRETS = ("hunter2", "c0ffee")


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """Short waits, and a count of retries that starts at zero."""
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.002)
    monkeypatch.setattr(retries, "counts", retries.Counts())


@pytest.fixture
def server(shards):
    with RangeServer(shards).serve() as running:
        yield running


@pytest.fixture
def local(shards):
    return ShardSplit(shards, "train")


def content_of(split: ShardSplit) -> list[tuple]:
    """Photo and record of each sample, in a mixed order."""
    order = sorted(range(len(split)), key=lambda i: i * 7 % len(split))
    return [(i, split.decoded(i, bytes), split.record(i)) for i in order]


def remote_shards(split: ShardSplit):
    return [shard.remote for shard in split.shards]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("prefetch", [False, True])
def test_http_shards_have_the_samples_of_local_ones(server, local, tmp_path, cached, prefetch):
    split = ShardSplit(server.url, "train", cache=ShardCache(tmp_path / "cache", 1e9) if cached else None)
    if prefetch:
        split.prefetch([20, 3, 4, 11])
    assert content_of(split) == content_of(local)
    assert content_of(pickle.loads(pickle.dumps(split))) == content_of(local)
    assert [s.sha256 for s in split.shards] == [s.sha256 for s in local.shards] and split.sizes == local.sizes
    tars = server.got("GET /train-000001.tar")
    assert len(tars) == 1 if cached else len(tars) >= 10


def test_other_file_systems_work_by_their_name(shards, local):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for path in (path for path in shards.iterdir() if path.is_file()):
        memory.pipe_file(f"/set/{path.name}", path.read_bytes())
    try:
        assert content_of(ShardSplit("memory://set", "train")) == content_of(local)
        assert content_of(ShardSplit("memory://set/manifest.json", "train")) == content_of(local)
    finally:
        memory.rm("/set", recursive=True)


def test_captions_are_read_several_at_a_time_and_download_no_shard(server, shards, tmp_path):
    expected = load_shard_captions(ShardManifest.load(shards))
    assert load_shard_captions(ShardManifest.load(server.url)) == expected
    server.requests.clear()
    split = ShardSplit(server.url, "train", cache=ShardCache(tmp_path / "cache", 1e9))
    assert list(split.records()) == list(ShardSplit(shards, "train").records())
    assert not server.got("bytes=0-20479") and not list((tmp_path / "cache").glob("*.tar.*"))


def test_records_next_to_the_tar_file_are_read_whole_and_verified(shards, tmp_path):
    folder = indexed_shards(shards, tmp_path)
    expected = content_of(ShardSplit(folder, "train"))
    with RangeServer(folder).serve() as server:
        assert content_of(ShardSplit(server.url, "train")) == expected
        assert len(server.got("records.jsonl")) == len(ShardSplit(folder, "train").shards)
        cached = ShardSplit(server.url, "train", cache=ShardCache(tmp_path / "cache", 1e9))
        server.requests.clear()
        assert len(list(cached.records())) == 22 and not server.got("GET /train-000000.tar")
        assert content_of(cached) == expected
        path = folder / "train-000000.records.jsonl"
        path.write_bytes(path.read_bytes().replace(b"beside", b"behind"))
        with pytest.raises(AmpError, match=r"train-000000.records.jsonl: sha256 is .*copy the shards there again"):
            ShardSplit(server.url, "train").record(0)


def indexed_shards(shards: Path, tmp_path: Path) -> Path:
    """A copy of the shards whose records are in files of their own, as for tar files of other tools."""
    import numpy as np

    folder = Path(shutil.copytree(shards, tmp_path / "beside"))
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in (entry for split in manifest["splits"].values() for entry in split["shards"]):
        stem = entry["name"].removesuffix(".tar")
        tar, spans = (folder / entry["name"]).read_bytes(), np.load(folder / f"{stem}.index.npy")
        lines, at = [], 0
        for row in range(len(spans)):
            offset, size = spans[row, 1].tolist()
            lines.append(tar[offset : offset + size] + b"\n")
            spans[row, 1] = at, size
            at += size + 1
        (folder / f"{stem}.records.jsonl").write_bytes(b"".join(lines))
        np.save(folder / f"{stem}.index.npy", spans)
        for key, name in (("index", f"{stem}.index.npy"), ("records", f"{stem}.records.jsonl")):
            content = (folder / name).read_bytes()
            entry[key] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("cached", [False, True])
def test_a_shard_without_an_index_needs_the_cache(copied_shards, local, tmp_path, cached):
    path = copied_shards / "manifest.json"
    manifest = json.loads(path.read_text())
    for entry in manifest["splits"]["train"]["shards"]:
        del entry["index"]
    path.write_text(json.dumps(manifest))
    with RangeServer(copied_shards).serve() as server:
        if cached:
            split = ShardSplit(server.url, "train", cache=ShardCache(tmp_path / "cache", 1e9))
            assert content_of(split) == content_of(local)
        else:
            with pytest.raises(AmpError, match=r"train-000000.tar: has no index.*data.shard_cache"):
                ShardSplit(server.url, "train").record(0)


def test_a_remote_manifest_names_no_local_folder(shards, tmp_path):
    folder = indexed_shards(shards, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["tars"] = str(shards)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with RangeServer(folder).serve() as server, pytest.raises(AmpError, match=r"'tars' is .*next to a remote manifest"):
        ShardSplit(server.url, "train")


# -- retries --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("fault", [dropped, status(503), status(429), status(500), cut, short], ids=FAULTS)
def test_faults_are_retried_and_counted(server, local, tmp_path, cached, fault, capfd):
    server.match, server.faults = "train-", [fault, fault, None] * 6
    split = ShardSplit(server.url, "train", cache=ShardCache(tmp_path / "cache", 1e9) if cached else None)
    assert content_of(split) == content_of(local)
    counted = sum(retries.counts.by_kind.values())
    # On a busy machine, a connection may also be dropped without a fault.
    assert 8 <= server.failed <= counted <= server.failed + 2
    retries.counts.report()
    assert f"{counted} retries so far: " in capfd.readouterr().err.splitlines()[-1]
    retries.counts.report()
    assert capfd.readouterr().err == ""  # nothing new


def test_a_silent_server_is_a_timeout(server, local, monkeypatch):
    monkeypatch.setattr(location, "READ_SECONDS", 0.2)
    monkeypatch.setattr(location, "_systems", {})
    server.match, server.faults = ".tar", [silent]
    assert content_of(ShardSplit(server.url, "train")) == content_of(local)
    assert retries.counts.by_kind == {"timeout": 1}


def test_a_download_continues_at_the_block_that_failed(server, local, monkeypatch, tmp_path):
    monkeypatch.setattr(fetch, "BLOCK", 5_000)
    server.match, server.faults = ".tar", [None, None, dropped, cut]
    split = ShardSplit(server.url, "train", cache=ShardCache(tmp_path / "cache", 1e9))
    assert split.decoded(0, bytes) == local.decoded(0, bytes)
    spans = [request.rpartition("=")[2] for request in server.got("GET /train-000000.tar")]
    assert spans == ["0-4999", "5000-9999", *["10000-14999"] * 3, "15000-19999", "20000-20479"]


@pytest.mark.parametrize(("code", "said"), [(401, "access is refused"), (403, "access is refused")])
def test_refused_access_is_not_retried(server, code, said):
    server.faults = [status(code)] * 20
    with pytest.raises(AmpError, match=rf"manifest.json: {said} \(HTTP status {code}\).*set the credentials"):
        ShardSplit(server.url, "train")
    assert server.failed == 1 and not retries.counts.by_kind


def test_missing_objects_are_not_retried(copied_shards):
    with RangeServer(copied_shards).serve() as server:
        with pytest.raises(AmpError, match=r"/nowhere/manifest.json: no such object.*check the URL"):
            ShardSplit(f"{server.url}/nowhere", "train")
        (copied_shards / "train-000001.tar").unlink()
        with pytest.raises(AmpError, match=r"train-000001.tar: no such object"):
            content_of(ShardSplit(server.url, "train"))
        assert not retries.counts.by_kind


def test_a_server_that_stays_down_is_an_error_after_some_tries(server, monkeypatch):
    server.match, server.faults = ".tar", [status(503)] * 100
    split = ShardSplit(server.url, "train")
    with pytest.raises(AmpError, match=r"000.tar: can't be read after 9 attempts \(HTTP status 503\).*same command"):
        split.decoded(0, bytes)


def test_nobody_listens(monkeypatch):
    with pytest.raises(AmpError, match=r"127.0.0.1:9/x/manifest.json: can't be read after 4 attempts"):
        ShardSplit("http://127.0.0.1:9/x", "train")


def test_waits_grow_and_differ(monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.5)

    def fails():
        raise ConnectionResetError("gone")

    with pytest.raises(AmpError):
        retries.retrying(Location.parse("http://h/x"), fails)
    assert len(waits) == 8
    for number, wait in enumerate(waits):
        assert 0.5 <= wait / min(30.0, 0.5 * 2**number) <= 1.5
    assert len(set(waits)) == 8


def test_a_server_without_ranges_is_refused(shards):
    with RangeServer(shards, ranges=False).serve() as server, pytest.raises(AmpError, match="supports range requests"):
        ShardSplit(server.url, "train").decoded(0, bytes)


# -- changed objects ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
def test_an_object_of_another_size_is_named(copied_shards, tmp_path, cached):
    with RangeServer(copied_shards).serve() as server:
        with open(copied_shards / "train-000002.tar", "ab") as file:
            file.write(bytes(512))
        split = ShardSplit(server.url, "train", cache=ShardCache(tmp_path / "cache", 1e9) if cached else None)
        with pytest.raises(AmpError, match=r"train-000002.tar: \d+ bytes; expected \d+ \(from the manifest"):
            content_of(split)
        assert len(server.got("GET /train-000002.tar")) == 0 and not retries.counts.by_kind


def test_other_content_of_the_same_size_is_found_by_its_hash(copied_shards, tmp_path):
    path = copied_shards / "train-000002.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    with RangeServer(copied_shards).serve() as server:
        split = ShardSplit(server.url, "train", cache=ShardCache(tmp_path / "cache", 1e9))
        with pytest.raises(AmpError, match=r"train-000002.tar: sha256 is \w+; expected \w+ \(from the manifest\)"):
            content_of(split)
        assert len(server.got("GET /train-000002.tar")) == 1  # not downloaded for ever
        assert {path.name.partition(".tar")[0] for path in (tmp_path / "cache").glob("*.tar.*")} <= {
            "train-000000", "train-000001", "train-000003", "train-000004",
        }  # fmt: skip
        assert not list((tmp_path / "cache").glob(".part-*"))


def test_an_object_that_changes_while_it_is_read_is_found_by_its_tag(copied_shards, monkeypatch):
    monkeypatch.setattr(reader, "RECHECK_SECONDS", 0.0)
    with RangeServer(copied_shards).serve() as server:
        split = ShardSplit(server.url, "train")
        split.decoded(0, bytes)
        path = copied_shards / "train-000000.tar"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(AmpError, match=r"000.tar: its tag \(ETag\) is .*; expected .*as when it was opened"):
            split.decoded(1, bytes)


def test_a_changed_index_is_named(copied_shards):
    path = copied_shards / "train-000000.index.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with RangeServer(copied_shards).serve() as server, pytest.raises(AmpError, match=r"000.index.npy: sha256 is"):
        ShardSplit(server.url, "train").record(0)


# -- cache ----------------------------------------------------------------------------------------------------------


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_readers_share_one_download_of_each_shard(server, local, tmp_path):
    """Threads, each with a cache of its own; tests/test_remote_training.py has processes."""
    server.latency = 0.02
    splits = [ShardSplit(server.url, "train", cache=ShardCache(tmp_path / "cache", 1e9)) for _ in range(3)]
    assert fetch.in_parallel(content_of, splits) == [content_of(local)] * 3
    for name in ("train-000000.tar", "train-000004.tar"):
        assert len(server.got(f"GET /{name}")) == 1


@pytest.mark.parametrize("shards_that_fit", [0, 1, 3])
def test_a_small_cache_keeps_its_limit_and_the_rest_is_read_by_ranges(server, local, tmp_path, shards_that_fit):
    limit = shards_that_fit * 21_000
    split = ShardSplit(server.url, "train", cache=ShardCache(tmp_path / "cache", limit))
    for _ in range(2):
        assert content_of(split) == content_of(local)
        assert size_of(tmp_path / "cache") <= limit
    assert len(list((tmp_path / "cache").glob("train-*"))) == shards_that_fit


def test_the_shards_that_were_not_read_for_the_longest_time_go_first(server, local, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "IN_USE_SECONDS", 0.0)
    monkeypatch.setattr(cache_module, "TOUCH_SECONDS", 0.0)
    cache = ShardCache(tmp_path / "cache", 3 * 21_000)
    split = ShardSplit(server.url, "train", cache=cache)
    names = lambda: {path.name[:12] for path in (tmp_path / "cache").glob("train-*")}  # noqa: E731
    for index in (0, 5, 10, 1, 15):  # shards 0, 1, 2, 0 again, 3
        assert split.decoded(index, bytes) == local.decoded(index, bytes)
        time.sleep(0.02)
    assert names() == {"train-000000", "train-000002", "train-000003"}
    assert content_of(split) == content_of(local)


def test_a_shard_in_use_is_not_removed(server, local, tmp_path):
    cache = ShardCache(tmp_path / "cache", 21_000)
    split = ShardSplit(server.url, "train", cache=cache)
    split.decoded(0, bytes)
    assert split.decoded(7, bytes) == local.decoded(7, bytes)
    assert [path.name[:12] for path in (tmp_path / "cache").glob("train-*")] == ["train-000000"]


def test_an_open_file_of_a_removed_shard_stays_readable(server, tmp_path, monkeypatch):
    cache = ShardCache(tmp_path / "cache", 1e9)
    (shard, *_) = remote_shards(ShardSplit(server.url, "train"))
    assert cache.fetch(shard)
    with open(cache.find(shard), "rb") as file:
        cache._remove(tmp_path / "cache" / shard.key)
        assert hashlib.sha256(file.read()).hexdigest() == shard.tar_file.sha256
    assert cache.find(shard) is None and cache.read(shard, shard.tar, 0, 9) is None and cache.fetch(shard)


def test_what_killed_processes_leave_is_removed(server, tmp_path):
    cache = ShardCache(tmp_path / "cache", 1e9)
    first, second, third, *_ = remote_shards(ShardSplit(server.url, "train"))
    left = [tmp_path / "cache" / name for name in (f".part-{first.key}", f".part-{second.key}", ".gone-1")]
    for folder in left:
        folder.mkdir()
        (folder / "x").write_bytes(bytes(100))
    with cache._lock(second.key, True):  # this one is being downloaded
        assert cache.fetch(third)
    assert [folder.is_dir() for folder in left] == [False, True, False]
    assert cache.fetch(second) and not left[1].is_dir()


def killed_while_downloading(url: str, folder: Path) -> None:
    def kill(*_):
        os.kill(os.getpid(), 9)

    fetch.read_range = kill
    (shard, *_) = remote_shards(ShardSplit(url, "train"))
    ShardCache(folder, 1e9).fetch(shard)


def test_a_killed_download_leaves_a_temporary_folder_that_the_next_one_removes(server, local, tmp_path):
    process = multiprocessing.get_context("forkserver").Process(
        target=killed_while_downloading, args=(server.url, tmp_path / "cache")
    )
    process.start()
    process.join(60)
    assert process.exitcode == -9
    assert [path.name[:6] for path in (tmp_path / "cache").iterdir() if path.name != "locks"] == [".part-"]
    split = ShardSplit(server.url, "train", cache=ShardCache(tmp_path / "cache", 1e9))
    assert content_of(split) == content_of(local)
    assert not list((tmp_path / "cache").glob(".*"))


@pytest.mark.parametrize("when", ["reserved", "written"])
def test_a_full_disk_is_reported_and_the_run_continues_without_the_cache(
    server, local, tmp_path, monkeypatch, capfd, when
):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((fetch, "download", full) if when == "written" else (ShardCache, "_make_room", full)))
    split = ShardSplit(server.url, "train", cache=ShardCache(tmp_path / "cache", 1e9))
    assert content_of(split) == content_of(local)
    said = capfd.readouterr().err
    assert said.count("the disk is full") == 1 and str(tmp_path / "cache") in said and "make room" in said
    assert not list((tmp_path / "cache").glob(".part-*"))
    monkeypatch.undo()
    split.cache._full_until = 0.0
    split.decoded(0, bytes)
    assert len(list((tmp_path / "cache").glob("train-*"))) == 1


def test_a_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(AmpError, match=r"file/cache: can't be created .*data.shard_cache"):
        ShardCache(tmp_path / "file" / "cache", 1e9)


# -- ahead ----------------------------------------------------------------------------------------------------------


def ahead_of(split: ShardSplit, window: int = 2) -> tuple[Ahead, BatchOrder]:
    order = BatchOrder(split.sizes, 4, 0, 1, seed=3, window=window)
    return Ahead(remote_shards(split), split.cache), order


def test_the_shards_of_the_epoch_are_downloaded_in_its_order(server, tmp_path):
    split = ShardSplit(server.url, "train", cache=ShardCache(tmp_path / "cache", 1e9))
    ahead, order = ahead_of(split)
    batches = iter(ahead.following(order))
    first = next(batches)
    assert first == next(iter(order))
    deadline = time.monotonic() + 20
    while len(list((tmp_path / "cache").glob("train-*"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    ahead.close()
    assert len(list((tmp_path / "cache").glob("train-*"))) == 5  # although nothing was read
    for name in range(5):
        assert len(server.got(f"GET /train-{name:06d}.tar")) == 1
    assert [first, *batches] == list(order) and len(ahead.following(order)) == len(order)


@pytest.mark.parametrize("fit", [1, 2, 3, 5])
def test_no_more_is_wanted_than_fits_and_in_the_order_of_use(server, tmp_path, fit):
    split = ShardSplit(server.url, "train", cache=ShardCache(tmp_path / "cache", fit * 21_000))
    ahead, order = ahead_of(split)
    ahead.following(order)
    ahead._thread = threading.current_thread()  # none is started
    for epoch in range(3):
        order.set_position(epoch * order.steps)
        for batch in order:
            ahead.at(*batch[0])
            wanted = [shard.tar.name for shard in ahead.upcoming()]
            assert len(wanted) == fit == len(set(wanted))
            current = split.shards[shards_of(split, batch[:1])[0]].name
            assert current in wanted[:2] or fit == 1  # the window of two begins the list


def shards_of(split: ShardSplit, batch: list) -> list[int]:
    return [sum(start <= sample for start in split._starts) - 1 for sample, _ in batch]


def test_an_error_of_a_download_reaches_the_reader_and_not_the_thread(copied_shards, tmp_path):
    (copied_shards / "train-000001.tar").unlink()
    with RangeServer(copied_shards).serve() as server:
        split = ShardSplit(server.url, "train", cache=ShardCache(tmp_path / "cache", 1e9))
        ahead, order = ahead_of(split)
        next(iter(ahead.following(order)))
        deadline = time.monotonic() + 20
        while len(list((tmp_path / "cache").glob("train-*"))) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert ahead._thread.is_alive()
        ahead.close()
        assert len(server.got("GET /train-000001.tar")) <= 1
        with pytest.raises(AmpError, match=r"train-000001.tar: no such object"):
            split.decoded(5, bytes)


# -- plan -----------------------------------------------------------------------------------------------------------


def findings(config, folder: Path, url: str, gb: float = 0.001, cached: bool = True) -> list[str]:
    data = {"shards": url, "shard_cache": str(folder / "shard_cache") if cached else None, "shard_cache_gb": gb}
    config = replace(config, data=replace(config.data, **data))
    return [f"{f.level}: {f.text}" for f in check_remote(Dataset.read(config), config)]


def test_the_plan_checks_remote_shards(server, copied_shards, shards, clip_folder, tmp_path, monkeypatch):
    config = small_run(shards, clip_folder, tmp_path, {"batch_size": 4, "val_split": "val"})
    found = findings(config, tmp_path, server.url)
    assert found[0].startswith("ok: 7 remote shards can be read, 0.12 MB") and len(server.got("HEAD /")) >= 14
    assert re.search(r"ok: .*train-00000\d.tar: .* per second over one connection", found[1])
    assert found[2].startswith(f"ok: {tmp_path}/shard_cache: up to 0.12 MB") and "downloaded once" in found[3]
    assert not (tmp_path / "shard_cache").exists()
    assert "warning: data.shard_cache_gb is 5e-05" in findings(config, tmp_path, server.url, 5e-5)[3]
    assert "warning: data.shard_cache is null" in findings(config, tmp_path, server.url, cached=False)[2]
    assert list(check_remote(Dataset.read(config), config)) == []  # local shards
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr("amp.plan.remote.shutil.disk_usage", lambda path: usage)
    assert "error: " in findings(config, tmp_path, server.url)[2]
    with RangeServer(copied_shards).serve() as other:
        data = Dataset.read(replace(config, data=replace(config.data, shards=other.url)))
        for number in (0, 3):
            with open(copied_shards / f"train-{number:06d}.tar", "ab") as file:
                file.write(bytes(512))
        with pytest.raises(AmpError, match=r"2 errors: .*train-000000.tar: .*train-000003.tar: \d+ bytes; expected"):
            list(check_remote(data, config))


# -- credentials ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "https://me:hunter2@host/shards",
        "https://me:hunt@er2/hunter2@host/shards?sig=c0ffee",
        "https://host/shards?X-Amz-Credential=hunter2&X-Amz-Signature=c0ffee",
        "https://host/shards?sv=1&sig=c0ffee",
    ],
)
def test_locations_hide_their_credentials(url):
    place = Location.parse(url)
    if "er2/" not in url:  # a slash ends the host
        for text in (str(place), repr(place), f"{place / 'a.tar'}", str(place.with_name("x"))):
            assert not any(secret in text for secret in SECRETS) and "***" in text
        assert url.partition("?")[0] in place.full
    assert "c0ffee" not in str(place) and (place / "a.tar").full == url.replace("/shards", "/shards/a.tar")
    assert "c0ffee" not in without_secrets(f"error for {url}, status 403")
    assert not any("c0ffee" in part for part in public_command(["amp", "train", "--data.shards", url]))


def test_a_token_is_sent_with_every_file_and_shown_nowhere(shards, tmp_path, local, capfd):
    with RangeServer(shards).serve() as server:
        url = server.url.replace("http://", "http://me:hunter2@") + "?sig=c0ffee"
        server.match, server.faults = "train-", [dropped, status(503), cut]
        split = ShardSplit(url, "train", cache=ShardCache(tmp_path / "cache", 1e9))
        assert content_of(split) == content_of(local)
        assert all("?sig=c0ffee" in request for request in server.requests)
        assert all(headers["Authorization"].startswith("Basic ") for headers in server.headers)
        said = capfd.readouterr().err
        server.faults = [status(403)] * 50
        messages = [said, split.root, split.dataset]
        for part in (f"{url[:-11]}/nowhere?sig=c0ffee", url):
            with pytest.raises(AmpError) as error:
                ShardSplit(part, "train").decoded(0, bytes)
            messages.append(str(error.value))
        assert "retry so far" in said
        assert [message for message in messages if any(secret in message for secret in SECRETS)] == []


def test_a_user_name_in_another_url_is_refused():
    with pytest.raises(AmpError, match=r"s3://\*\*\*@bucket/x: a user name.*environment") as error:
        ShardSplit("s3://key:hunter2@bucket/x", "train")
    assert "hunter2" not in str(error.value)


def test_records_of_a_run_hold_no_credentials(shards, clip_folder, tmp_path, fresh_accelerate):
    from amp.model.adapter import read_adapter
    from amp.train.config import CheckpointSettings, StageSettings
    from amp.train.engine import train

    with RangeServer(shards).serve() as server:
        url = server.url.replace("http://", "http://me:hunter2@") + "?sig=c0ffee"
        config = small_run(
            shards,
            clip_folder,
            tmp_path,
            {"batch_size": 4, "shard_cache": str(tmp_path / "shard_cache")},
            stages=[1],
            stage1=StageSettings(epochs=1, lr=3e-3, warmup_steps=1),
            checkpoint=CheckpointSettings(every_steps=2),
            trackers=["tensorboard"],
        )
        config = replace(config, data=replace(config.data, shards=url))
        path = train(config)
    recorded = read_adapter(path)[0].training["config"]["data"]["shards"]
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["shards"]
    assert recorded == stored == url.replace("me:hunter2", "***").replace("sig=c0ffee", "***")
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        content = file.read_bytes()
        assert not any(secret.encode() in content for secret in SECRETS), file


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(location, "_systems", {})
    for name, url in (("fsspec", "https://host/x"), ("aiohttp", "https://host/x"), ("s3fs", "s3://bucket/x")):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, name, None)
            with pytest.raises(AmpError, match=rf"reading {url[:5].rstrip(':/')}.*{name}.*open-clip-amp\[remote\]"):
                ShardSplit(url, "train")
    with pytest.raises(AmpError, match=r"what://host/x/manifest.json: .*expected s3://"):
        ShardSplit("what://host/x", "train")


def test_local_shards_load_none_of_it(shards):
    program = (
        "import sys; from amp.data.split import ShardSplit; "
        f"ShardSplit({str(shards)!r}, 'train').image(0); "
        "print([n for n in sys.modules if n in ('fsspec.implementations.http', 'aiohttp', 's3fs') "
        "or n.startswith('amp.data.remote.') and n != 'amp.data.remote.location'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
