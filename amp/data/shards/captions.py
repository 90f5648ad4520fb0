"""Reads the captions of shards into the data classes of captions files."""

from pathlib import PurePosixPath

from amp.data.captions.base import Caption, CaptionedImage
from amp.data.shards.manifest import ShardManifest
from amp.data.shards.reader import ShardReader
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
    for record in records:
        missing = {"filename", "image_id", "split"} - record.keys()
        if missing or not all("id" in caption for caption in record["captions"]):
            raise AmpError(
                f"{reader.path}: {record['key']}.json: {', '.join(sorted(missing)) or 'a caption id'} is missing; "
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
