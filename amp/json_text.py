"""JSON that others wrote."""

import json
from typing import Any

DEEPEST = 100
"""Most levels of lists and objects within each other that are read. Python's own limit is higher, but differs between
its versions and between reading and writing."""


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: Not JSON, nested too deeply, or a number of thousands of digits.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(DEEPEST + 1):
        parts = (part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list))
        level = [child for part in parts for child in part if isinstance(child, dict | list)]
        if not level:
            return value
    raise ValueError("nested too deeply")
