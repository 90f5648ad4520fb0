"""Reads CSV files with any common separator.

The separator is the one with which the header contains an image and a caption column. So captions may be full of
commas, and no option is needed.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amp.data.captions.base import CaptionSource
from amp.data.captions.rows import find_columns, read_rows, renamed_columns
from amp.data.captions.splits import SplitNames
from amp.data.captions.text_file import inner_suffix, text_lines
from amp.data.captions.token_file import TOKEN_LINE
from amp.errors import AmpError, printable, shorten

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "'|'"}


def read_csv(path: Path, splits: SplitNames) -> CaptionSource:
    """See `amp.data.captions.base.Reader`. Excel's first line `sep=;` sets the separator."""
    return table(path, text_lines(path), splits)


def table(path: Path, lines: Iterator[tuple[int, str]], splits: SplitNames) -> CaptionSource:
    """Reads the numbered lines of a CSV file."""
    notes: list[str] = []
    return read_rows(path, _rows(path, lines, notes), splits, notes)


def _rows(path: Path, lines: Iterator[tuple[int, str]], notes: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the number of each row's first line, and the row's image, caption and split.

    Rows without any text are ignored. If a row ends before its image or caption, the value is None. A line for the user
    is appended to `notes` if the separator or the columns are unusual.
    """
    separators = tuple(_SEPARATORS)
    for above, line in lines:  # noqa: B007, the header's line
        declared = re.fullmatch(r'"?sep=([,;\t|])"?[,;]*', line.strip("\r\n"), re.IGNORECASE)
        if declared:
            separators = (declared[1],)
        elif line.strip():
            break
    else:
        raise AmpError(f"{path}: empty; expected a header with the columns image and caption; check the file")
    separator, names, columns = _read_header(f"{path} line {above}", line, separators)
    called = _SEPARATORS[separator]
    renamed = renamed_columns(tuple(names), columns)
    unread = [printable(name) for i, name in enumerate(names) if name and i not in columns.values()]
    seen = []
    if renamed or separator != ("\t" if inner_suffix(path) == ".tsv" else ","):
        seen.append(", ".join([f"columns separated by {called}", *renamed]))
    if unread:  # such as caption_2
        seen.append(f"columns not read: {', '.join(unread)}")
    if seen:
        notes.append(f"{path}: {'; '.join(seen)}")

    width = max(i for i, name in enumerate(names) if name) + 1
    # Text in a column without a name is the rest of a caption that contains the separator. Only the first column may
    # have no name: pandas writes row numbers there.
    unnamed = {i for i, name in enumerate(names) if i and not name}
    needed = max(columns["image"], columns["caption"])
    # strict: without it, a stray quote would make one row of the rest of the file. In files with '|', a space follows
    # each separator and quotes are part of the text. In other files, a quote after a space starts a quoted field.
    reader = csv.reader(
        (line for _, line in lines), delimiter=separator, strict=True, skipinitialspace=separator != "|"
    )
    number = above + 1
    try:
        for fields in reader:
            filled = [i for i, field in enumerate(fields) if field.strip()]
            if filled:
                if filled[-1] >= width or needed < len(fields) < width or not unnamed.isdisjoint(filled):
                    raise AmpError(
                        f"{path} line {number}: {len(fields)} fields, {shorten(fields)}; expected {width} "
                        f"({', '.join(names[:width])}) separated by {called}; put quotes around a caption that "
                        "contains the separator"
                    )
                yield number, {column: fields[i] if i < len(fields) else None for column, i in columns.items()}
            number = above + reader.line_num + 1
    except csv.Error as error:
        raise AmpError(
            f"{path} line {number}: not valid CSV ({error}); expected a quote inside a quoted field to be doubled; "
            "correct the line"
        ) from None


def _read_header(where: str, line: str, separators: tuple[str, ...]) -> tuple[str, list[str], dict[str, int]]:
    """Finds the separator with which a line is a header; returns it, the column names, and the used columns."""
    failed = []
    for separator in separators:
        try:
            row = next(csv.reader([line], delimiter=separator, skipinitialspace=True))
        except csv.Error as error:
            raise AmpError(f"{where}: not valid CSV ({error}); expected a header; correct the line") from None
        names = [name.strip() for name in row]
        try:
            return separator, names, find_columns(tuple(names))
        except AmpError as error:
            failed.append((len(names), separator, names, str(error)))
    count, separator, names, reason = max(failed, key=lambda reading: reading[0])
    if TOKEN_LINE.match(line):
        raise AmpError(
            f"{where}: {shorten(line.strip())} is a line of Flickr's token file (IMAGE#NUMBER, tab, caption); expected "
            "a header; give --format token"
        )
    if line.lstrip().startswith(("{", "[")):
        raise AmpError(
            f"{where}: {shorten(line.strip())} is JSON, not a header; give --format jsonl (one object per line) or "
            "--format json"
        )
    if any(re.search(r"\.(jpe?g|png|webp|gif|bmp|tiff?)$", name, re.IGNORECASE) for name in names):
        raise AmpError(
            f"{where}: {shorten(line.strip())} names an image, so the header is missing; expected the columns' names, "
            f"such as image{separator}caption; write them as the first line"
        )
    seen = "one column" if count == 1 else f"{count} columns separated by {_SEPARATORS[separator]}"
    raise AmpError(f"{where}: the header has {seen}; {reason}") from None
