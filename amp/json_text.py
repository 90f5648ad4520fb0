"""JSON that others wrote: parsing it, and checks whose messages name the place, the value seen and what is expected."""

import json
from typing import Any

from amp.errors import AmpError, shorten

DEEPEST = 100
"""Maximum nesting of lists and objects that is read. Python's own limit is higher, but differs between its versions
and between reading and writing."""

_KINDS = {dict: "an object", list: "a list", str: "a string", int: "a whole number", object: "a value"}


def parse_json(text: str | bytes) -> Any:
    """Parses a JSON text.

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


def value_of(content: Any, key: str, kind: type, where: str, hint: str) -> Any:
    """The value of a key, checked to be there and of a type.

    Args:
        content: What should be an object with that key.
        key: Name of the key.
        kind: dict, list, str, int (without booleans), or object for any value.
        where: Start of the message, such as ``"manifest.json: splits.train"``.
        hint: End of the message: the next step.

    Raises:
        AmpError: No object, no such key, or a value of another type.
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
    """A string of valid Unicode; arguments as of `value_of`.

    Raises:
        AmpError: Anything else.
    """
    if not isinstance(value, str):
        raise AmpError(f"{where} is {shorten(value)}; expected a string; {hint}")
    if not is_unicode(value):
        raise AmpError(
            f"{where} is {shorten(value)}, not valid Unicode (a lone surrogate); expected a valid string; {hint}"
        )
    return value


def check_id(value: Any, where: str, hint: str) -> int | str:
    """A whole number or a string of valid Unicode; arguments as of `value_of`.

    Raises:
        AmpError: Anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise AmpError(f"{where} is {shorten(value)}; expected a whole number or a string; {hint}")
    return value if isinstance(value, int) else check_text(value, where, hint)


def is_unicode(text: str) -> bool:
    """Whether `text` can be written as UTF-8. JSON's ``"\\ud800"`` is a string in Python, but no valid Unicode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def seen_keys(content: dict) -> str:
    """The keys of an object, for a message."""
    return shorten(", ".join(map(str, content))) if content else "none"
