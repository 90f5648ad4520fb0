"""Conversion: images per second of make_shards, compared with webdataset's ShardWriter and a copy of the files.

Each measurement ends when all bytes are on the disk. make_shards flushes each shard, the others flush once at the end.
"""

import io
import json
import os
import shutil
from pathlib import Path

import webdataset as wds
from PIL import Image

from amp.data.conversion.make import make_shards
from amp.terminal import PlainConsole
from benchmarks.settings import Settings
from benchmarks.tables import spread, table
from benchmarks.timing import in_turns, medians, ratio, rounded

COPY, WRITER, OURS, DECODED = "file copy", "ShardWriter", "make_shards", "make_shards --check decode"
DECODING_WRITER = "ShardWriter, photos decoded before"


def run(settings: Settings, folder: Path, given: dict[str, str]) -> dict:
    """Measures all methods on the photos of `given`, with one process each."""
    size = 1000  # the default of make_shards
    out = folder / "conversion"

    def fresh() -> Path:
        shutil.rmtree(out, ignore_errors=True)
        return out

    def ours(check: str) -> int:
        quiet = PlainConsole(quiet=True)
        made = make_shards(**given, out=str(fresh()), samples_per_shard=size, workers=1, check=check, console=quiet)
        return made.samples("train")

    ways = {
        COPY: lambda: copy(given, fresh()),
        WRITER: lambda: plain_writer(given, fresh(), size),
        DECODING_WRITER: lambda: plain_writer(given, fresh(), size, decode=True),
        OURS: lambda: ours("structure"),
        DECODED: lambda: ours("decode"),
    }
    rates = in_turns(ways, settings.rounds)
    shutil.rmtree(out)
    ratios = {f"{name} / {OURS}": rounded(ratio(rates, name, OURS)) for name in ways if name != OURS}
    return {"images": settings.photos_count(given), "images_per_second": medians(rates), "ratio": ratios}


def images_of(given: dict[str, str]) -> list[dict]:
    return json.loads(Path(given["captions"]).read_text())["images"]


def copy(given: dict[str, str], out: Path) -> int:
    """Copies each photo file. Returns the number of photos."""
    out.mkdir()
    images = images_of(given)
    for image in images:
        shutil.copyfile(Path(given["images"]) / image["filename"], out / Path(image["filename"]).name)
    os.sync()
    return len(images)


def plain_writer(given: dict[str, str], out: Path, size: int, decode: bool = False) -> int:
    """Writes photos and knowledge with the loop of webdataset's documentation. Returns the number of photos.

    Nothing is checked, except that each photo can be decoded if `decode` is true.
    """
    out.mkdir()
    knowledge = {}
    for line in Path(given["knowledge"]).read_text().splitlines():
        record = json.loads(line)
        knowledge[record.pop("sentid")] = record
    images = images_of(given)
    with wds.ShardWriter(f"{out}/%06d.tar", maxcount=size, verbose=0) as writer:
        for image in images:
            content = (Path(given["images"]) / image["filename"]).read_bytes()
            if decode:
                Image.open(io.BytesIO(content)).convert("RGB")
            captions = [{"text": x["raw"], **knowledge[x["sentid"]]} for x in image["sentences"]]
            writer.write({"__key__": Path(image["filename"]).stem, "jpg": content, "json": {"captions": captions}})
    os.sync()
    return len(images)


def conversions(figures: dict) -> list[str]:
    rows = [
        [name, spread(rate), figures["ratio"].get(f"{name} / make_shards")]
        for name, rate in figures["images_per_second"].items()
    ]
    return table(["", "images/s", "speed relative to make_shards"], rows)


ON_PHOTOS = True  # run() takes a folder and photos
TABLES = {"conversion": conversions}
