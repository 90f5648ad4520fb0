"""Errors that a user can mend: one class, so that a command line shows them as one line instead of a traceback."""

from __future__ import annotations

import math
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_HIDDEN = "***"
_SECRET = r"(?:api[_-]?key|access[_-]?token|auth[_-]?token|token|secret|password|passwd)"
_SECRETS = (
    re.compile(r"(?<=://)[^/\s@]+(?=@)"),  # NAME:PASSWORD of an address
    re.compile(rf"(?i)(?<![\w.-])--[\w.-]*{_SECRET}(?:[ =]+)(?P<value>[^\s-]\S*)"),
    re.compile(rf"(?i){_SECRET}[\"']?\s*[=:]\s*[\"']?(?P<value>[^\s\"',}}\])]+)"),
    re.compile(r"\b(?:Basic|Bearer) (?P<value>[\w+/=.~-]{8,})"),  # of a request's head
    re.compile(r"\b(?:sk-|hf_|github_pat_|ghp_)[\w-]{12,}"),  # keys that can be told by their beginning
)


class AmpError(ValueError):
    """Wrong input. The message names the file, the key, the value seen, the value expected and the next step.

    Attributes:
        messages: Those of `Problems`, where several are said at once.
    """

    messages: tuple[str, ...] = ()


class Problems:
    """Errors of several inputs, so that one message names all of them instead of the first.

    Attributes:
        found: The messages so far.
    """

    SHOWN = 10

    def __init__(self) -> None:
        self.found: list[str] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keeps an :class:`AmpError` raised inside instead of letting it pass."""
        try:
            yield
        except AmpError as error:
            self.found += error.messages or [str(error)]

    def check(self) -> None:
        """Raises AmpError with all messages, if there is any."""
        if len(self.found) == 1:
            raise AmpError(self.found[0])
        if self.found:
            more = len(self.found) - self.SHOWN
            listed = "; ".join(f"({n}) {text}" for n, text in enumerate(self.found[: self.SHOWN], start=1))
            error = AmpError(f"{len(self.found)} errors: {listed}{f'; and {more} more' if more > 0 else ''}")
            error.messages = tuple(self.found)
            raise error


def too_many_skipped(
    where: object, lost: dict[str, tuple[int, int]], option: str, allowed: float, reasons: Sequence[str], note: str = ""
) -> str | None:
    """What to say if more is skipped than an option allows; None if it is not.

    Args:
        where: File or folder that the skipped entries belong to.
        lost: How many are skipped, and of how many, by what they are called, such as ``entries``.
        option: Name of the option, such as ``--max_skipped``.
        allowed: Its value, the largest fraction of each that may be skipped.
        reasons: Why, one text per skipped entry. The first three are shown.
        note: A clause after the counts, such as what was not written.
    """
    shares = {what: count / total if total else 0.0 for what, (count, total) in lost.items()}
    worst = max(shares.values())
    if worst <= allowed:
        return None
    counts = " and ".join(f"{n:,} of {of:,} {what} ({shares[what]:.2%})" for what, (n, of) in lost.items() if n)
    allow = f", or allow it with {option} {math.ceil(worst * 100) / 100:g}" if worst < 1 else ""
    clauses = [
        f"{where}: {counts} can't be used, above {option} {allowed:g}",
        note,
        f"first: {'; '.join(reasons[:3])}",
        f"correct the input{allow}",
    ]
    return "; ".join(clause for clause in clauses if clause)


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
        print(f"error: {printable(without_secrets(message))}", file=sys.stderr)
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


def without_secrets(text: str) -> str:
    """The text with passwords in addresses, and what is named or looks like a key, replaced by ``***``."""
    for pattern in _SECRETS:
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
