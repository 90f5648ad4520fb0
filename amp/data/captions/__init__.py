"""Captions files of every format, all read to the same list of images with their captions.

Each format is one file with a function that reads it, and one line below. Formats of other packages register the same
way (`amp.plugins`).

Two kinds of trouble are kept apart. A file that isn't in its format (a missing key, a cut line) is an error at once,
since nothing read from it can be trusted. A gap in the data (an empty caption, an image listed twice) is recorded as
`Skip`, counted, and judged by the caller.
"""

from amp.data.captions.base import (
    Caption,
    CaptionedImage,
    CaptionSource,
    Skip,
    register_captions_format,
)
from amp.data.captions.csv_table import read_csv
from amp.data.captions.jsonl_table import read_jsonl
from amp.data.captions.karpathy import read_karpathy
from amp.data.captions.load import load_captions
from amp.data.captions.rows import read_rows
from amp.data.captions.splits import SplitNames
from amp.data.captions.text_file import text_lines

register_captions_format("karpathy", (".json",), read_karpathy)
register_captions_format("csv", (".csv", ".tsv", ".txt", ".token"), read_csv)
register_captions_format("jsonl", (".jsonl", ".ndjson"), read_jsonl)

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
