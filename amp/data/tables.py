"""Tables of captions: CSV with any usual separator, and JSONL. Columns are found by their names.

The header decides how a CSV file is read: the separator is the one under which the header names an image and a caption
column. Captions may therefore be full of commas, and no option is needed.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from amp.errors import AmpError, printable, shorten
from amp.json_text import parse_json

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "'|'"}

# Other names of the columns. Case, spaces, "_" and "-" don't count.
ALIASES = {
    "image": ("filepath", "filename", "file", "imagename", "imagepath", "imagefile", "path", "img", "imgpath", "photo"),
    "caption": ("title", "text", "comment", "sentence", "description", "raw"),
    "split": (),
}

_FOREIGN = (
    (b"PK\x03\x04", "a ZIP archive or a spreadsheet; unpack it, or save the sheet as 'CSV UTF-8'"),
    (b"\xd0\xcf\x11\xe0", "an old Excel file; save the sheet as 'CSV UTF-8'"),
    (b"PAR1", "a Parquet file; write it as CSV or JSONL (pandas: read_parquet, to_csv)"),
    (b"ARROW1", "an Arrow file; write it as CSV or JSONL"),
    (b"\x1f\x8b", "compressed with gzip; unpack it"),
    (b"BZh", "compressed with bzip2; unpack it"),
    (b"\xfd7zXZ", "compressed with xz; unpack it"),
    (b"SQLite format 3", "an SQLite database; write the table as CSV or JSONL"),
    (b"<!doctype html", "a web page; download the file itself"),
    (b"<html", "a web page; download the file itself"),
)


class SourceFormatError(AmpError):
    """A captions, knowledge or image-list file isn't in its format."""


@lru_cache(maxsize=1024)
def find_columns(names: tuple[str, ...], word: str = "column") -> dict[str, int]:
    """Positions of the columns ``image``, ``caption`` and, where there is one, ``split``.

    Args:
        names: Of all columns.
        word: What a name is called in the message.

    Raises:
        SourceFormatError: Image or caption is missing, or several columns could be it. The message names no file.
    """
    folded = [re.sub(r"[\s_-]+", "", name).casefold() for name in names]
    columns = {}
    for column, aliases in ALIASES.items():
        # As it is, in another case, under another name: the first that occurs.
        spellings = (
            [name == column for name in names],
            [name == column for name in folded],
            [name in aliases for name in folded],
        )
        found = next((places for fits in spellings if (places := [i for i, fit in enumerate(fits) if fit])), [])
        if len(found) > 1:
            raise SourceFormatError(
                f"the {word}s {' and '.join(repr(names[i]) for i in found)} could each hold the {column}; expected "
                f"one; rename the right one to '{column}' and the other to something else"
            )
        if found:
            columns[column] = found[0]
        elif aliases:
            raise SourceFormatError(
                f"{word} '{column}' is missing; {word}s seen: {shorten(', '.join(names))}; expected '{column}' or one "
                f"of {', '.join(aliases)}; rename the {word}"
            )
    return columns


def csv_rows(path: Path, notes: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number (of the row's first line) and the row's image, caption and split.

    Rows without any text don't count. A row that ends before its image or caption has None there.

    Args:
        path: The file. A first line ``sep=;`` (Excel's) names the separator.
        notes: Takes a line for the user where separator or columns are not the usual ones.

    Raises:
        SourceFormatError: No header, too many or too few fields, a stray quote.
    """
    lines = text_lines(path)
    separators = tuple(SEPARATORS)
    for above, line in lines:  # noqa: B007, the header's line
        declared = re.fullmatch(r'"?sep=([,;\t|])"?[,;]*', line.strip("\r\n"), re.IGNORECASE)
        if declared:
            separators = (declared[1],)
        elif line.strip():
            break
    else:
        raise SourceFormatError(f"{path}: empty; expected a header with the columns image and caption; check the file")
    separator, names, columns = _read_header(f"{path} line {above}", line, separators)
    called = SEPARATORS[separator]
    renamed = [f"{column} from {names[i]!r}" for column, i in columns.items() if names[i].casefold() != column]
    unread = [printable(name) for i, name in enumerate(names) if name and i not in columns.values()]
    seen = []
    if renamed or separator != ("\t" if path.suffix.lower() == ".tsv" else ","):
        seen.append(", ".join([f"columns separated by {called}", *renamed]))
    if unread:  # such as caption_2
        seen.append(f"columns not read: {', '.join(unread)}")
    if seen:
        notes.append(f"{path}: {'; '.join(seen)}")

    width = max(i for i, name in enumerate(names) if name) + 1
    # A text in a column without a name is the rest of a caption that holds the separator; the first column is pandas'.
    unnamed = {i for i, name in enumerate(names) if i and not name}
    needed = max(columns["image"], columns["caption"])
    # strict: a stray quote is an error here, not a row that swallows the rest of the file. In files with '|' a space
    # follows each separator and quotes are letters; elsewhere "a.jpg, "A man, running"" is meant as quoted.
    reader = csv.reader(
        (line for _, line in lines), delimiter=separator, strict=True, skipinitialspace=separator != "|"
    )
    number = above + 1
    try:
        for fields in reader:
            filled = [i for i, field in enumerate(fields) if field.strip()]
            if filled:
                if filled[-1] >= width or needed < len(fields) < width or not unnamed.isdisjoint(filled):
                    raise SourceFormatError(
                        f"{path} line {number}: {len(fields)} fields, {shorten(fields)}; expected {width} "
                        f"({', '.join(names[:width])}) separated by {called}; put quotes around a caption that holds "
                        "the separator"
                    )
                yield number, {column: fields[i] if i < len(fields) else None for column, i in columns.items()}
            number = above + reader.line_num + 1
    except csv.Error as error:
        raise SourceFormatError(
            f"{path} line {number}: not valid CSV ({error}); expected a quote inside a quoted field to be doubled; "
            "correct the line"
        ) from None


def _read_header(where: str, line: str, separators: tuple[str, ...]) -> tuple[str, list[str], dict[str, int]]:
    """The separator under which a line is a header, the columns' names, and which of them are used."""
    failed = []
    for separator in separators:
        try:
            row = next(csv.reader([line], delimiter=separator, skipinitialspace=True))
        except csv.Error as error:
            raise SourceFormatError(f"{where}: not valid CSV ({error}); expected a header; correct the line") from None
        names = [name.strip() for name in row]
        try:
            return separator, names, find_columns(tuple(names))
        except SourceFormatError as error:
            failed.append((len(names), separator, names, str(error)))
    count, separator, names, reason = max(failed, key=lambda reading: reading[0])
    if re.match(r"\S+#\d+\t", line):
        raise SourceFormatError(
            f"{where}: {shorten(line.strip())} is a line of Flickr's token file (IMAGE#NUMBER, tab, caption), which "
            "isn't read; expected a header; give the dataset's CSV or Karpathy JSON, or make a table with the header "
            "image,caption of it"
        )
    if line.lstrip().startswith(("{", "[")):
        raise SourceFormatError(
            f"{where}: {shorten(line.strip())} is JSON, not a header; give --format jsonl (one object per line) or "
            "--format karpathy"
        )
    if any(re.search(r"\.(jpe?g|png|webp|gif|bmp|tiff?)$", name, re.IGNORECASE) for name in names):
        raise SourceFormatError(
            f"{where}: {shorten(line.strip())} names an image, so the header is missing; expected the columns' names, "
            f"such as image{separator}caption; write them as the first line"
        )
    seen = "one column" if count == 1 else f"{count} columns separated by {SEPARATORS[separator]}"
    raise SourceFormatError(f"{where}: the header has {seen}; {reason}") from None


def jsonl_rows(path: Path, notes: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and the object's image, caption and split; arguments as of `csv_rows`.

    Raises:
        SourceFormatError: A line that is no object, or an object without image or caption.
    """
    first = True
    for number, content in jsonl_objects(path):
        names = tuple(content)
        try:
            columns = find_columns(names, "key")
        except SourceFormatError as error:
            lists = [key for key, value in content.items() if isinstance(value, list)]
            hint = f" ({lists[0]!r} holds a list; write one object per caption)" if lists else ""
            raise SourceFormatError(f"{path} line {number}: {error}{hint}") from None
        renamed = [f"{column} from {names[i]!r}" for column, i in columns.items() if names[i].casefold() != column]
        if first and renamed:
            notes.append(f"{path}: {', '.join(renamed)}")
        first = False
        yield number, {column: content[names[i]] for column, i in columns.items()}


def jsonl_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object; blank lines don't count."""
    for number, line in text_lines(path):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            raise SourceFormatError(
                f"{path} line {number}: not valid JSON ({json_problem(error)[1]}); line seen: "
                f"{shorten(line.strip())}; expected one object per line; correct or remove it"
            ) from None
        if not isinstance(value, dict):
            raise SourceFormatError(
                f"{path} line {number}: {shorten(value)}; expected a JSON object; correct or remove the line"
            )
        yield number, value


def json_problem(error: ValueError) -> tuple[str, str]:
    """(" line N" where the error knows its place, what is wrong)."""
    if isinstance(error, json.JSONDecodeError):
        return f" line {error.lineno}", f"{error.msg}, column {error.colno}"
    return "", str(error)


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line number, 1-based, and line with its end.

    UTF-8, or UTF-16 (Excel's "Unicode text"). Lines end with "\\n" or "\\r\\n", or all with "\\r".
    """
    number = 0
    try:
        with open(path, "rb") as file:
            head = file.peek()  # not a second look at the file, which may be a pipe
            encoding = _encoding(path, head)
            start = head.decode(encoding, "ignore")
            if encoding.startswith("utf-16") or ("\r" in start and "\n" not in start):
                end = "\r" if "\n" not in start else "\n"
                with io.TextIOWrapper(file, encoding, newline=end) as lines:
                    yield from enumerate(lines, start=1)
                return
            # Bytes are split, not text: Unicode has line separators that may stand inside a JSON string.
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        place = f" line {number}" if number else ""
        raise _not_text(f"{path}{place}", error) from None
    except OSError as error:
        raise _cannot_open(path, error) from None


def read_text(path: Path) -> str:
    """All of a text file, in an encoding that `text_lines` reads."""
    try:
        content = path.read_bytes()
        return content.decode(_encoding(path, content[:512]))
    except UnicodeDecodeError as error:
        raise _not_text(str(path), error) from None
    except OSError as error:
        raise _cannot_open(path, error) from None


def _encoding(path: Path, head: bytes) -> str:
    """The encoding of a text file by its first bytes; refuses files that are no text, by what they are."""
    for start, what in _FOREIGN:
        if head[:20].lower().startswith(start.lower()):
            raise SourceFormatError(f"{path}: this is {what}; expected a text file")
    if head[257:262] == b"ustar":
        raise SourceFormatError(
            f"{path}: this is a tar archive; expected a captions file; unpack it (photos into the folder of --images) "
            "and write its captions as CSV or JSONL"
        )
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    # UTF-16 without its mark: no text begins with NUL, and no table's first letter is followed by one.
    return "utf-16-le" if head[1:2] == b"\0" else "utf-16-be" if head[:1] == b"\0" else "utf-8-sig"


def _not_text(where: str, error: UnicodeDecodeError) -> SourceFormatError:
    return SourceFormatError(
        f"{where}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8 (Excel: 'CSV UTF-8')"
    )


def _cannot_open(path: Path, error: OSError) -> SourceFormatError:
    return SourceFormatError(f"{path}: can't be read ({error.strerror}); expected a readable file; check the path")
