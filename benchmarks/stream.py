"""Images per second of the training stream, compared with open_clip_train's pipeline and a bare tar-and-Pillow loop.

open_clip_train needs webdataset 0.2.86 (it fails with newer versions, open_clip#935), so its pipeline runs in a
separate interpreter as `benchmarks/peer.py`. One line on its standard input starts one epoch.
"""

import io
import json
import multiprocessing
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import webdataset as wds
from open_clip.transform import image_transform
from PIL import Image

from amp.data.conversion.make import make_shards
from amp.data.order import BatchOrder
from amp.data.shards import ShardReader
from amp.data.split import ShardSplit
from amp.data.split_captions import SplitCaptions
from amp.data.stream import KnowledgeCollator, TrainingSamples, training_loader
from amp.data.text_features import TextFeatureStore
from amp.errors import AmpError
from amp.knowledge.tensors import TripletTokenizer
from amp.model.config import PromptConfig
from benchmarks.memory import private_mb
from benchmarks.settings import Settings
from benchmarks.tables import machine, spread, table
from benchmarks.timing import in_turns, medians, ratio, rounded

SHARDS = 8  # per format: enough for two workers, since open_clip_train needs at least one per worker
RAW, PEER = "tar and Pillow", "open_clip_train"
# OURS: uint8 batches as the workers return them. NORMALIZED: also the conversion on the device. PILLOW: decoding with
# Pillow and open_clip's transform instead of this package's decoder.
OURS, NORMALIZED, PILLOW = "ours", "ours, normalized", "ours, Pillow transform"


def run(settings: Settings, folder: Path, given: dict[str, str]) -> dict:
    """Measures all streams on the photos of `given`, which are arguments of `make_shards`."""
    shards, tars = folder / "shards", folder / "open_clip"
    make_shards(**given, out=str(shards), samples_per_shard=-(-settings.photos_count(given) // SHARDS))
    split = ShardSplit(shards, "train")
    write_open_clip_tars(split, tars)
    found = {
        "images": len(split),
        "bytes_per_image": rounded(np.mean([len(x) for x in photos_of(split)])),
        "size": settings.image_size,
        "workers": {},
    }
    for workers in (1, 2):
        with ExitStack() as stack:
            ours = OurStream(split, folder / "cache", settings, workers)
            slow = OurStream(split, folder / "cache", settings, workers, pillow=True)
            ways = {
                RAW: stack.enter_context(raw_loop(split, workers)),
                OURS: ours.epoch,
                PILLOW: slow.epoch,
                NORMALIZED: partial(ours.epoch, settings.device),
            }
            if settings.peer_python:
                peer = stack.enter_context(peer_stream(settings, tars, len(split), workers))
                ways[PEER] = peer
            rates = in_turns(ways, settings.rounds)
            row = {"images_per_second": medians(rates), "worker_MB": {OURS: rounded(ours.worker_mb())}}
            row["ratio"] = {f"ours / {name}": rounded(ratio(rates, OURS, name)) for name in ways if name != OURS}
            if settings.peer_python:
                row["worker_MB"][PEER] = rounded(peer.worker_mb())
            found["workers"][str(workers)] = row
    return found


def photos_of(split: ShardSplit) -> Iterator[bytes]:
    for shard in split.shards:
        with ShardReader(shard.path) as reader:
            yield from (reader.photo(row) for row in range(len(reader)))


def write_open_clip_tars(split: ShardSplit, folder: Path) -> None:
    """Writes the same photos in the format of open_clip_train (KEY.jpg and KEY.txt), with webdataset's writer."""
    folder.mkdir(parents=True)
    size = -(-len(split) // SHARDS)
    with wds.ShardWriter(f"{folder}/%06d.tar", maxcount=size, verbose=0) as writer:
        for index, content in enumerate(photos_of(split)):
            text = split.record(index)["captions"][0]["text"]
            writer.write({"__key__": f"{index:06d}", "jpg": content, "txt": text})


class OurStream:
    """The stream as training builds it, with random text features."""

    def __init__(self, split: ShardSplit, cache: Path, settings: Settings, workers: int, pillow: bool = False):
        k = PromptConfig().max_triplets
        store = TextFeatureStore(cache, "0" * 16, 512)
        texts = store.missing(SplitCaptions.read(split, ("action", "attribute")).all_texts(k))
        if texts:
            store.add(texts, np.random.default_rng(0).standard_normal((len(texts), 512), dtype=np.float32))
        collate = KnowledgeCollator(TripletTokenizer(open_clip.get_tokenizer("ViT-B-32"), k), store)
        transform = image_transform(settings.image_size, is_train=True)
        samples = TrainingSamples(split, transform, 0, ("action", "attribute"), None)
        if pillow:
            samples.crop = None
        self.order = BatchOrder(split.sizes, settings.stream_batch, 0, 1, 0)
        self.loader = training_loader(samples, self.order, collate, workers, settings.device == "cuda")
        self.epochs = 0

    def epoch(self, device: str | None = None) -> int:
        """Reads one epoch and returns its number of images; batches are moved to `device` if it is given."""
        self.order.set_position(self.epochs * self.order.steps)
        self.epochs += 1
        return sum(len((batch if device is None else batch.to(device)).images) for batch in self.loader)

    def worker_mb(self) -> float:
        """Private memory of the largest worker, in MB."""
        return max(private_mb(worker.pid) for worker in self.loader._iterator._workers)


def read_and_decode(path: Path) -> int:
    """Reads each tar member and decodes it with Pillow, the minimum of any stream. Returns the number of images."""
    count = 0
    with tarfile.open(path) as tar:
        for member in tar:
            if not member.name.endswith(".json"):
                Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")
                count += 1
    return count


@contextmanager
def raw_loop(split: ShardSplit, workers: int):
    """Runs `read_and_decode` on all shards with `workers` processes."""
    paths = [shard.path for shard in split.shards]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        yield lambda: sum(pool.imap_unordered(read_and_decode, paths))


class PeerStream:
    """open_clip_train's pipeline in its own interpreter; each call runs one epoch."""

    def __init__(self, process: subprocess.Popen):
        self.process = process

    def __call__(self) -> int:
        return self._ask("epoch")["images"]

    def worker_mb(self) -> float:
        return self._ask("memory")["worker_MB"]

    def _ask(self, what: str) -> dict:
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise AmpError(
                f"{self.process.args[0]}: open_clip_train's pipeline ended with {self.process.wait()}; expected an "
                "interpreter with webdataset 0.2.86, as `make bench` sets it up; see its output above"
            )
        return json.loads(line)


@contextmanager
def peer_stream(settings: Settings, tars: Path, images: int, workers: int):
    given = {
        "tars": f"{tars}/{{000000..{SHARDS - 1:06d}}}.tar",
        "images": images,
        "batch_size": settings.stream_batch,
        "workers": workers,
        "size": settings.image_size,
    }
    script = Path(__file__).with_name("peer.py")
    command = [str(settings.peer_python), str(script), json.dumps(given)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield PeerStream(process)
        finally:
            # Closing the pipe isn't enough, because workers that were forked in between keep it open.
            process.stdin.write("end\n")
            process.stdin.flush()


def streams(figures: dict) -> list[str]:
    rows = []
    for workers, row in figures["workers"].items():
        for name, rate in row["images_per_second"].items():
            ratio = row["ratio"].get(f"ours / {name}")
            rows.append([workers, name, spread(rate), ratio, row["worker_MB"].get(name)])
    return table(["workers", "", "images/s", "speedup of ours", "private MB per worker"], rows)


ON_PHOTOS = True  # run() takes a folder and photos
TABLES = {"stream.machine": machine, "stream": streams}
