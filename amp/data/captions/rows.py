"""Reads tables with one or several captions per row: finds the columns by name, and groups the rows by image."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from amp.data.captions.base import Caption, CaptionedImage, CaptionSource, Skip, cell, image_path, is_empty
from amp.data.captions.splits import SplitNames
from amp.data.images.names import composed
from amp.errors import AmpError, shorten
from amp.json_text import check_id

ALIASES = {
    "image": ("filepath", "filename", "file", "imagename", "imagepath", "imagefile", "path", "img", "imgpath", "photo"),
    "caption": ("title", "text", "comment", "sentence", "description", "raw", "captions"),
    "split": (),
}
"""Other accepted column names. Case, spaces, "_" and "-" are ignored."""

_LIST = re.compile(r"""\[\s*(["']).*\1\s*\]""", re.DOTALL)


def read_rows(
    path: Path,
    rows: Iterable[tuple[int | str, dict[str, Any]]],
    splits: SplitNames,
    notes: list[str] | None = None,
    place: str = "line {}",
    by_content: Container[str] = (),
) -> CaptionSource:
    """Groups the rows of a table by image. Each row of an image has one or several of its captions.

    Args:
        path: The file, for messages.
        rows: Line number or place of each row, and its `image`, `caption` (a text or a list of texts) and optionally
            `split` and `image_id`.
        splits: Names of the splits.
        notes: Lines for the user. `rows` may append to it while it is read.
        place: How messages name a row, with `{}` for its number or place.
        by_content: Images whose path is a hash of their content. If one is in two splits, its rows in the second split
            are skipped: nobody chose its name, so nobody could correct it.

    Raises:
        AmpError: A value can't be used, or an image has two splits or ids.
    """
    images: dict[str, CaptionedImage] = {}
    skipped: list[Skip] = []
    first_line: dict[str, int | str] = {}
    number = 0  # of the next caption; empty captions count
    for line, row in rows:
        where = f"{path} {place.format(line)}"
        file = cell(row["image"], f"{where}: 'image'")
        texts = _texts(row["caption"], where)
        for text in texts.values():
            if _LIST.fullmatch(text):
                raise AmpError(
                    f"{where}: the caption is {shorten(text)}, a list; expected text; write one row per caption"
                )
        numbers = range(number, number + len(texts))
        number = numbers.stop
        split = row.get("split")
        split = splits.default if is_empty(split) else splits.normal(split, where)
        if not file:
            reason = f"{where}: 'image' is empty"
            skipped.append(Skip("caption_without_image", "", reason, split, captions=len(texts)))
            continue
        file = image_path(file, where)
        image_id = row.get("image_id", file)
        check_id(image_id, f"{where}: 'image_id'", "correct it")
        image = images.setdefault(composed(file), CaptionedImage(file, file, image_id, split))
        first = first_line.setdefault(image.path, line)
        if image.split != split and file in by_content:
            reason = f"{where}: {place.format(first)} has the same photo in split {image.split!r} and was kept"
            skipped.append(Skip("duplicate_key", file, reason, split, captions=len(texts)))
            continue
        if image.split != split:
            raise AmpError(
                f"{where}: 'split' is {split!r}, but {place.format(first)} puts the same image in {image.split!r}; "
                "expected one split per image; correct one of them"
            )
        if "image_id" in row and image.id != image_id:
            raise AmpError(
                f"{where}: 'image_id' is {shorten(image_id)}, but {place.format(first)} has {shorten(image.id)} for "
                "the same image; expected one per image; correct one of them"
            )
        for caption_id, (name, text) in zip(numbers, texts.items(), strict=True):
            if text:
                image.captions.append(Caption(caption_id, text))
            else:
                skipped.append(Skip("empty_caption", file, f"{where}: {name} is empty", split, captions=1))
    return CaptionSource(list(images.values()), skipped, notes if notes is not None else [])


def _texts(caption: Any, where: str) -> dict[str, str]:
    """The texts of a row's caption or list of captions, by their names in messages."""
    named = {"'caption'": caption}
    if isinstance(caption, list):
        named = {f"'caption'[{i}]": value for i, value in enumerate(caption)}
    return {name: cell(value, f"{where}: {name}") for name, value in named.items()}


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
