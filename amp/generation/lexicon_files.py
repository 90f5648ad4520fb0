"""Reads the YAML files of words and sentences that the rules use."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C, which is ten times as fast, if PyYAML has it


@cache
def read_lexicon(name: str) -> dict[str, Any]:
    """Content of the file `name` next to this module. Do not change it, because it is cached."""
    return yaml.load(Path(__file__).with_name(name).read_text(encoding="utf-8"), _LOADER)  # noqa: S506, both are safe
