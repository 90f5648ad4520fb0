"""Captions for comparing writers of knowledge at a cost that a slow language model allows: one per photo.

    python -m benchmarks.writers --captions dataset_flickr8k.json --exclude_images pretrain_images.txt --train 1500 \
        --test 500 --out runs/writers/captions.csv
    python -m benchmarks.writers --shuffle runs/writers/rules/knowledge.jsonl --out runs/writers/shuffled.jsonl

The second command gives each record the knowledge of another caption, a writer that is always wrong.
"""

import csv
import io
import json
import random
from pathlib import Path

from amp.errors import AmpError, exit_on_error

with exit_on_error():
    from jsonargparse import auto_cli

    from amp.data.captions.load import load_captions
    from amp.data.captions.text_file import jsonl_objects
    from amp.files import write_atomically


def main(
    out: Path,
    captions: str | None = None,
    exclude_images: Path | None = None,
    train: int = 1500,
    test: int = 500,
    shuffle: Path | None = None,
    seed: int = 0,
) -> None:
    """Writes a captions file, or shuffled knowledge.

    Args:
        out: CSV file of captions, or JSONL file of shuffled knowledge.
        captions: Captions file with the splits train and test.
        exclude_images: Text file of images to leave out, one path per line.
        train: Number of training photos.
        test: Number of test photos.
        shuffle: `knowledge.jsonl` to shuffle.
        seed: Random seed of the choice and of the order.
    """
    if (captions is None) == (shuffle is None):
        raise AmpError("expected either --captions or --shuffle; give one of them")
    draw = random.Random(seed)
    if shuffle is not None:
        records = [record for _, record in jsonl_objects(shuffle)]
        write_atomically(out, "".join(json.dumps(record) + "\n" for record in shuffled(records, draw)).encode())
        return
    excluded = set(exclude_images.read_text().split()) if exclude_images else set()
    rows = choose(load_captions(captions).images, excluded, {"train": train, "test": test}, draw)
    text = io.StringIO()
    csv.writer(text).writerows([("image", "caption", "split"), *rows])
    write_atomically(out, text.getvalue().encode())
    print(f"{len(rows)} captions written to {out}")


def choose(images, excluded: set[str], counts: dict[str, int], draw: random.Random) -> list[tuple[str, str, str]]:
    """(image, caption, split) of randomly chosen images with one of their captions each."""
    rows = []
    for split, count in counts.items():
        known = [image for image in images if image.split == split and image.path not in excluded]
        for image in draw.sample(known, count):
            rows.append((image.path, draw.choice(image.captions).text, split))
    return rows


def shuffled(records: list[dict], draw: random.Random) -> list[dict]:
    """The records, each with the knowledge of the next one in a random circle."""
    order = list(records)
    draw.shuffle(order)
    known = {}
    for record, other in zip(order, order[1:] + order[:1], strict=True):
        known[record["sentid"]] = {
            key: other[key] for key in ("triplets", "states", "sources", "empty") if key in other
        }
    place = ("sentid", "image", "caption")
    return [{key: record[key] for key in place} | known[record["sentid"]] for record in records]


if __name__ == "__main__":
    with exit_on_error():
        auto_cli(main, as_positional=False)
