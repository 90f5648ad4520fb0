"""What a run of generation shows: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from amp.generation.ladder import Outcome

_LOG_SECONDS = 30.0
_NAMES = {"triplets": "triplets (Q1)", "states": "states (Q2)", "rules": "rules"}


class Progress:
    """Counts replies and outcomes.

    Args:
        console: of the run.
        captions: different captions of this part.
    """

    def __init__(self, console: Console, captions: int) -> None:
        self._console, self._captions = console, captions
        self._outcomes = self._down = self._errors = 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                   TextColumn("{task.fields[rates]}"), TimeRemainingColumn())  # fmt: skip
        self._bar = Bar(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task: TaskID | None = None
        self._done = self._total = self._tokens = 0
        self._what, self._asked = "", False  # whether a model was

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end_pass()
        self._bar.stop()

    def begin(self, stage: str, attempt: int, total: int) -> None:
        """A pass of `total` requests begins."""
        self._end_pass()
        self._asked |= stage != "rules"
        self._what = _NAMES[stage] + (f", retry {attempt}" if attempt else "")
        self._done, self._total, self._tokens = 0, total, 0
        self._start = self._said = time.perf_counter()
        self._task = self._bar.add_task(self._what, total=total, rates="")

    def reply(self, tokens: int = 0, error: str = "") -> None:
        """A reply came; `error` says why there is none."""
        assert self._task is not None, "replies come within a pass"
        self._done += 1
        self._tokens += tokens
        if error:
            self._errors += 1
            if self._errors <= 3:
                self._say(f"no reply: {error}")
        self._bar.update(self._task, completed=self._done, rates=self._rates())
        now = time.perf_counter()
        if not self._console.is_terminal and now - self._said > _LOG_SECONDS:
            self._said = now
            left = (self._total - self._done) * (now - self._start) / self._done
            self._say(f"{self._what} {self._done:,}/{self._total:,} {self._rates()}, {left / 60:.1f} min left")

    def resolved(self, outcome: Outcome) -> None:
        """A caption came to its end."""
        self._outcomes += 1
        self._down += outcome.failed or any("rules" in source.values() for source in outcome.sources)

    def _rates(self) -> str:
        seconds = max(time.perf_counter() - self._start, 1e-9)
        text = f"{self._done / seconds:,.1f} captions/s"
        if self._tokens:
            text += f" {self._tokens / seconds:,.0f} tokens/s"
        if self._outcomes and self._asked:
            text += f", {self._outcomes:,} done, {self._down / self._outcomes:.1%} by rules or empty"
        return text

    def _end_pass(self) -> None:
        if self._task is not None:
            self._say(f"{self._what}: {self._done:,} of {self._total:,} {self._rates()}")
            self._bar.remove_task(self._task)
            self._task = None

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)
