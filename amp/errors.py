"""Errors that a user can mend: one class, so that a command line shows them as one line instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


def shorten(value: object, limit: int = 80) -> str:
    """``repr(value)`` on one line, cut to ``limit`` characters: how a message shows the value that was seen."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
