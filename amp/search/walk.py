"""Finds the photos in a folder, and identifies their content."""

import hashlib
import os
import stat
from pathlib import Path
from typing import NamedTuple

from amp.data.images.formats import PHOTO_SUFFIXES, unreadable_reason
from amp.errors import AmpError, printable
from amp.json_text import is_unicode


class Stamp(NamedTuple):
    """Identifies the content of a photo file.

    Attributes:
        size: Size in bytes.
        mtime: Modification time in ns.
        digest: `digest_of` the content; empty if unknown.
    """

    size: int
    mtime: int
    digest: str = ""


def digest_of(content: bytes) -> str:
    """SHA-256 of a file's content, cut to 32 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()[:32]


class Walk:
    """The photos in a folder and its sub-folders, and the files and folders that are skipped.

    Links to folders are followed after all other folders. Each folder is visited once, so links can't cause a loop.

    Args:
        root: The folder.

    Attributes:
        root: The folder.
        stamps: Size and modification time of each photo, by its path relative to `root`, in order.
        skipped: Why files and folders are skipped, by their paths relative to `root`.
        closed: Skipped files and folders that can't be opened at the moment. Indexed photos in them may still exist.
        hidden, others: Number of files and folders whose name starts with a dot, and of files that are not photos.

    Raises:
        AmpError: `root` can't be opened.
    """

    def __init__(self, root: Path):
        self.root = root
        self.stamps: dict[str, Stamp] = {}
        self.skipped: dict[str, str] = {}
        self.closed: list[str] = []
        self.hidden = self.others = 0
        self._links: list[Path] = []
        self._seen: set[tuple[int, int]] = set()
        self._add_below(root)
        for link in self._links:  # `_add_below` appends to it
            if root.is_relative_to(os.path.realpath(link)):
                self.skipped[self._name(link)] = "a link to a folder that contains this one"
            else:
                self._add_below(link)

    def keep_closed(self, old: dict[str, Stamp]) -> None:
        """Adds the photos of an older index that are in `closed`, or in a folder that is."""
        closed, folders = set(self.closed), tuple(f"{name}/" for name in self.closed)
        for name, stamp in old.items():
            if name in closed or name.startswith(folders):
                self.stamps.setdefault(name, stamp)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _skip(self, path: Path, reason: str, closed: bool = False) -> None:
        name = self._name(path)
        self.skipped[printable(name)] = reason
        if closed:
            self.closed.append(name)

    def _cannot_open(self, error: OSError) -> None:
        path = Path(error.filename)
        if path == self.root:
            raise AmpError(f"{path}: can't be opened ({error.strerror}), expected a folder of photos") from error
        if not isinstance(error, FileNotFoundError):  # ignore folders removed in the meantime
            self._skip(path, f"a folder that can't be opened ({error.strerror})", closed=True)

    def _add_below(self, top: Path) -> None:
        for here, folders, files in os.walk(top, onerror=self._cannot_open):
            folder = Path(here)
            try:
                found = folder.stat()
            except OSError as error:
                self._cannot_open(error)
                folders.clear()
                continue
            if (found.st_dev, found.st_ino) in self._seen:
                self._skip(folder, "a folder that was already read under another name")
                folders.clear()
                continue
            self._seen.add((found.st_dev, found.st_ino))
            self.hidden += sum(name.startswith(".") for name in (*folders, *files))
            visible = sorted(name for name in folders if not name.startswith("."))
            self._links += [folder / name for name in visible if os.path.islink(folder / name)]
            folders[:] = visible
            for name in sorted(name for name in files if not name.startswith(".")):
                self._add_file(folder / name)

    def _add_file(self, path: Path) -> None:
        suffix = path.suffix.lower()
        if suffix not in PHOTO_SUFFIXES:
            if reason := unreadable_reason(suffix):
                self._skip(path, reason)
            elif path.is_symlink() and not path.exists():
                self._skip(
                    path, "a link whose target is missing", closed=True
                )  # for example on a disk that is not attached
            else:
                self.others += 1
            return
        if not is_unicode(self._name(path)):  # can't be written to JSON
            self._skip(path, "its name is not valid UTF-8")
            return
        try:
            found = path.stat()
        except OSError as error:  # removed, a broken link, or a folder or disk that can't be read now
            self._skip(path, f"can't be read ({error.strerror})", closed=not isinstance(error, FileNotFoundError))
        else:
            if stat.S_ISREG(found.st_mode):
                self.stamps[self._name(path)] = Stamp(found.st_size, found.st_mtime_ns)
            else:
                self._skip(path, "a pipe or a device; expected a regular file")
