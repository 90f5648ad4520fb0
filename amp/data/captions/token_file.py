"""Reads the token files of Flickr8k and Flickr30k: `IMAGE#NUMBER`, a tab, the caption."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amp.data.captions.base import CaptionSource
from amp.data.captions.rows import read_rows
from amp.data.captions.splits import SplitNames
from amp.data.captions.text_file import text_lines
from amp.errors import AmpError, shorten

TOKEN_LINE = re.compile(r"([^\t]+)#([0-9]+)\t")


def read_token(path: Path, splits: SplitNames) -> CaptionSource:
    """See `amp.data.captions.base.Reader`."""
    return tokens(path, text_lines(path), splits)


def tokens(path: Path, lines: Iterator[tuple[int, str]], splits: SplitNames) -> CaptionSource:
    """Reads the numbered lines of a token file. The order of an image's captions is that of the lines."""
    return read_rows(path, _rows(path, lines), splits)


def _rows(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, dict[str, Any]]]:
    first_with: dict[tuple[str, str], int] = {}
    for number, line in lines:
        if not line.strip():
            continue
        found = TOKEN_LINE.match(line)
        if found is None:
            raise AmpError(
                f"{path} line {number}: {shorten(line.strip())}; expected IMAGE#NUMBER, a tab, the caption; correct "
                "the line"
            )
        first = first_with.setdefault((found[1], found[2]), number)
        if first != number:
            raise AmpError(
                f"{path} line {number}: {shorten(found[0].strip())} is also the start of line {first}; expected each "
                "number of an image once; renumber or remove one of the lines"
            )
        yield number, {"image": found[1], "caption": line[found.end() :]}
