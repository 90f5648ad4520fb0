"""Shows the progress of a generation run, and how many captions fell back to rules or stayed empty."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from amp.generation.ladder import Outcome
from amp.terminal import PlainConsole

_NAMES = {"triplets": "triplets (Q1)", "states": "states (Q2)", "rules": "rules"}


class Counts:
    """Counts replies and outcomes.

    Args:
        console: Where progress is shown.
    """

    def __init__(self, console: PlainConsole) -> None:
        self._console = console
        self._outcomes = self._down = self._errors = 0
        self._asked = False  # whether a model was called

    @contextmanager
    def replies(self, stage: str, attempt: int, total: int) -> Iterator[Callable[..., None]]:
        """Shows a pass of `total` requests. Yields a function reply(tokens, error) to call once per request."""
        self._asked |= stage != "rules"
        done = tokens = 0
        start = time.perf_counter()
        what = _NAMES[stage] + (f", retry {attempt}" if attempt else "")
        with self._console.progress(what, "captions", keep=True) as report:

            def reply(more_tokens: int = 0, error: str = "") -> None:
                nonlocal done, tokens
                done, tokens = done + 1, tokens + more_tokens
                if error:
                    self._errors += 1
                    if self._errors <= 3:
                        self._console.say(f"no reply: {error}")
                note = [f"{tokens / (time.perf_counter() - start):,.0f} tokens/s"] if tokens else []
                if self._outcomes and self._asked:
                    note += [f"{self._outcomes:,} done", f"{self._down / self._outcomes:.1%} by rules or empty"]
                report(done, total, ", ".join(note) or None)

            yield reply

    def resolved(self, outcome: Outcome, fell_back: bool) -> None:
        """Counts the outcome of a caption."""
        self._outcomes += 1
        self._down += outcome.failed or fell_back
