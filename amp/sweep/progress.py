"""What a sweep shows: a line a run that has ended, and on a terminal the one that runs."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from amp.sweep.plan import Run


class SweepProgress:
    """A bar over the runs with the state of the present one above it.

    Args:
        console: Where to show it; in a log file each change of state is a line.
        total: Number of runs.
    """

    def __init__(self, console: Console, total: int):
        self.console, self.total, self.ended = console, total, 0
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                   TimeElapsedColumn())  # fmt: skip
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.all = self.bar.add_task("runs", total=total)

    def __enter__(self) -> "SweepProgress":
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def follow(self, run: Run, execute: Callable[[Callable[[str], None]], str]) -> str:
        """Calls execute(say) and shows what it says; returns the state that it returns."""
        start, task = time.perf_counter(), self.bar.add_task(run.name, total=None)

        def say(state: str) -> None:
            self.bar.update(task, description=f"{run.name}: {state}")
            if not self.console.is_terminal:
                self.line(run, state, self.ended + 1, start)

        try:
            state = execute(say)
        finally:
            self.bar.remove_task(task)
        self.ended += 1
        self.bar.advance(self.all)
        self.line(run, state, self.ended, start)
        return state

    def line(self, run: Run, state: str, number: int, start: float) -> None:
        seconds = time.perf_counter() - start
        spent = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
        text = f"{number}/{self.total} {run.name}: {state}"
        # Not wrapped: paths of logs are to be copied.
        self.console.print(text if state in ("training", "evaluating") else f"{text}, {spent}", highlight=False,
                           markup=False, soft_wrap=True)  # fmt: skip
