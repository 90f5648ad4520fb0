"""What a run shows: lines and progress bars on the main process; other processes stay silent."""

import time
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from amp.errors import printable


class PlainConsole(Console):
    """A console that shows texts as they are: "[bold]" in a caption is no markup, and control characters are spelt out.

    Args:
        **options: Of `rich.console.Console`.
    """

    def __init__(self, **options):
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def render_str(self, text: str, **options):
        lines = text.split("\n")  # a table's header has two
        return super().render_str("\n".join(printable(line) for line in lines), **options)


class Terminal:
    """Standard error of a run.

    Args:
        main: Whether this process shows anything.
    """

    def __init__(self, main: bool):
        self.main, self.console = main, PlainConsole(stderr=True, quiet=not main)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)  # a path cut in two can't be copied

    @contextmanager
    def progress(self, what: str):
        """Yields report(done, total)."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        # In a log file a bar that goes away again would leave an empty line.
        off = not self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=off) as bar:
            task = bar.add_task(printable(what), total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    @contextmanager
    def training(self, stage: int, steps: int, images_a_step: int, begin: int = 0):
        """Yields show(step, loss, temperature); a resumed stage has `begin` steps behind it."""
        columns = (TextColumn("stage {task.fields[stage]}"), BarColumn(), MofNCompleteColumn(),
                   TextColumn("loss {task.fields[loss]} tau {task.fields[tau]} {task.fields[rate]} images/s"),
                   TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
        start = time.perf_counter()
        interactive = self.console.is_terminal
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task("train", total=steps, completed=begin, stage=stage, loss="-", tau="-", rate="-")

            def show(step: int, loss: float, temperature: float) -> None:
                taken, seconds = step - begin, time.perf_counter() - start
                rate = taken * images_a_step / seconds
                bar.update(task, completed=step, loss=f"{loss:.3f}", tau=f"{temperature:.4f}", rate=f"{rate:,.0f}")
                if not interactive:  # a log file gets a line instead of a bar
                    left = (steps - step) / taken * seconds
                    self.say(f"stage {stage} step {step}/{steps} loss {loss:.3f} tau {temperature:.4f} "
                             f"{rate:,.0f} images/s, {left / 60:.1f} min left")  # fmt: skip

            yield show
