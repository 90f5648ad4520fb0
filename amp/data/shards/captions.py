"""Reads the captions of shards into the data classes of captions files."""

from pathlib import Path, PurePosixPath
from typing import Any

from amp.data.captions.base import Caption, CaptionedImage
from amp.data.shards.index import REINDEX
from amp.data.shards.manifest import ShardManifest
from amp.data.shards.reader import ShardReader
from amp.data.shards.record import parse_record
from amp.errors import AmpError


def load_shard_captions(manifest: ShardManifest) -> dict[str, list[CaptionedImage]]:
    """The images and captions of each shard by its name, in the order of the tar file and without knowledge.

    Raises:
        AmpError: A shard is missing or damaged.
    """
    shards = [shard for split in manifest.splits for shard in manifest.split(split)]
    return {shard.name: read_captions(shard.open()) for shard in shards}


def read_captions(reader: ShardReader) -> list[CaptionedImage]:
    """The images and captions of one shard, without knowledge. Closes the reader."""
    with reader:
        records = [reader.record(index) for index in range(len(reader))]
    return captions_of(records, reader.path)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records in a file of records, in order.

    Raises:
        AmpError: The file can't be read, or a record is invalid.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise AmpError(f"{path}: can't be read ({error.strerror}); {REINDEX}") from None
    return [parse_record(line, None, f"{path} line {number}") for number, line in enumerate(lines, 1) if line]


def captions_of(records: list[dict[str, Any]], path: Path) -> list[CaptionedImage]:
    """The images and captions in records, without knowledge.

    Args:
        records: The records.
        path: The file that contains them, for messages.

    Raises:
        AmpError: A record lacks what make_shards writes.
    """
    for record in records:
        missing = {"filename", "image_id", "split"} - record.keys()
        if missing or not all("id" in caption for caption in record["captions"]):
            raise AmpError(
                f"{path}: {record['key']}.json: {', '.join(sorted(missing)) or 'a caption id'} is missing; "
                "expected a shard written by amp make_shards; make it again"
            )
    return [
        CaptionedImage(
            path=record["filename"],
            name=PurePosixPath(record["filename"]).name,
            id=record["image_id"],
            split=record["split"],
            captions=[Caption(caption["id"], caption["text"]) for caption in record["captions"]],
        )
        for record in records
    ]
