"""Parsing and checks of JSON from other tools. Messages name the place, the value seen and the value expected."""

import json
from typing import Any

from amp.errors import AmpError, shorten

DEEPEST = 100
"""Maximum nesting of lists and objects. Python's own limit is higher, but differs between versions and between reading
and writing."""

_KINDS = {dict: "an object", list: "a list", str: "a string", int: "a whole number", object: "a value"}


def parse_json(text: str | bytes) -> Any:
    """Parses a JSON text.

    Raises:
        ValueError: The text is not JSON, nested too deeply, or contains a number with thousands of digits.
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


def value_of(content: Any, key: str, kind: type, where: str, hint: str) -> Any:
    """Returns the value of a key after checking that it exists and has the right type.

    Args:
        content: The object, which may turn out not to be one.
        key: Name of the key.
        kind: Expected type: dict, list, str, int (excluding bool), or object for any value.
        where: Start of the message, such as `"manifest.json: splits.train"`.
        hint: End of the message: the next step.

    Raises:
        AmpError: `content` is not an object, the key is missing, or the value has another type.
    """
    if not isinstance(content, dict):
        raise AmpError(f"{where}: {shorten(content)}; expected an object; {hint}")
    if key not in content:
        raise AmpError(
            f"{where}: key '{key}' is missing; expected {_KINDS[kind]}; keys seen: {seen_keys(content)}; {hint}"
        )
    value = content[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise AmpError(f"{where}: '{key}' is {shorten(value)}; expected {_KINDS[kind]}; {hint}")
    return value


def check_text(value: Any, where: str, hint: str) -> str:
    """Returns the value if it is a string of valid Unicode; arguments as in `value_of`.

    Raises:
        AmpError: The value is anything else.
    """
    if not isinstance(value, str):
        raise AmpError(f"{where} is {shorten(value)}; expected a string; {hint}")
    if not is_unicode(value):
        raise AmpError(
            f"{where} is {shorten(value)}, not valid Unicode (a lone surrogate); expected a valid string; {hint}"
        )
    return value


def check_id(value: Any, where: str, hint: str) -> int | str:
    """Returns the value if it is a whole number or a string of valid Unicode; arguments as in `value_of`.

    Raises:
        AmpError: The value is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise AmpError(f"{where} is {shorten(value)}; expected a whole number or a string; {hint}")
    return value if isinstance(value, int) else check_text(value, where, hint)


def is_unicode(text: str) -> bool:
    """Whether `text` can be written as UTF-8. JSON's `"\\ud800"` is a string in Python, but not valid Unicode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def seen_keys(content: dict) -> str:
    """The keys of an object, for a message."""
    return shorten(", ".join(map(str, content))) if content else "none"
