"""Finds the tar files that a folder, a brace pattern or a glob names."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from amp.data.shards.manifest import MANIFEST_NAME, ShardManifest
from amp.errors import AmpError, require

_HINT = "give a tar file, a folder of tar files, a pattern such as 'FOLDER/{00000..00009}.tar', or a glob"


def names_tars(text: str) -> bool:
    """Whether a path or pattern names tar files rather than a captions file."""
    return text.endswith(".tar") or Path(text).is_dir()


def find_tars(text: str) -> list[Path]:
    """The tar files that a path or pattern names.

    Files of a folder or a glob are sorted, with numbers by their value, so that 2.tar comes before 10.tar.

    Raises:
        AmpError: Nothing has such a name, a file of a brace pattern is missing, or a file is a shard of amp
            make_shards.
    """
    path = Path(text)
    if path.is_dir():
        found = sorted(path.glob("*.tar"), key=_numeric)
    elif path.exists():
        found = [path]
    else:
        found = [tar for name in _expanded(text) for tar in _matching(name)]
    if not found:
        raise AmpError(f"{text}: can't be read (no *.tar matches); expected at least one tar file; {_HINT}")
    for tar in found:
        if not tar.is_file():
            raise AmpError(f"{tar}: can't be read (no such file); expected a tar file; {_HINT}")
    _refuse_own(found)
    return list(dict.fromkeys(found))


def _expanded(text: str) -> list[str]:
    if "{" not in text:
        return [text]
    try:
        return list(require("braceexpand", "a brace pattern").braceexpand(text))
    except ValueError as error:
        raise AmpError(f"{text}: not a brace pattern ({error}); {_HINT}") from None


def _matching(name: str) -> list[Path]:
    return sorted(map(Path, glob.glob(name)), key=_numeric) if re.search(r"[*?\[]", name) else [Path(name)]


def _refuse_own(tars: list[Path]) -> None:
    for folder in dict.fromkeys(tar.parent for tar in tars):
        if not (folder / MANIFEST_NAME).exists():
            continue
        manifest = ShardManifest.load(folder)
        own = next((i.name for infos in manifest.splits.values() for i in infos if i.records is None), None)
        if own is not None:
            raise AmpError(
                f"{folder}: contains shards of amp make_shards ({own}); expected tar files of another tool; use these "
                "shards as they are; to replace their knowledge, use amp rewrite_knowledge"
            )


def _numeric(path: Path) -> list[tuple[int, str]]:
    parts = re.split(r"([0-9]+)", str(path))
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
