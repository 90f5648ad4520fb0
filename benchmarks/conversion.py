"""Conversion: images a second of make_shards, beside webdataset's ShardWriter in a plain loop and a copy of the files.

All end when their bytes are on the disk: our shards are flushed one by one, the others by one flush of all at the end.
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
    """Measures the photos that `given` names, one process each."""
    size = 1000  # make_shards' own default
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
    return {"images": settings.photos_count(given), "images_a_second": medians(rates), "ratio": ratios}


def images_of(given: dict[str, str]) -> list[dict]:
    return json.loads(Path(given["captions"]).read_text())["images"]


def copy(given: dict[str, str], out: Path) -> int:
    """Each photo copied by itself."""
    out.mkdir()
    images = images_of(given)
    for image in images:
        shutil.copyfile(Path(given["images"]) / image["filename"], out / Path(image["filename"]).name)
    os.sync()
    return len(images)


def plain_writer(given: dict[str, str], out: Path, size: int, decode: bool = False) -> int:
    """What webdataset's own pages suggest: photos and knowledge joined and written, nothing checked but, if asked for,
    that each photo can be decoded."""
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
        for name, rate in figures["images_a_second"].items()
    ]
    return table(["", "images/s", "as fast as make_shards, times"], rows)


ON_PHOTOS = True  # run() takes a folder and photos
TABLES = {"conversion": conversions}
