"""Readers of captions files. Every format is read into the same list of images with captions.

Each format has one module with a reader function, and is registered below. Other packages register formats in the same
way (`amp.plugins`).

A file that violates its format (a missing key, a truncated line) raises an error at once, because its content can't be
trusted. A gap in the data (an empty caption, an image listed twice) is recorded as a `Skip`; the caller decides how
many are acceptable.
"""

from amp.data.captions.base import (
    Caption,
    CaptionedImage,
    CaptionSource,
    Skip,
    register_captions_format,
)
from amp.data.captions.by_content import read_json, read_txt
from amp.data.captions.caption_list import read_list
from amp.data.captions.coco import read_coco
from amp.data.captions.csv_table import read_csv
from amp.data.captions.hub_dataset import read_dataset
from amp.data.captions.jsonl_table import read_jsonl
from amp.data.captions.karpathy import read_karpathy
from amp.data.captions.load import load_captions
from amp.data.captions.parquet_table import read_parquet
from amp.data.captions.rows import read_rows
from amp.data.captions.splits import SplitNames
from amp.data.captions.text_file import text_lines
from amp.data.captions.token_file import read_token

register_captions_format("karpathy", (), read_karpathy)
register_captions_format("csv", (".csv", ".tsv"), read_csv)
register_captions_format("jsonl", (".jsonl", ".ndjson"), read_jsonl)
register_captions_format("coco", (), read_coco)
register_captions_format("list", (), read_list)
register_captions_format("token", (".token",), read_token)
register_captions_format("parquet", (".parquet",), read_parquet)
register_captions_format("datasets", (), read_dataset)
register_captions_format("json", (".json",), read_json)
register_captions_format("txt", (".txt",), read_txt)

__all__ = [
    "Caption",
    "CaptionSource",
    "CaptionedImage",
    "Skip",
    "SplitNames",
    "load_captions",
    "read_rows",
    "register_captions_format",
    "text_lines",
]
