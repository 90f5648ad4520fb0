"""Reads Parquet files: the columns are image, caption (a string or a list of strings) and optionally split."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amp.data.captions.arrow_table import BATCH_ROWS, ArrowTable, damaged, read_tables
from amp.data.captions.base import CaptionSource
from amp.data.captions.splits import SplitNames
from amp.errors import require


def read_parquet(path: Path, splits: SplitNames) -> CaptionSource:
    """See `amp.data.captions.base.Reader`."""
    pyarrow = require("pyarrow", "a Parquet file", "write it as CSV or JSONL")
    parquet = require("pyarrow.parquet", "a Parquet file")

    def batches(columns: list[str]) -> Iterator[Any]:
        with parquet.ParquetFile(path) as file:
            yield from file.iter_batches(BATCH_ROWS, columns=columns)  # in this order

    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
    except (pyarrow.ArrowException, OSError) as error:
        raise damaged(path, error) from None
    return read_tables(path, [ArrowTable("row {}", schema, batches)], splits)
