"""File names in composed and decomposed Unicode: macOS decomposes letters with accents, captions files compose them."""

import os
import unicodedata
from pathlib import Path, PurePosixPath


def composed(name: str) -> str:
    """The form in which names are compared."""
    return unicodedata.normalize("NFC", name)


def find_file(root: Path, name: str) -> Path:
    """The file of that name below `root`, as it is spelled there: composed, decomposed, or exactly as given.

    Args:
        root: An existing folder.
        name: Path below it, with ``/`` as separator.

    Returns:
        Its path; `root` / `name` where there is none.
    """
    if name.isascii() or os.path.exists(root / name):  # false, too, for names that are too long
        return root / name
    found = root
    for part in PurePosixPath(name).parts:
        spellings = (part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD")))
        found = next((path for path in map(found.joinpath, spellings) if os.path.exists(path)), found / part)
    return found
