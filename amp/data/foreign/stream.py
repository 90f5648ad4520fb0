"""Streams the photos of a tar file of another tool with the webdataset library."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from amp.data.foreign.scan import RETAR
from amp.data.shards.index import SideFile
from amp.errors import AmpError, require


class PhotoStream:
    """The photos of a tar file, read once from its start to its end.

    The whole file is hashed on the way. webdataset only groups members here: it opens no file, because a name such as
    `pipe:COMMAND` would start a program, and decodes nothing.

    Args:
        path: The tar file.
        names: Names of the photos to read, in the order of the tar file.

    Attributes:
        file: Size and SHA-256 of the tar file, once all photos are read.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path, self.names = path, list(names)
        self.file = SideFile(0, "")

    def __iter__(self) -> Iterator[bytes]:
        """Yields the bytes of each photo.

        Raises:
            AmpError: The tar file was changed since its headers were read.
        """
        tariterators = _tariterators()
        wanted = frozenset(self.names)
        try:
            with open(self.path, "rb") as opened:
                file = _Hashed(opened)
                members = tariterators.tar_file_expander(
                    [{"url": str(self.path), "stream": file}],
                    select_files=lambda name: str(PurePosixPath(name)) in wanted,
                )
                left = iter(self.names)
                for member in members:
                    if not member:  # webdataset's mark of the end
                        continue
                    name = str(PurePosixPath(member["fname"]))
                    if name != next(left, None):
                        raise self._changed(f"{name!r} is out of order")
                    yield member["data"]
                if (missing := next(left, None)) is not None:
                    raise self._changed(f"{missing!r} is missing")
                while file.read(1 << 20):  # the end of the archive, for the hash
                    pass
        except AmpError:
            raise
        except OSError as error:
            raise AmpError(f"{self.path}: can't be read ({error.strerror or error}); {RETAR}") from None
        except GeneratorExit:
            raise
        except Exception as error:  # tarfile raises almost any exception on damaged headers
            raise self._changed(f"{type(error).__name__}: {error.args[0] if error.args else ''}") from None
        self.file = SideFile(file.size, file.sha256.hexdigest())

    def _changed(self, seen: str) -> AmpError:
        return AmpError(
            f"{self.path}: changed while it was read ({seen}); expected {len(self.names)} photos; run the same command "
            "again"
        )


class _Hashed:
    """Counts and hashes the bytes read from a file."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def read(self, size: int) -> bytes:
        block = self._file.read(size)
        self.sha256.update(block)
        self.size += len(block)
        return block


def _tariterators() -> Any:
    require("webdataset", "reading tar files of other tools")
    return import_module("webdataset.tariterators")
