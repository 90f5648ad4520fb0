"""Writes the tar file of a shard, and hashes it at the same time."""

import hashlib
import io
import tarfile


class HashedFile:
    """Counts and hashes the bytes written to a file, so that a finished shard needn't be read again."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, block: bytes) -> int:
        self.sha256.update(block)
        self.size += len(block)
        return self._file.write(block)


def add_member(file: HashedFile, name: str, content: bytes) -> tuple[int, int]:
    """Appends a member to an archive in one write. `tarfile` itself writes in pieces of ten kilobytes.

    Returns:
        Offset and size of the content in bytes.
    """
    # Fixed owner, mode and time, so that the same input gives the same SHA-256.
    member = tarfile.TarInfo(name)
    member.size = len(content)
    member.mtime = member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o644
    header = member.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")
    offset = file.size + len(header)
    file.write(b"".join((header, content, bytes(-len(content) % tarfile.BLOCKSIZE))))
    return offset, len(content)


def end_archive(file: HashedFile) -> None:
    """Writes the two zero blocks that end an archive, and pads its last record."""
    file.write(bytes(2 * tarfile.BLOCKSIZE))
    file.write(bytes(-file.size % tarfile.RECORDSIZE))
