"""Reads the queries of a search: typed one after the other on a terminal, or one per line from a pipe."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain

from amp.errors import AmpError

PROMPT = "query: "


def read_queries(example: str) -> Iterator[str]:
    """Yields the queries on standard input.

    On a terminal they are typed with the editing and history of readline. An empty line or Ctrl-D ends them. In a pipe
    or file, empty lines are skipped.

    Args:
        example: Command that gives a query, for the error message.

    Raises:
        AmpError: Standard input is closed, or contains no query.
    """
    if on_terminal():
        return _typed()
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="backslashreplace")  # bytes that are no text
    queries = (line.strip() for line in sys.stdin or () if line.strip())
    first = next(queries, None)
    if first is None:
        raise AmpError(
            f"no query, and standard input contains none, expected one query per line; for example {example}"
        )
    return chain([first], queries)


def on_terminal() -> bool:
    """Whether queries are typed."""
    return sys.stdin is not None and sys.stdin.isatty()


def _typed() -> Iterator[str]:
    with suppress(ImportError):  # `input` uses it; Windows has none
        import readline  # noqa: F401
    while True:
        try:
            query = input(PROMPT).strip()
        except EOFError:
            print()
            return
        if not query:
            return
        yield query
