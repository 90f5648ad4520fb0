"""Reads tables with one caption per row: finds the columns by name, and groups the rows by image."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from amp.data.captions.base import Caption, CaptionedImage, CaptionSource, Skip, cell, image_path, is_empty
from amp.data.captions.splits import SplitNames
from amp.data.images.names import composed
from amp.errors import AmpError, shorten

ALIASES = {
    "image": ("filepath", "filename", "file", "imagename", "imagepath", "imagefile", "path", "img", "imgpath", "photo"),
    "caption": ("title", "text", "comment", "sentence", "description", "raw"),
    "split": (),
}
"""Other accepted column names. Case, spaces, "_" and "-" are ignored."""


def read_rows(
    path: Path, rows: Iterable[tuple[int, dict[str, Any]]], splits: SplitNames, notes: list[str] | None = None
) -> CaptionSource:
    """Groups the rows of a table by image. Each row of an image is one of its captions.

    Args:
        path: The file, for messages.
        rows: Line number of each row, and its `image`, `caption` and optionally `split`.
        splits: Names of the splits.
        notes: Lines for the user. `rows` may append to it while it is read.

    Raises:
        AmpError: A value can't be used, or an image is in two splits.
    """
    images: dict[str, CaptionedImage] = {}
    skipped: list[Skip] = []
    first_line: dict[str, int] = {}
    for number, (line, row) in enumerate(rows):
        where = f"{path} line {line}"
        file, text = (cell(row[key], f"{where}: '{key}'") for key in ("image", "caption"))
        if re.fullmatch(r"""\[\s*(["']).*\1\s*\]""", text, re.DOTALL):
            raise AmpError(f"{where}: the caption is {shorten(text)}, a list; expected text; write one row per caption")
        split = row.get("split")
        split = splits.default if is_empty(split) else splits.normal(split, where)
        if not file:
            skipped.append(Skip("caption_without_image", "", f"{where}: 'image' is empty", split, captions=1))
            continue
        file = image_path(file, where)
        image = images.setdefault(composed(file), CaptionedImage(file, file, file, split))
        first = first_line.setdefault(image.path, line)
        if image.split != split:
            raise AmpError(
                f"{where}: 'split' is {split!r}, but line {first} puts the same image in {image.split!r}; expected one "
                "split per image; correct one of the lines"
            )
        if text:
            image.captions.append(Caption(number, text))
        else:
            skipped.append(Skip("empty_caption", file, f"{where}: 'caption' is empty", split, captions=1))
    return CaptionSource(list(images.values()), skipped, notes if notes is not None else [])


@lru_cache(maxsize=1024)
def find_columns(names: tuple[str, ...], word: str = "column") -> dict[str, int]:
    """Positions of the columns `image`, `caption` and, if present, `split`.

    Args:
        names: Names of all columns.
        word: Word for a column in messages, such as `key`.

    Raises:
        AmpError: Image or caption is missing, or several columns match. The message doesn't include the file.
    """
    folded = [re.sub(r"[\s_-]+", "", name).casefold() for name in names]
    columns = {}
    for column, aliases in ALIASES.items():
        # In order of preference: the exact name, the name in another spelling, an alias.
        spellings = (
            [name == column for name in names],
            [name == column for name in folded],
            [name in aliases for name in folded],
        )
        found = next((places for fits in spellings if (places := [i for i, fit in enumerate(fits) if fit])), [])
        if len(found) > 1:
            raise AmpError(
                f"the {word}s {' and '.join(repr(names[i]) for i in found)} could each hold the {column}; expected "
                f"one; rename the right one to '{column}' and the other to something else"
            )
        if found:
            columns[column] = found[0]
        elif aliases:
            raise AmpError(
                f"{word} '{column}' is missing; {word}s seen: {shorten(', '.join(names))}; expected '{column}' or one "
                f"of {', '.join(aliases)}; rename the {word}"
            )
    return columns


def renamed_columns(names: tuple[str, ...], columns: dict[str, int]) -> list[str]:
    """`caption from 'title'` for each column with an alias, for messages to the user."""
    return [f"{column} from {names[i]!r}" for column, i in columns.items() if names[i].casefold() != column]
