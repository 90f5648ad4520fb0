"""What a person or a log file sees of a command: lines, tables, and how far a long phase is."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from amp.errors import printable

LOG_SECONDS = 10.0  # between two lines of a phase
_NO_LIMIT = 10_000  # columns of a file, which has no edge
_LEAST_CELL = 5  # columns of a cell with its edge and spaces
_REPORT_SECONDS = 0.1  # reports that follow faster are left out, so that the rate is one of more than an instant


class PlainConsole(Console):
    """A console that shows texts as they are and cuts nothing off.

    "[bold]" in a caption is no markup, and control characters are spelt out. Lines aren't wrapped: a path cut in two
    can't be copied. A file or a pipe gets tables in their full width, and no colours or bars; on a terminal that is too
    narrow, cells and headings are folded.

    Args:
        **options: Of `rich.console.Console`.
    """

    def __init__(self, **options):
        stream = options.get("file") or (sys.stderr if options.get("stderr") else sys.stdout)
        watched = options.get("force_terminal", stream is not None and stream.isatty())
        own = {"markup": False, "emoji": False, "highlight": False, "force_terminal": watched}
        if not watched and "COLUMNS" not in os.environ:
            own["width"] = _NO_LIMIT
        super().__init__(**{**own, **options})
        self.phases: list[Progress] = []  # that are under way, the innermost last

    def render_str(self, text: str, **options):
        lines = text.split("\n")  # a table's header has two
        return super().render_str("\n".join(printable(line) for line in lines), **options)

    def print(self, *objects, **options):
        for table in (thing for thing in objects if isinstance(thing, Table)):
            for column in table.columns:
                column.overflow = "fold"
            if self.width < (least := _LEAST_CELL * len(table.columns)):  # rich would leave cells without any text
                table.width = least
                options.setdefault("crop", False)
        if all(isinstance(thing, str | Text) for thing in objects):
            options.setdefault("soft_wrap", True)
        super().print(*objects, **options)

    def on_broken_pipe(self):
        raise  # `amp.errors.exit_on_error` answers for it; rich would end with status 1

    def say(self, text: str) -> None:
        """Prints a message; a log file on a full disk loses it, which must not end a run."""
        try:
            self.print(text)
        except BrokenPipeError:
            raise
        except OSError:
            pass

    def progress(self, what: str, unit: str = "", keep: bool = False) -> "Progress":
        """How far a phase is, see `Progress`: ``with console.progress("encoding photos") as report: report(3, 10)``.

        Args:
            what: The phase.
            unit: What is counted, such as photos.
            keep: Leave a line about the whole phase when it ends, however short it was.
        """
        return Progress(self, what, unit, keep)


class Terminal(PlainConsole):
    """Standard error of a run.

    Args:
        main: Whether this process shows anything.
    """

    def __init__(self, main: bool):
        super().__init__(stderr=True, quiet=not main)

    @contextmanager
    def training(self, stage: int, steps: int, images_a_step: int, begin: int = 0) -> Iterator[Callable]:
        """Yields show(step, loss, temperature), to be called after each step, with only the step where the others
        aren't known; a resumed stage has taken `begin` steps."""
        with self.progress(f"stage {stage}", "steps", keep=True) as report:
            report(begin, steps)

            def show(step: int, loss: float | None = None, temperature: float | None = None) -> None:
                if loss is None:
                    report(step, steps)
                    return
                rate = f" {report.rate * images_a_step:,.0f} images/s" if report.rate else ""
                report(step, steps, f"loss {loss:.3f} tau {temperature:.4f}{rate}")
                report.log()

            yield show


class Progress:
    """How far a phase is: a bar on a terminal, elsewhere a line every `LOG_SECONDS`.

    A line says what, done of total, rate, time left. Time left comes from the rate of the last reports, never from the
    first one, in which things are loaded. Lines come from a thread, so a single long step doesn't stop them.

    Args:
        console: Where it is shown.
        what, unit, keep: As in `PlainConsole.progress`.
    """

    def __init__(self, console: PlainConsole, what: str, unit: str, keep: bool):
        self._console, self._keep, self._logs = console, keep, not console.is_interactive
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), _State())
        hidden = self._logs or console.quiet or bool(console.phases)  # rich 13 has one bar at a time
        # The period is that of the rate's samples; an item may take hours.
        self._bar = Bar(*columns, console=console, transient=True, disable=hidden, speed_estimate_period=1e9)
        self._id = self._bar.add_task(printable(what), total=None, unit=unit, note="")
        self._task = self._bar.tasks[0]
        self._reported = self._logged = time.monotonic()
        self._said_any = self._said_all = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._log_now_and_then, daemon=True)

    @property
    def rate(self) -> float | None:
        """Items a second; None before the second report."""
        return self._task.finished_speed or self._task.speed

    def __enter__(self) -> "Progress":
        self._console.phases.append(self)
        self._bar.start()
        if self._logs and not self._console.quiet:
            self._thread.start()
        return self

    def __call__(self, done: int, total: int, note: str | None = None) -> None:
        """Reports.

        Args:
            done: Items done so far.
            total: Of the phase.
            note: Further words after the figures, which stay until there are others.
        """
        now = time.monotonic()
        goes_on = self._task.total == total and self._task.completed < done < total and note is None
        if goes_on and now - self._reported < _REPORT_SECONDS:
            return
        if done < self._task.completed:  # the next part begins
            self._bar.reset(self._id)
        self._reported = now
        said = self._task.fields["note"] if note is None else note
        self._bar.update(self._id, completed=done, total=total, note=said)

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        self._bar.stop()
        self._console.phases.remove(self)
        if kind is None and (self._keep or self._said_any) and not self._said_all:
            self._task.stop_time = self._task.get_time()
            self._console.say(f"{self._task.description}: {state_of(self._task)}")

    def log(self) -> None:
        """Writes a line now, unless there is a bar."""
        if self._logs:
            self._logged, self._said_any, self._said_all = time.monotonic(), True, self._task.finished
            self._console.say(f"{self._task.description}: {state_of(self._task)}")

    def _log_now_and_then(self) -> None:
        while not self._end.wait(max(0.0, self._logged + LOG_SECONDS - time.monotonic())):
            if self._console.phases[-1] is not self:
                self._logged = time.monotonic()  # the inner phase has the word
            elif time.monotonic() - self._logged >= LOG_SECONDS:
                try:
                    self.log()
                except OSError:  # nobody reads any more, which the main thread finds out itself
                    return


class _State(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(state_of(task))


def state_of(task: Task) -> str:
    """Done of total, rate, time left or taken, and the note of a task."""
    unit = task.fields["unit"]
    parts = []
    if task.total is not None:
        parts.append(f"{task.completed:,.0f} of {task.total:,.0f} {unit}".rstrip())
    speed = task.finished_speed or task.speed
    if speed:
        often = f"{speed:,.0f}/s" if speed >= 100 else f"{speed:.1f}/s"
        parts.append(often if speed >= 1 else f"{1 / speed:.1f} s each")
    if task.finished or task.stop_time is not None:
        parts.append(f"took {duration(task.elapsed or 0)}")
    elif task.time_remaining is None:
        parts.append(f"{duration(task.elapsed or 0)} so far")
    else:
        parts.append(f"{duration(task.time_remaining)} left")
    if task.fields["note"]:
        parts.append(task.fields["note"])
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Such as 12 s, 3 min 05 s, 2 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
