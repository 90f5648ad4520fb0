"""Reads the lists of BLIP and ALBEF: a JSON list of objects with image, caption or captions, image_id and split."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amp.data.captions.base import CaptionSource, is_empty
from amp.data.captions.json_file import parse_file
from amp.data.captions.rows import find_columns, read_rows, renamed_columns
from amp.data.captions.splits import SplitNames
from amp.errors import AmpError, shorten


def read_list(path: Path, splits: SplitNames) -> CaptionSource:
    """See `amp.data.captions.base.Reader`."""
    return list_source(parse_file(path, list), path, splits)


def list_source(content: list[Any], path: Path, splits: SplitNames) -> CaptionSource:
    """Reads the parsed content of a list."""
    notes: list[str] = []
    return read_rows(path, _rows(path, content, notes), splits, notes, place="[{}]")


def _rows(path: Path, entries: list[Any], notes: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise AmpError(
                f"{path} [{number}]: {shorten(entry)}; expected an object with image and caption; correct it"
            )
        names = tuple(entry)
        try:
            columns = find_columns(names, "key")
        except AmpError as error:
            raise AmpError(f"{path} [{number}]: {error}") from None
        if number == 0 and (renamed := renamed_columns(names, columns)):
            notes.append(f"{path}: {', '.join(renamed)}")
        row = {column: entry[names[i]] for column, i in columns.items()}
        if not is_empty(entry.get("image_id")):
            row["image_id"] = entry["image_id"]
        yield number, row
