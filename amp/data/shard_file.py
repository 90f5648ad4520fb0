"""The bytes of a shard: members, records, and their hash while they are written."""

import hashlib
import io
import json
import tarfile

from amp.data.shards import RECORD_SCHEMA
from amp.data.sources import CaptionedImage


class HashedFile:
    """Counts and hashes what is written, so that a finished shard need not be read again."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, block: bytes) -> int:
        self.sha256.update(block)
        self.size += len(block)
        return self._file.write(block)


def record_bytes(key: str, image: CaptionedImage) -> bytes:
    """``KEY.json`` of a sample."""
    captions = []
    for caption in image.captions:
        knowledge = json.loads(caption.knowledge) if caption.knowledge else {"triplets": [], "states": []}
        captions.append({"id": caption.id, "text": caption.text, **knowledge})
    record = {
        "schema": RECORD_SCHEMA,
        "key": key,
        "image_id": image.id,
        "filename": image.path,
        "split": image.split,
        "captions": captions,
    }
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Appends a file."""
    # Owner, mode and time are fixed, so that equal input gives an equal sha256.
    member = tarfile.TarInfo(name)
    member.size = len(content)
    member.mtime = member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o644
    tar.addfile(member, io.BytesIO(content))
