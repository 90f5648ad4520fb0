"""Reads JSONL files with one object per line: the keys are image, caption (a string or a list) and optionally split."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amp.data.captions.base import CaptionSource
from amp.data.captions.rows import find_columns, read_rows, renamed_columns
from amp.data.captions.splits import SplitNames
from amp.data.captions.text_file import jsonl_objects
from amp.errors import AmpError


def read_jsonl(path: Path, splits: SplitNames) -> CaptionSource:
    """See `amp.data.captions.base.Reader`."""
    notes: list[str] = []
    return read_rows(path, _rows(path, notes), splits, notes)


def _rows(path: Path, notes: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    first = True
    for number, content in jsonl_objects(path):
        names = tuple(content)
        try:
            columns = find_columns(names, "key")
        except AmpError as error:
            raise AmpError(f"{path} line {number}: {error}") from None
        if first and (renamed := renamed_columns(names, columns)):
            notes.append(f"{path}: {', '.join(renamed)}")
        first = False
        yield number, {column: content[names[i]] for column, i in columns.items()}
