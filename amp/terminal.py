"""Output of commands on a terminal or in a log file: lines, tables and progress."""

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
from amp.imports import left_out, loading

LOG_SECONDS = 10.0  # between two log lines of a phase
_NO_LIMIT = 10_000  # width of a file, which has no edge
_LEAST_CELL = 5  # minimum width of a cell with its border and padding
_FIRST_SECONDS = 0.1  # reports that follow the first one this fast belong to it: they come from one batch


class PlainConsole(Console):
    """A console that shows texts unchanged and cuts nothing off.

    "[bold]" in a caption is not markup, and control characters are shown as escapes. Lines aren't wrapped, because a
    path that is split over two lines can't be copied. Files and pipes get tables in full width, without colours or
    progress bars. On a terminal that is too narrow, cells and headings are folded.

    Args:
        **options: Arguments of `rich.console.Console`.
    """

    def __init__(self, **options):
        stream = options.get("file") or (sys.stderr if options.get("stderr") else sys.stdout)
        watched = options.get("force_terminal", stream is not None and stream.isatty())
        own = {"markup": False, "emoji": False, "highlight": False, "force_terminal": watched}
        if not watched and "COLUMNS" not in os.environ:
            own["width"] = _NO_LIMIT
        super().__init__(**{**own, **options})
        self.phases: list[Progress] = []  # running phases, the innermost last

    def render_str(self, text: str, **options):
        lines = text.split("\n")  # a table's header can have two lines
        return super().render_str("\n".join(printable(line) for line in lines), **options)

    def print(self, *objects, **options):
        for table in (thing for thing in objects if isinstance(thing, Table)):
            for column in table.columns:
                column.overflow = "fold"
            if self.width < (least := _LEAST_CELL * len(table.columns)):  # rich would leave cells empty
                table.width = least
                options.setdefault("crop", False)
        if all(isinstance(thing, str | Text) for thing in objects):
            options.setdefault("soft_wrap", True)
        super().print(*objects, **options)

    def on_broken_pipe(self):
        raise  # handled by `amp.errors.exit_on_error`; rich would exit with status 1

    def say(self, text: str) -> None:
        """Prints a message. If the disk of a log file is full, the message is lost, but the run continues."""
        try:
            self.print(text)
        except BrokenPipeError:
            raise
        except OSError:
            pass

    def progress(self, what: str, unit: str = "", keep: bool = False) -> "Progress":
        """Shows the progress of a phase: `with console.progress("encoding photos") as report: report(3, 10)`.

        See `Progress`.

        Args:
            what: Name of the phase.
            unit: What is counted, such as photos.
            keep: Print a line about the whole phase when it ends, even if it was short.
        """
        return Progress(self, what, unit, keep)


class Terminal(PlainConsole):
    """Console of a run on standard error.

    Args:
        main: Whether this process prints anything.
    """

    def __init__(self, main: bool):
        super().__init__(stderr=True, quiet=not main)

    @contextmanager
    def training(self, stage: int, steps: int, images_per_step: int, begin: int = 0) -> Iterator[Callable]:
        """Yields `show(step, loss, temperature)`, to be called after each step.

        Loss and temperature may be omitted for steps where they aren't known. A resumed stage starts with `begin`
        steps.
        """
        with self.progress(f"stage {stage}", "steps", keep=True) as report:
            report(begin, steps)

            def show(step: int, loss: float | None = None, temperature: float | None = None) -> None:
                if loss is None:
                    report(step, steps)
                    return
                rate = f" {report.rate * images_per_step:,.0f} images/s" if report.rate else ""
                report(step, steps, f"loss {loss:.3f} tau {temperature:.4f}{rate}")
                report.log()

            yield show


def load_open_clip(transformers: bool = True) -> None:
    """Imports PyTorch and open_clip, which takes 5 to 15 seconds, and shows so at once, in a log file too.

    Args:
        transformers: Whether open_clip may import `transformers`, without which no model with a text tower or tokenizer
            of Hugging Face can be loaded in this process.
    """
    if "open_clip" in sys.modules:
        return
    with Terminal(os.environ.get("RANK", "0") == "0").progress("loading PyTorch and open_clip") as report:
        report.log()
        with loading(), left_out(*(() if transformers else ("transformers",))):
            import open_clip  # noqa: F401


class Progress:
    """Progress of a phase: a bar on a terminal, otherwise a line every `LOG_SECONDS`.

    A line contains the name, the done and total counts, the rate and the time left. The rate is that since the first
    report, which includes loading. A thread writes the lines, so they continue during a single long step.

    Args:
        console: Console that shows the progress.
        what, unit, keep: See `PlainConsole.progress`.
    """

    def __init__(self, console: PlainConsole, what: str, unit: str, keep: bool):
        self._console, self._keep, self._logs = console, keep, not console.is_interactive
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), _State())
        hidden = self._logs or console.quiet or bool(console.phases)  # rich 13 supports only one bar at a time
        self._bar = Bar(*columns, console=console, transient=True, disable=hidden)
        self._id = self._bar.add_task(printable(what), total=None, unit=unit, note="", rate=None)
        self._task = self._bar.tasks[0]
        self._first: float | None = None  # time of the first report
        self._base = (0.0, 0)  # time and done items from which the rate is computed
        self._logged = time.monotonic()
        self._said_any = self._said_all = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._log_now_and_then, daemon=True)

    @property
    def rate(self) -> float | None:
        """Items per second; None before the second report."""
        return self._task.fields["rate"]

    def __enter__(self) -> "Progress":
        self._console.phases.append(self)
        self._bar.start()
        if self._logs and not self._console.quiet:
            self._thread.start()
        return self

    def __call__(self, done: int, total: int, note: str | None = None) -> None:
        """Reports progress.

        Args:
            done: Items done so far.
            total: Items of the phase.
            note: Text after the counts, kept until another one is given.
        """
        now = self._bar.get_time()
        if done < self._task.completed:  # the next part of the phase begins
            self._bar.reset(self._id)
            self._first = None
        self._first = now if self._first is None else self._first
        if now - self._first < _FIRST_SECONDS:
            self._base = (now, done)
        begin, before = self._base
        rate = (done - before) / (now - begin) if done > before else None
        said = self._task.fields["note"] if note is None else note
        self._bar.update(self._id, completed=done, total=total, note=said, rate=rate)

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
                self._logged = time.monotonic()  # the inner phase writes the lines
            elif time.monotonic() - self._logged >= LOG_SECONDS:
                try:
                    self.log()
                except OSError:  # the output is closed, which the main thread detects itself
                    return


class _State(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(state_of(task))


def state_of(task: Task) -> str:
    """A task's done and total counts, rate, time left or taken, and note."""
    unit = task.fields["unit"]
    parts = []
    if task.total is not None:
        parts.append(f"{task.completed:,.0f} of {task.total:,.0f} {unit}".rstrip())
    rate = task.fields["rate"]
    if rate:
        often = f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.1f}/s"
        parts.append(often if rate >= 1 else f"{1 / rate:.1f} s each")
    if task.finished or task.stop_time is not None:
        parts.append(f"took {duration(task.elapsed or 0)}")
    elif task.remaining is None or not rate:
        parts.append(f"{duration(task.elapsed or 0)} so far")
    else:
        parts.append(f"{duration(task.remaining / rate)} left")
    if task.fields["note"]:
        parts.append(task.fields["note"])
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Formats a duration, such as 12 s, 3 min 05 s or 2 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
