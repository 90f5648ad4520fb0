"""Chooses the format of `.json` and `.txt` files by their content."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from amp.data.captions.base import CaptionSource
from amp.data.captions.caption_list import list_source
from amp.data.captions.coco import coco_source
from amp.data.captions.csv_table import table
from amp.data.captions.json_file import other_shape, parse_any
from amp.data.captions.karpathy import karpathy_source
from amp.data.captions.splits import SplitNames
from amp.data.captions.text_file import text_lines
from amp.data.captions.token_file import TOKEN_LINE, tokens


def read_json(path: Path, splits: SplitNames) -> CaptionSource:
    """Reads a list of captions, COCO's annotations, or a Karpathy file. See `amp.data.captions.base.Reader`."""
    content = parse_any(path)
    if isinstance(content, list):
        return list_source(content, path, splits)
    if isinstance(content, dict) and "annotations" in content:
        return coco_source(content, path, splits)
    if isinstance(content, dict) and "images" in content:
        return karpathy_source(content, path, splits)
    raise other_shape(content, path)


def read_txt(path: Path, splits: SplitNames) -> CaptionSource:
    """Reads a token file or a CSV file. See `amp.data.captions.base.Reader`."""
    lines = text_lines(path)
    start = []
    for numbered in lines:
        start.append(numbered)
        if numbered[1].strip():
            break
    read = tokens if start and TOKEN_LINE.match(start[-1][1]) else table
    return read(path, chain(start, lines), splits)
