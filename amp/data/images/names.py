"""Matches file names in composed and decomposed Unicode: macOS decomposes accented letters, captions files don't."""

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
