"""Reads Arrow tables, in which photos are paths or the content of image files. Parquet files and datasets use this."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amp.data.captions.base import CaptionSource
from amp.data.captions.rows import find_columns, read_rows, renamed_columns
from amp.data.captions.splits import SplitNames
from amp.data.images.formats import suffix_of
from amp.errors import AmpError, require

BATCH_ROWS = 64
"""Rows that are in memory at a time, with their photos."""


@dataclass(frozen=True, slots=True)
class ArrowTable:
    """A table that is read in batches of rows.

    Attributes:
        place: How messages name a row, with `{}` for its 0-based number.
        schema: Arrow schema.
        batches: Function from column names to an iterator over batches (`pyarrow.RecordBatch` or `pyarrow.Table`) with
            these columns, in this order.
        split: Split of rows that don't name one; None for the default split.
    """

    place: str
    schema: Any
    batches: Callable[[list[str]], Iterator[Any]]
    split: str | None = None


def read_tables(path: Path, tables: Iterable[ArrowTable], splits: SplitNames) -> CaptionSource:
    """Reads tables, such as the splits of a dataset, into one source.

    The image column contains paths, bytes, or structs `{"bytes", "path"}` (Hugging Face's feature `Image`). Photos
    that are bytes are named by a hash of their content, so rows with the same photo are captions of one image.

    Raises:
        AmpError: A table can't be used.
    """
    tables = list(tables)
    notes: list[str] = []
    columns = [_columns(path, table, notes) for table in tables]
    names: dict[str, str] = {}  # of a photo that is bytes -> its path in the table, or the same name
    rows = (row for table, chosen in zip(tables, columns, strict=True) for row in _rows(path, table, chosen, names))
    source = read_rows(path, rows, splits, notes, place="{}", by_content=names)
    for image in source.images:
        image.name = names.get(image.path, image.name)

    def photos() -> Iterator[tuple[str, bytes]]:
        for table, chosen in zip(tables, columns, strict=True):
            for _, (value,) in _values(path, table, [chosen["image"]]):
                content, _ = _content(value)
                if content:
                    yield _hashed_name(content), content

    if names:
        source.photos = photos
    return source


def _columns(path: Path, table: ArrowTable, notes: list[str]) -> dict[str, str]:
    """The column's name for `image`, `caption` and, if present, `split`."""
    names = tuple(table.schema.names)
    photos = [field.name for field in table.schema if _is_photo(field.type)]
    # The only column of photos is the image column, regardless of its name ("jpg"), unless another one is called so.
    only = photos[0] if len(photos) == 1 and "image" not in names else None
    try:
        found = find_columns(tuple("image" if name == only else name for name in names))
    except AmpError as error:
        raise AmpError(f"{path}: {error}") from None
    said = renamed_columns(names, found)
    if unread := [name for i, name in enumerate(names) if i not in found.values()]:
        said.append(f"columns not read: {', '.join(unread)}")
    note = f"{path}: {', '.join(said)}"
    if said and note not in notes:
        notes.append(note)
    return {column: names[i] for column, i in found.items()}


def _is_photo(kind: Any) -> bool:
    types = require("pyarrow.types", "this captions file")
    return types.is_struct(kind) and any(field.name == "bytes" for field in kind)


def _rows(
    path: Path, table: ArrowTable, columns: dict[str, str], names: dict[str, str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the place and the values of each row; adds photos that are bytes to `names`."""
    for number, values in _values(path, table, list(columns.values())):
        row = dict(zip(columns, values, strict=True))
        content, name = _content(row["image"])
        row["image"] = name
        if content:
            row["image"] = _hashed_name(content)
            names.setdefault(row["image"], name or row["image"])
        if table.split is not None and not row.get("split"):
            row["split"] = table.split
        yield table.place.format(number), row


def _values(path: Path, table: ArrowTable, columns: list[str]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Yields the number of each row and its values in these columns."""
    pyarrow = require("pyarrow", "this captions file")
    number = 0
    try:
        for batch in table.batches(columns):
            lists = [column.to_pylist() for column in batch.columns]
            for values in zip(*lists, strict=True):
                yield number, values
                number += 1
    except UnicodeDecodeError as error:
        raise AmpError(
            f"{path} {table.place.format(number)} or one of the next {BATCH_ROWS - 1}: not UTF-8 ({error.reason}); "
            "expected text; write the file again with valid strings"
        ) from None
    except (pyarrow.ArrowException, OSError) as error:
        raise damaged(path, error, table.place.format(number)) from None


def damaged(path: Path, error: Exception, place: str = "") -> AmpError:
    """The error for a table that can't be read."""
    reason = " ".join(str(error).split())
    return AmpError(
        f"{path}{' ' if place else ''}{place}: can't be read ({reason}); expected a complete table; copy or download "
        "it again"
    )


def _content(value: Any) -> tuple[bytes | None, Any]:
    """Content of an image file, if a cell has it, and the rest: the path, or None."""
    if isinstance(value, bytes):
        return value, None
    if isinstance(value, dict) and "bytes" in value:
        content = value["bytes"]
        return content, value.get("path") if content != b"" else None
    return None, value


def _hashed_name(content: bytes) -> str:
    # Content that is no known kind of image is skipped when it is read, with the reason.
    return hashlib.sha256(content).hexdigest()[:32] + (suffix_of(content) or ".jpg")
