"""Drawn photos with captions and knowledge, with the pixel and file size of COCO's, so nothing must be downloaded.

The pixels are noise with the spectrum of photos (power falls with the frequency to the 2.5), so a JPEG of them has
about as many bytes as a real photo and takes as long to decode.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from amp.data.shards import IMAGE_EXTENSIONS
from amp.knowledge.schema import Knowledge, Triplet

WORDS = ("dog", "girl", "horse", "boy", "man", "chases", "kicks", "carries", "throws", "watches", "ball", "kite")
CAPTIONS = 5
DRAWN = 512  # number of different photos; further ones are links to these
QUALITY = 90


def photo(number: int, size: tuple[int, int] = (640, 480)) -> Image.Image:
    """Draws photo `number`; the same number gives the same photo."""
    random, (width, height) = np.random.default_rng(number), size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width).clip(min=1)
    grey = random.standard_normal((height, width))
    channels = []
    for _ in range(3):
        noise = 0.8 * grey + 0.6 * random.standard_normal((height, width))
        waves = np.fft.irfft2(np.fft.rfft2(noise) / frequency**1.25, s=(height, width))
        channels.append(128 + 50 * waves / waves.std())
    return Image.fromarray(np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8))


def drawn_knowledge(random: np.random.Generator, triplets: int) -> tuple[str, Knowledge]:
    """Returns a random caption of ten words with `triplets` triplets and states."""
    slots = [random.choice(WORDS, 3).tolist() for _ in range(triplets)]
    states = tuple(f"The {subject} {action} with bent knees and raised arms" for subject, action, _ in slots)
    return " ".join(random.choice(WORDS, 10)), Knowledge(tuple(Triplet(*slot) for slot in slots), states)


def draw_photos(folder: Path, count: int, split: str = "train") -> dict[str, str]:
    """Draws `count` photos with five captions each and four triplets per caption.

    Returns:
        The arguments of `amp.data.conversion.make.make_shards`, except `out`.
    """
    photos = folder / "photos"
    photos.mkdir(parents=True, exist_ok=True)
    names, drawn = [f"{number:06d}.jpg" for number in range(count)], min(count, DRAWN)
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(_save, photos), range(drawn), chunksize=8))
    for number in range(drawn, count):
        (photos / names[number]).hardlink_to(photos / names[number % drawn])
    return {"images": str(photos), **describe_photos(folder, names, split)}


def given_or_drawn(folder: Path, photos: Path | None, count: int, split: str = "train") -> dict[str, str]:
    """Returns arguments of `make_shards` for the first `count` photos of a folder, or for drawn photos.

    The captions are random in both cases.
    """
    if photos is None:
        return draw_photos(folder, count, split)
    names = sorted(path.name for path in photos.iterdir() if path.suffix[1:].lower() in IMAGE_EXTENSIONS)[:count]
    return {"images": str(photos), **describe_photos(folder, names, split)}


def _save(folder: Path, number: int) -> None:
    photo(number).save(folder / f"{number:06d}.jpg", quality=QUALITY)


def describe_photos(folder: Path, names: list[str], split: str) -> dict[str, str]:
    """Writes captions and knowledge of a split's photos; returns both files as arguments of `make_shards`."""
    random = np.random.default_rng(0)
    images, knowledge = [], []
    for number, name in enumerate(names):
        sentences = []
        for _ in range(CAPTIONS):
            text, found = drawn_knowledge(random, 4)
            knowledge.append({"sentid": len(knowledge), **found.to_dict()})
            sentences.append({"raw": text, "sentid": len(knowledge) - 1, "imgid": number})
        sentids = [sentence["sentid"] for sentence in sentences]
        images.append({"filename": name, "imgid": number, "split": split, "sentences": sentences, "sentids": sentids})
    captions, lines = folder / "dataset.json", folder / "knowledge.jsonl"
    captions.write_text(json.dumps({"images": images, "dataset": "drawn"}))
    lines.write_text("".join(f"{json.dumps(line)}\n" for line in knowledge))
    return {"captions": str(captions), "knowledge": str(lines)}
