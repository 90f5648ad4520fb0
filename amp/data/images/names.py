"""Matches file names, composed or decomposed, relative or absolute.

macOS decomposes accented letters in names, captions files don't.
"""

import os
import unicodedata
from pathlib import Path, PurePosixPath


def composed(name: str) -> str:
    """A name in the composed form (NFC) in which names are compared."""
    return unicodedata.normalize("NFC", name)


def find_file(root: Path, name: str) -> Path:
    """Finds a file below `root` whose name may be composed or decomposed on disk.

    Args:
        root: An existing folder.
        name: Path relative to `root`, with `/` as separator.

    Returns:
        Path of the file as it is spelled on disk; a path that doesn't exist if there is no such file.
    """
    if name.isascii() or os.path.exists(root / name):  # also False for names that are too long
        return root / name
    found = root
    for part in PurePosixPath(name).parts:
        spellings = (part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD")))
        found = next((path for path in map(found.joinpath, spellings) if os.path.exists(path)), found / part)
    return found


class RelativeNames:
    """Converts absolute paths of files in a folder into paths relative to it.

    Args:
        root: The folder. Paths may spell it with or without symbolic links.
    """

    def __init__(self, root: Path) -> None:
        self._real = _parts(os.path.realpath(root))
        self._roots = (_parts(os.path.abspath(root)), self._real)
        self._folders: dict[tuple[str, ...], tuple[str, ...]] = {}  # a path's folder -> the folder without links

    def find(self, name: str) -> str | None:
        """The relative path; None if an absolute path is outside of the folder. Relative paths are returned as they
        are."""
        if not name.startswith("/"):
            return name
        parts = PurePosixPath(name).parts
        for root in self._roots:
            if _parts(name)[: len(root)] == root and len(parts) > len(root):
                return "/".join(parts[len(root) :])
        folder = parts[:-1]
        if folder not in self._folders:
            self._folders[folder] = () if "\0" in name else PurePosixPath(os.path.realpath(Path(*folder))).parts
        real = self._folders[folder]
        if tuple(map(composed, real[: len(self._real)])) != self._real:
            return None
        return "/".join((*real[len(self._real) :], parts[-1]))


def _parts(path: str) -> tuple[str, ...]:
    return PurePosixPath(composed(path)).parts
