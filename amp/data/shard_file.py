"""The bytes of a shard: members, records, and their hash while they are written."""

import hashlib
import io
import json
import tarfile

from amp.data.shards import RECORD_SCHEMA
from amp.data.sources import CaptionedImage

NO_KNOWLEDGE = '{"triplets":[],"states":[]}'


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
    head = {
        "schema": RECORD_SCHEMA,
        "key": key,
        "image_id": image.id,
        "filename": image.path,
        "split": image.split,
    }
    captions = []
    for caption in image.captions:
        # Knowledge is JSON already, so its text is joined to the caption's.
        own = json.dumps({"id": caption.id, "text": caption.text}, ensure_ascii=False, separators=(",", ":"))
        captions.append(f"{own[:-1]},{(caption.knowledge or NO_KNOWLEDGE)[1:]}")
    text = json.dumps(head, ensure_ascii=False, separators=(",", ":"))
    return f'{text[:-1]},"captions":[{",".join(captions)}]}}'.encode()


def add_member(file: HashedFile, name: str, content: bytes) -> None:
    """Appends a member to an archive, in one piece: `tarfile` itself writes in pieces of ten kilobytes."""
    # Owner, mode and time are fixed, so that equal input gives an equal sha256.
    member = tarfile.TarInfo(name)
    member.size = len(content)
    member.mtime = member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o644
    header = member.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")
    file.write(b"".join((header, content, bytes(-len(content) % tarfile.BLOCKSIZE))))


def end_archive(file: HashedFile) -> None:
    """Writes the two empty blocks that end an archive, and fills its last record."""
    file.write(bytes(2 * tarfile.BLOCKSIZE))
    file.write(bytes(-file.size % tarfile.RECORDSIZE))
