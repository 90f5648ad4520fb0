"""WebDataset tar files as other tools write them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from support.tars import tar_of

Photos = list[tuple[str, bytes, list[str]]]
"""File name, content and captions of each photo."""


def photos_of(dataset: dict[str, str], split: str = "train") -> Photos:
    """The photos of a split of a Karpathy file, in its order; `dataset` has the arguments of make_shards."""
    images = json.loads(Path(dataset["captions"]).read_text(encoding="utf-8"))["images"]
    root = Path(dataset["images"])
    return [
        (image["filename"], (root / image["filename"]).read_bytes(), [s["raw"] for s in image["sentences"]])
        for image in images
        if image["split"] == split
    ]


def img2dataset(number: int, photo: bytes, caption: str, **changes) -> list[tuple[str, bytes]]:
    """The members of a sample of img2dataset: KEY.jpg, KEY.txt, KEY.json."""
    key = f"{number:09d}"
    record = {
        "caption": caption,
        "url": f"https://example.invalid/{number}.jpg",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": 44,
        "height": 36,
        "sha256": "0",
        **changes,
    }
    return [(f"{key}.jpg", photo), (f"{key}.txt", caption.encode()), (f"{key}.json", json.dumps(record).encode())]


def clip_benchmark(number: int, photo: bytes, captions: Iterable[str], extension: str = "jpg"):
    """The members of a sample of CLIP_benchmark's webdataset_builder, with its key and its line breaks."""
    key = f"s{number:07d}"
    text = "\n".join(caption.replace("\n", r"\n") for caption in captions)
    return [(f"{key}.{extension}", photo), (f"{key}.txt", text.encode())]


def with_json(key: str, photo: bytes, record: Any) -> list[tuple[str, bytes]]:
    """The members of a sample of open_clip or FLAIR, whose captions are in a .json."""
    return [(f"{key}.jpg", photo), (f"{key}.json", json.dumps(record).encode())]


def clip_benchmark_tars(folder: Path, photos: Photos, per_tar: int, names: str = "{}.tar") -> list[Path]:
    """Tar files of CLIP_benchmark, in a new folder."""
    folder.mkdir(parents=True)
    tars = []
    for start in range(0, len(photos), per_tar):
        samples = [clip_benchmark(n, photo, texts) for n, (_, photo, texts) in enumerate(photos)]
        members = [member for sample in samples[start : start + per_tar] for member in sample]
        tars.append(tar_of(folder / names.format(len(tars)), *members))
    return tars
