"""Shards on Google Cloud Storage (an emulator) and on the Hugging Face hub (a stand-in), with their own clients."""

from functools import partial

import pytest
from support.http_server import QuietHandler, serving
from support.hub_server import HubServer
from support.servers import gcs, upload_to_gcs

from amp.data.remote import fetch, location, reader, retries
from amp.data.remote.cache import ShardCache
from amp.data.remote.location import Location
from amp.data.split import ShardSplit
from amp.errors import AmpError

pytestmark = pytest.mark.system

GS, HF = "gs://bucket/shards", "hf://datasets/me/drawn/shards"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Short waits, no retries counted yet, and no file system of another test."""
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.002)
    monkeypatch.setattr(retries, "counts", retries.Counts())
    monkeypatch.setattr(location, "_systems", {})


@pytest.fixture
def service(request, copied_shards, tmp_path, monkeypatch):
    """(URL of the shards, function that uploads the local copy of a file again)."""
    if request.param == "gs":
        with gcs(copied_shards, tmp_path / "server") as url:
            use_gcs(monkeypatch, url)
            yield GS, partial(upload_to_gcs, url)
    else:
        with HubServer(copied_shards).serve() as hub:
            use_hub(monkeypatch, hub.url)
            yield HF, lambda path: None  # it serves the folder itself


def use_gcs(monkeypatch, url: str) -> None:
    """As by STORAGE_EMULATOR_HOST, without credentials."""
    fsspec, gcsfs = pytest.importorskip("fsspec"), pytest.importorskip("gcsfs")
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon", "endpoint_url": url})
    gcsfs.core.GCSFileSystem.clear_instance_cache()


def use_hub(monkeypatch, url: str) -> None:
    """As by HF_ENDPOINT, which huggingface_hub reads when it is imported."""
    fsspec, hub = pytest.importorskip("fsspec"), pytest.importorskip("huggingface_hub")
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": url})
    hub.HfFileSystem.clear_instance_cache()


def content_of(split: ShardSplit) -> list[tuple]:
    order = sorted(range(len(split)), key=lambda i: i * 7 % len(split))
    return [(i, split.decoded(i, bytes), split.record(i)) for i in order]


both = pytest.mark.parametrize("service", ["gs", "hf"], indirect=True)


@both
def test_the_samples_are_those_of_local_shards(service, copied_shards, tmp_path, caplog):
    url, _ = service
    expected = content_of(ShardSplit(copied_shards, "train"))
    assert content_of(ShardSplit(url, "train")) == expected
    assert content_of(ShardSplit(url, "train", cache=ShardCache(tmp_path / "cache", 1e9))) == expected
    assert len(list((tmp_path / "cache").glob("train-*"))) == 5
    prefetched = ShardSplit(url, "train")
    prefetched.prefetch([20, 3, 4, 11])  # several threads
    assert content_of(prefetched) == expected
    assert not retries.counts.by_kind and not caplog.records


@both
def test_missing_objects(service, copied_shards):
    url, _ = service
    for missing in (f"{url}/nowhere", url.replace("bucket", "other").replace("drawn", "other")):
        with pytest.raises(AmpError, match=r"manifest.json: no such object .*check the URL"):
            ShardSplit(missing, "train")
    assert not retries.counts.by_kind


@both
def test_an_object_that_changes_while_it_is_read_is_found(service, copied_shards, monkeypatch):
    url, upload = service
    monkeypatch.setattr(reader, "RECHECK_SECONDS", 0.0)
    split = ShardSplit(url, "train")
    split.decoded(0, bytes)
    path = copied_shards / "train-000000.tar"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\x01")
    upload(path)
    with pytest.raises(AmpError, match=r"000.tar: its tag \(ETag\) is .*; expected .*as when it was opened"):
        split.decoded(1, bytes)
    path.write_bytes(content + bytes(512))
    upload(path)
    with pytest.raises(AmpError, match=rf"000.tar: {len(content) + 512} bytes; expected {len(content)} \(from the ma"):
        split.decoded(2, bytes)


def test_the_hub_sends_only_what_is_read(shards, monkeypatch):
    """Neither does the client read ahead, nor does it list the folder again for each shard."""
    with HubServer(shards).serve() as hub:
        use_hub(monkeypatch, hub.url)
        split = ShardSplit(HF, "train")
        split.record(0)
        hub.sent = 0
        photo = split.decoded(0, bytes)
        assert hub.sent == len(photo)
        content_of(split)
        assert len([request for request in hub.requests if "/tree/" in request]) == 1
        assert any("/objects/train-000000.tar bytes=" in request for request in hub.requests)  # after a redirect


def test_a_gated_repository(shards, monkeypatch):
    with HubServer(shards).serve() as hub:
        use_hub(monkeypatch, hub.url)
        hub.refused = True
        with pytest.raises(AmpError, match=r"manifest.json: access is refused \(HTTP status 403\).*credentials"):
            ShardSplit(HF, "train")
    assert not retries.counts.by_kind


def test_a_private_bucket(monkeypatch):
    class Handler(QuietHandler):
        def do_GET(self):
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()

    pytest.importorskip("gcsfs")
    with serving(Handler) as url:
        use_gcs(monkeypatch, url)
        with pytest.raises(AmpError, match=r"manifest.json: access is refused \(HTTP status 403\).*credentials"):
            ShardSplit(GS, "train")
        with pytest.raises(AmpError, match=r"x.tar: access is refused"):
            fetch.look_up(Location.parse(f"{GS}/x.tar"))
    assert not retries.counts.by_kind
