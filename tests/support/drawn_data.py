"""A small dataset of drawn pictures with captions and knowledge, and its shards."""

import json
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageDraw

SPLIT_SIZES = {"train": 22, "val": 6, "test": 12}

_COLOURS = ("red", "green", "blue", "yellow", "white", "purple", "orange")
_ACTORS = ("dog", "girl", "horse", "boy")
_ACTIONS = ("chases", "kicks", "carries", "throws", "watches")
_THINGS = ("ball", "kite", "stick")


def draw_dataset(root: Path, sizes: dict[str, int] = SPLIT_SIZES) -> dict:
    """Draws pictures and writes captions in the Karpathy format and their knowledge.

    Each image has one to three captions, and each caption zero to three triplets of both kinds. Captions of the test
    split are distinct; one caption of the training split belongs to several images.

    Returns:
        The arguments of `amp.data.conversion.make.make_shards`, except `out`.
    """
    (root / "images").mkdir(parents=True)
    images, knowledge = [], []
    for split, count in sizes.items():
        for index in range(count):
            number = len(images)
            name = f"{split}_{index:03d}.jpg"
            draw(number).save(root / "images" / name, quality=95)
            sentences = []
            for turn in range(1 + number % 3):
                actor, action, thing = (
                    words[(number + 2 * turn) % len(words)] for words in (_ACTORS, _ACTIONS, _THINGS)
                )
                colour = _COLOURS[(number + turn) % len(_COLOURS)]
                text = f"A {colour} {actor} {action} a {thing} beside house {number} on day {turn}"
                if split == "train" and number % 5 == 4 and turn == 0:
                    text = "A dog sleeps"
                triplets = [
                    {"subject": actor, "action": action, "object": thing, "kind": "action"},
                    {"subject": actor, "action": "is", "object": colour, "kind": "attribute"},
                    {"subject": actor, "action": "stands", "object": "", "kind": "action"},
                ][: (number + turn) % 4]
                states = [f"The {t['subject']} {t['action']} with care {(number + turn) % 6}" for t in triplets]
                sentid = len(knowledge)
                sentences.append({"raw": text, "tokens": text.lower().split(), "imgid": number, "sentid": sentid})
                knowledge.append({"sentid": sentid, "image": name, "triplets": triplets, "states": states})
            sentids = [s["sentid"] for s in sentences]
            images.append(
                {"filename": name, "split": split, "imgid": number, "sentids": sentids, "sentences": sentences}
            )
    (root / "dataset.json").write_text(json.dumps({"images": images, "dataset": "drawn"}))
    (root / "knowledge.jsonl").write_text("".join(json.dumps(line) + "\n" for line in knowledge))
    return {
        "captions": str(root / "dataset.json"),
        "images": str(root / "images"),
        "knowledge": str(root / "knowledge.jsonl"),
    }


def draw(number: int) -> Image.Image:
    """Draws two shapes on a non-square canvas. Their colours and positions depend on the number."""
    image = Image.new("RGB", (44, 36), (20 + 9 * number % 200, 90, 160))
    canvas = ImageDraw.Draw(image)
    left = 2 + 5 * number % 20
    canvas.ellipse((left, 6, left + 14, 22), fill=_COLOURS[number % 7])
    canvas.rectangle((40 - left, 14 + number % 9, 43, 33), fill=_COLOURS[(3 * number + 1) % 7])
    return image


def draw_shards(root: Path, sizes: dict[str, int] = SPLIT_SIZES, samples_per_shard: int = 5) -> Path:
    """Writes the shards of `draw_dataset` to a subfolder of `root`, next to the pictures."""
    from amp.data.conversion.make import make_shards

    make_shards(**draw_dataset(root, sizes), out=str(root / "shards"), samples_per_shard=samples_per_shard, workers=1)
    return root / "shards"


def captions_of(folder: Path, names: Iterable[str]) -> Path:
    """Writes a captions file for these images."""
    path = folder / "captions.jsonl"
    path.write_text(
        "".join(json.dumps({"image": name, "caption": f"A dog {i} runs"}) + "\n" for i, name in enumerate(names))
    )
    return path
