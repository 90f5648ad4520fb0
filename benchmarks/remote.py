"""Images per second of the training stream from a web server with latency, compared with local shards.

Each way opens the shards, starts its workers and reads one epoch. The server runs in its own process on this machine
and waits before each answer, so the figures show the effect of latency, not of bandwidth.
"""

import multiprocessing
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import open_clip
from open_clip.transform import image_transform

from amp.data.conversion.make import make_shards
from amp.data.order import BatchOrder
from amp.data.remote.ahead import Ahead
from amp.data.remote.cache import ShardCache
from amp.data.split import ShardSplit
from amp.data.split_captions import SplitCaptions
from amp.data.stream import KnowledgeCollator, TrainingSamples, training_loader
from amp.data.text_features import TextFeatureStore
from amp.knowledge.tensors import TripletTokenizer
from amp.model.config import PromptConfig
from benchmarks.settings import Settings
from benchmarks.tables import machine, spread, table
from benchmarks.timing import in_turns, medians, ratio, rounded

SHARDS, LATENCY = 8, 0.05  # seconds before each answer
LOCAL, WARM, FIRST, RANGES = "local", "cached", "first pass with the cache", "without the cache"


def run(settings: Settings, folder: Path, given: dict[str, str]) -> dict:
    """Measures all ways on the photos of `given`, which are arguments of `make_shards`."""
    shards, cache = folder / "shards", folder / "shard_cache"
    make_shards(**given, out=str(shards), samples_per_shard=-(-settings.photos_count(given) // SHARDS))
    split = ShardSplit(shards, "train")
    k = PromptConfig().max_triplets
    store = TextFeatureStore(folder / "cache", "0" * 16, 512)
    texts = store.missing(SplitCaptions.read(split, ("action", "attribute")).all_texts(k))
    store.add(texts, np.random.default_rng(0).standard_normal((len(texts), 512), dtype=np.float32))
    collate = KnowledgeCollator(TripletTokenizer(open_clip.get_tokenizer("ViT-B-32"), k), store)
    found = {
        "images": len(split),
        "MB": rounded(sum(shard.bytes for shard in split.shards) / 1e6),
        "latency_ms": 1000 * LATENCY,
        "workers": {},
    }
    with server(shards) as url:
        start = time.perf_counter()
        SplitCaptions.read(ShardSplit(url, "train"), ("action", "attribute"))
        found["captions_seconds"] = rounded(time.perf_counter() - start)
        for workers in (1, 2):
            epoch = partial(one_epoch, settings, collate, workers)
            ways = {
                LOCAL: partial(epoch, str(shards)),
                WARM: partial(epoch, url, cache),
                FIRST: partial(epoch, url, cache.with_name("new_cache"), empty=True),
            }
            rates = in_turns(ways, settings.rounds)
            start = time.perf_counter()  # once, because it takes long and varies little
            rates[RANGES] = [epoch(url) / (time.perf_counter() - start)] * settings.rounds
            found["workers"][str(workers)] = {
                "images_per_second": medians(rates),
                "of_local": {name: rounded(ratio(rates, name, LOCAL)) for name in rates if name != LOCAL},
            }
    return found


def one_epoch(
    settings: Settings,
    collate: KnowledgeCollator,
    workers: int,
    source: str,
    cache: Path | None = None,
    empty: bool = False,
) -> int:
    """Opens a source and reads one epoch. Returns its number of images."""
    if empty:
        shutil.rmtree(cache, ignore_errors=True)
    split = ShardSplit(source, "train", cache=None if cache is None else ShardCache(cache, 1e12))
    samples = TrainingSamples(split, image_transform(settings.image_size, is_train=True), 0, ("action",), None)
    order = BatchOrder(split.sizes, settings.stream_batch, 0, 1, 0)
    ahead = None if split.cache is None else Ahead([shard.remote for shard in split.shards], split.cache)
    loader = training_loader(samples, order, collate, workers, settings.device == "cuda", downloads=ahead)
    images = sum(len(batch.images) for batch in loader)
    if ahead is not None:
        ahead.close()
    return images


def serve(folder: str, port: multiprocessing.Queue) -> None:
    """Serves the files of a folder with range requests, each after `LATENCY`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_HEAD(self):
            self.answer(False)

        def do_GET(self):
            self.answer(True)

        def answer(self, body: bool) -> None:
            time.sleep(LATENCY)
            path = Path(folder) / self.path.lstrip("/")
            size = path.stat().st_size
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            low, high = (int(span[1]), min(int(span[2]), size - 1)) if span else (0, size - 1)
            self.send_response(206 if span else 200)
            if span:
                self.send_header("Content-Range", f"bytes {low}-{high}/{size}")
            self.send_header("Content-Length", str(high + 1 - low))
            self.end_headers()
            if body:
                with open(path, "rb") as file:
                    self.connection.sendfile(file, low, high + 1 - low)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    port.put(server.server_address[1])
    server.serve_forever()


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """Runs `serve` in another process while the block runs. Yields the URL."""
    context = multiprocessing.get_context("spawn")
    port = context.Queue()
    process = context.Process(target=serve, args=(str(folder), port), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{port.get(timeout=60)}"
    finally:
        process.terminate()
        process.join()


def remote(figures: dict) -> list[str]:
    rows = [
        [workers, name, spread(rate), row["of_local"].get(name)]
        for workers, row in figures["workers"].items()
        for name, rate in row["images_per_second"].items()
    ]
    return table(["workers", "", "images/s", "of local"], rows)


ON_PHOTOS = True  # run() takes a folder and photos
TABLES = {"remote.machine": machine, "remote": remote}
