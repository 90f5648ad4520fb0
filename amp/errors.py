"""Errors that a user can mend: one class, so that a command line shows them as one line instead of a traceback."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_HIDDEN = "***"
_WORD = r"(?:token|secret|password|passwd)"  # also words of captions, and endings of file names
_KEY = r"(?:api[_-]?key|secret[_-]?key|(?:access|auth|api|client|session|refresh|hf)[_-](?:token|secret|key))"
_SECRET = rf"(?:{_KEY}|{_WORD})"
_VALUE = r"[\"']?(?P<value>[^\s\"',}\])]+)"
_SECRETS = (
    re.compile(r"(?<=://)[^/\s@]+(?=@)"),  # NAME:PASSWORD of an address
    re.compile(rf"(?i)(?<![\w.-])--[\w.-]*{_SECRET}[ =]+(?P<value>[^\s-]\S*)"),
    re.compile(rf"(?i){_KEY}[\"']?\s*[=:]\s*{_VALUE}"),
    re.compile(rf"(?i)(?<![\w./\\-])[\w-]*{_WORD}[\"']?\s*=\s*{_VALUE}"),
    re.compile(rf"(?i)[\"'][\w-]*{_WORD}[\"']\s*:\s*{_VALUE}"),  # JSON
    re.compile(rf"(?i)\{{\s*[\w-]*{_WORD}\s*:\s*{_VALUE}"),  # YAML on one line
    re.compile(rf"(?i)authorization[\"']?\s*[=:]\s*[\"']?(?:(?:basic|bearer|token)\s+)?{_VALUE}"),
    # Of a request's head; "Basic training" in a caption is none.
    re.compile(r"\b(?:Basic|Bearer) (?=[\w+/.~-]*(?:[\d=]|[a-z][A-Z]))(?P<value>[\w+/=.~-]{8,})"),
    re.compile(r"\b(?:sk-|github_pat_|ghp_)[\w-]{12,}"),  # keys that can be told by their beginning
    re.compile(r"\bhf_(?=[a-z]*[A-Z\d])[A-Za-z\d]{12,}(?![\w-]|\.\w)"),  # unlike hf_captions.csv
)
_SECRETS_OUTSIDE = (
    re.compile(rf"(?i)(?<![./\\]){_WORD}\s*:\s*{_VALUE}"),  # YAML and heads of requests
    re.compile(r"\b(?:Basic|Bearer) (?P<value>[\w+/=.~-]{8,})"),
)


class AmpError(ValueError):
    """Wrong input. The message names the file, the key, the value seen, the value expected and the next step."""


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn an :class:`AmpError` raised inside into one line on stderr and exit status 2.

    Anything else is a defect of the program (or of the machine) and keeps its traceback.
    """
    try:
        yield
    except AmpError as error:
        message = str(error)
        if "Original Traceback" in message:  # from a DataLoader's worker, which passes it on below a traceback
            message = message.rstrip().splitlines()[-1].partition(": ")[2]
        print(f"error: {printable(without_secrets(message, outside=False))}", file=sys.stderr)
        raise SystemExit(2) from None


def shorten(value: object, limit: int = 80) -> str:
    """``repr(value)`` on one line, cut to ``limit`` characters: how a message shows the value that was seen."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # lists in lists in lists; a number of thousands of digits
        text = f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def printable(text: str) -> str:
    """One line without control characters: those in file names and captions could move the cursor, change what was
    printed before, or reverse the order of letters; each is shown as its escape."""
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else _escape(c) for c in text)


def without_secrets(text: str, outside: bool = True) -> str:
    """The text with passwords in addresses, and what is named or looks like a key, replaced by ``***``.

    Args:
        text: Any text.
        outside: Whether it repeats a command line, a configuration or a server's answer. Messages of our own may quote
            captions and file names, in which "password: a word" and "results.token: not found" are no secrets.
    """
    for pattern in (*_SECRETS, *(_SECRETS_OUTSIDE if outside else ())):
        text = pattern.sub(_hide, text)
    return text


def public_command(command: Sequence[str]) -> list[str]:
    """A command line fit to be kept in a file beside the data: without secrets."""
    after_secret = [False, *(bool(re.fullmatch(rf"(?i)--[\w.-]*{_SECRET}", part)) for part in command)]
    return [_HIDDEN if hide else without_secrets(part) for part, hide in zip(command, after_secret, strict=False)]


def _hide(match: re.Match) -> str:
    if "value" not in match.re.groupindex:
        return _HIDDEN
    return match[0].removesuffix(match["value"]) + _HIDDEN


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
