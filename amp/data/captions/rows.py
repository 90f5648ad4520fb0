"""Tables of captions, one caption per row: columns are found by their names, rows become images."""

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
"""Other names of the columns. Case, spaces, "_" and "-" don't count."""


def read_rows(
    path: Path, rows: Iterable[tuple[int, dict[str, Any]]], splits: SplitNames, notes: list[str] | None = None
) -> CaptionSource:
    """Rows of a table to images. Several rows of one image are its several captions.

    Args:
        path: The file, for messages.
        rows: Line number and the row's `image`, `caption` and, if wanted, `split`.
        splits: Names of the splits.
        notes: Lines for the user. The reader may add to it while rows are read.

    Raises:
        AmpError: A value that can't be used, or an image in two splits.
    """
    images: dict[str, CaptionedImage] = {}
    skipped: list[Skip] = []
    first_line: dict[str, int] = {}
    for number, (line, row) in enumerate(rows):
        where = f"{path} line {line}"
        file, text = (cell(row[key], f"{where}: '{key}'") for key in ("image", "caption"))
        if re.fullmatch(r"""\[\s*(["']).*\1\s*\]""", text, re.DOTALL):
            raise AmpError(
                f"{where}: the caption is {shorten(text)}, a list; expected a text; write one row per caption"
            )
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
                f"{where}: 'split' is {split!r} but line {first} puts the same image in {image.split!r}; expected one "
                "split per image; correct one of them"
            )
        if text:
            image.captions.append(Caption(number, text))
        else:
            skipped.append(Skip("empty_caption", file, f"{where}: 'caption' is empty", split, captions=1))
    return CaptionSource(list(images.values()), skipped, notes if notes is not None else [])


@lru_cache(maxsize=1024)
def find_columns(names: tuple[str, ...], word: str = "column") -> dict[str, int]:
    """Positions of the columns `image`, `caption` and, where there is one, `split`.

    Args:
        names: Names of all columns.
        word: What a name is called in the message.

    Raises:
        AmpError: Image or caption is missing, or several columns could be it. The message names no file.
    """
    folded = [re.sub(r"[\s_-]+", "", name).casefold() for name in names]
    columns = {}
    for column, aliases in ALIASES.items():
        # The name itself, then the name in another case, then its other names: the first that occurs.
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
    """`caption from 'title'` for each column that has another name, for the user."""
    return [f"{column} from {names[i]!r}" for column, i in columns.items() if names[i].casefold() != column]
