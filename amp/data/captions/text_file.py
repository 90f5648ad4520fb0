"""Reads text and JSONL files in several encodings, also compressed with gzip.

Error messages name the type of files that aren't text.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from amp.errors import AmpError, shorten
from amp.json_text import parse_json

MAX_LINE = 64 << 20
"""Maximum bytes of a line, and characters in UTF-16. A line is in memory as a whole."""
MAX_TEXT_BYTES = 4 << 30
"""Maximum bytes of a file that is read as a whole, such as JSON. A small gzip file can unpack to any size."""

_GZIP = b"\x1f\x8b"
_FOREIGN = (
    (b"PK\x03\x04", "a ZIP archive or a spreadsheet; unpack it, or save the sheet as 'CSV UTF-8'"),
    (b"\xd0\xcf\x11\xe0", "an old Excel file; save the sheet as 'CSV UTF-8'"),
    (b"PAR1", "a Parquet file; name it .parquet, or give --format parquet"),
    (b"ARROW1", "an Arrow file; write it as Parquet, CSV or JSONL"),
    (_GZIP, "compressed with gzip twice; unpack it"),
    (b"BZh", "compressed with bzip2; unpack it"),
    (b"\xfd7zXZ", "compressed with xz; unpack it"),
    (b"SQLite format 3", "an SQLite database; write the table as CSV or JSONL"),
    (b"<!doctype html", "a web page; download the file itself"),
    (b"<html", "a web page; download the file itself"),
)


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields each line with its 1-based number. Lines keep their line ending.

    The text is UTF-8, or UTF-16 (Excel's "Unicode text"). Lines end with "\\n" or "\\r\\n", or all lines with "\\r".
    A gzip file is unpacked while it is read.

    Raises:
        AmpError: The file can't be read, or isn't text.
    """
    number = 0
    try:
        with _open_plain(path) as file:
            head = file.peek()
            encoding = _encoding(path, head)
            start = head.decode(encoding, "ignore")
            if encoding.startswith("utf-16") or ("\r" in start and "\n" not in start):
                end = "\r" if "\n" not in start else "\n"
                with io.TextIOWrapper(file, encoding, newline=end) as lines:
                    for number, text in enumerate(iter(lambda: lines.readline(MAX_LINE), ""), start=1):
                        _check_line(path, number, len(text))
                        yield number, text
                return
            # Split bytes rather than text, because a JSON string may contain Unicode line separators.
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), start=1):
                _check_line(path, number, len(line))
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        place = f" line {number}" if number else ""
        raise _not_text(f"{path}{place}", error) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, error) from None
    except OSError as error:
        raise _cannot_open(path, error) from None


def read_text(path: Path) -> str:
    """Reads a whole text file, in the same encodings as `text_lines`."""
    try:
        with _open_plain(path) as file:
            content = bytearray()
            while (block := file.read(1 << 20)) and len(content) <= MAX_TEXT_BYTES:
                content += block
        if len(content) > MAX_TEXT_BYTES:
            raise AmpError(
                f"{path}: more than {MAX_TEXT_BYTES:,} bytes of text; expected at most that, since JSON is read as a "
                "whole; write it as JSONL, with one object per line"
            )
        return content.decode(_encoding(path, bytes(content[:512])))
    except UnicodeDecodeError as error:
        raise _not_text(str(path), error) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, error) from None
    except OSError as error:
        raise _cannot_open(path, error) from None


def jsonl_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the line number and the object of each line that isn't blank.

    Raises:
        AmpError: See `text_lines`; or a line is not a JSON object.
    """
    for number, line in text_lines(path):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            raise AmpError(
                f"{path} line {number}: not valid JSON ({json_problem(error)[1]}); line seen: "
                f"{shorten(line.strip())}; expected one object per line; correct or remove it"
            ) from None
        if not isinstance(value, dict):
            raise AmpError(f"{path} line {number}: {shorten(value)}; expected a JSON object; correct or remove it")
        yield number, value


def json_problem(error: ValueError) -> tuple[str, str]:
    """Place (" line N", or "" if unknown) and reason of a JSON error."""
    if isinstance(error, json.JSONDecodeError):
        return f" line {error.lineno}", f"{error.msg}, column {error.colno}"
    return "", str(error)


def inner_suffix(path: Path) -> str:
    """The suffix in lower case; that below `.gz`, if there is one."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix == ".gz" else suffix


@contextmanager
def _open_plain(path: Path) -> Iterator[io.BufferedReader[Any]]:
    """Opens a file for reading. A gzip file, by its first bytes, is unpacked while it is read."""
    with open(path, "rb") as file:
        if file.peek()[:2] != _GZIP:  # peek leaves the bytes in place; seeking back is impossible in a pipe
            yield file
            return
        # The buffer makes reading lines several times as fast.
        with gzip.GzipFile(fileobj=file) as unpacked, io.BufferedReader(cast(io.RawIOBase, unpacked), 1 << 16) as lines:
            yield lines


def _check_line(path: Path, number: int, length: int) -> None:
    if length >= MAX_LINE:
        raise AmpError(
            f"{path} line {number}: {MAX_LINE:,} bytes or more; expected one caption or object per line; check the "
            "file and --format"
        )


def _damaged(path: Path, error: Exception) -> AmpError:
    return AmpError(
        f"{path}: the gzip file is cut short or damaged ({error}); expected a complete file; copy or download it again"
    )


def _encoding(path: Path, head: bytes) -> str:
    """The encoding of a text file, by its first bytes. Raises AmpError for other known file types."""
    for start, what in _FOREIGN:
        if head[:20].lower().startswith(start.lower()):
            raise AmpError(f"{path}: this is {what}; expected a text file")
    if head[257:262] == b"ustar":
        raise AmpError(
            f"{path}: this is a tar archive; expected a captions file; give an uncompressed WebDataset shard called "
            "NAME.tar to amp make_shards --captions NAME.tar or amp index_shards; unpack another archive (photos into "
            "the folder of --images) and write its captions as CSV or JSONL"
        )
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    # UTF-16 without a byte order mark: UTF-8 text has no NUL among its first two bytes.
    return "utf-16-le" if head[1:2] == b"\0" else "utf-16-be" if head[:1] == b"\0" else "utf-8-sig"


def _not_text(where: str, error: UnicodeDecodeError) -> AmpError:
    return AmpError(
        f"{where}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8 (Excel: 'CSV UTF-8')"
    )


def _cannot_open(path: Path, error: OSError) -> AmpError:
    return AmpError(f"{path}: can't be read ({error.strerror}); expected a readable file; check the path")
