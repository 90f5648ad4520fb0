"""Parses a captions file that is one JSON text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amp.data.captions.text_file import json_problem, read_text
from amp.errors import AmpError, shorten
from amp.json_text import parse_json, seen_keys

JSON_SHAPES = (
    "a Karpathy file ({'images': [{'filename', 'split', 'sentences'}, ...]}), COCO's annotations ({'images': [...], "
    "'annotations': [...]}) or a list ([{'image', 'caption'}, ...])"
)


def parse_file(path: Path, kind: type[dict] | type[list]) -> Any:
    """Parses a JSON file whose content is an object or a list.

    Raises:
        AmpError: The content is of another kind, or not JSON. The message says which format the file seems to have.
    """
    content = parse_any(path)
    if not isinstance(content, kind):
        raise other_shape(content, path)
    return content


def other_shape(content: Any, path: Path) -> AmpError:
    """The error for content that is valid JSON, but not of the expected shape."""
    if isinstance(content, dict):
        seen = f"an object with the keys {seen_keys(content)}"
    else:
        seen = f"a list of {len(content)} values" if isinstance(content, list) else shorten(content)
    return AmpError(f"{path}: {seen}; expected {JSON_SHAPES}; check the file and --format")


def parse_any(path: Path) -> Any:
    """Parses a JSON file. For other formats, the error says which format the file seems to have."""
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        place, reason = json_problem(error)
        first = text.lstrip().partition("\n")[0]
        if not first.startswith(("{", "[")):
            advice = f"the file starts with {shorten(first)}; if it is a table, give --format csv"
        elif reason.startswith("Extra data"):
            advice = "if it has one object per line, give --format jsonl"
        else:
            advice = "download it again, or name another format with --format"
        raise AmpError(f"{path}{place}: not valid JSON ({reason}); expected {JSON_SHAPES}; {advice}") from None
