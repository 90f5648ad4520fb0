"""The plots of a report as SVG in the page's colours."""

import csv
import io
import logging
import os
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from amp.errors import AmpError
from amp.evaluate.results import ResultFile

# Okabe and Ito's palette: distinguishable for colour-blind readers, on light and dark backgrounds.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
METRICS = ("i2t R@1", "t2i R@1", "Rsum")
_GROUND = "#010203"  # replaced by the page's text colour


def dot_plot(rows: list[tuple[str, list[tuple[float, float, float]]]]) -> str:
    """Draws one panel per metric of `METRICS` with one point and interval per row; a line marks the first row.

    Args:
        rows: Name and (value, low, high) of each metric, per row.
    """
    with _style():
        figure = Figure(figsize=(9, 0.9 + 0.3 * len(rows)), layout="constrained")
        FigureCanvasSVG(figure)
        for index, axes in enumerate(figure.subplots(1, len(METRICS), sharey=True)):
            axes.axvline(rows[0][1][index][0], color=COLOURS[1], linestyle="--", linewidth=1)
            for y, (_, figures) in enumerate(rows):
                value, low, high = figures[index]
                axes.plot([low, high], [y, y], color=COLOURS[0], linewidth=1.5)
                axes.plot(value, y, "o", color=COLOURS[1] if y == 0 else COLOURS[0], markersize=5)
            axes.set_title(METRICS[index], fontsize=10)
            axes.grid(axis="x", alpha=0.25)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
        first = figure.axes[0]
        first.set_yticks(range(len(rows)), [name if len(name) < 40 else f"{name[:38]}…" for name, _ in rows])
        first.set_ylim(len(rows) - 0.5, -0.5)
        return _svg(figure)


def results_plot(result: ResultFile) -> str | None:
    """Plots the rows of an evaluation with their 95 % intervals; None if there are no intervals."""
    rows = []
    for row in result.rows:
        i2t, t2i = row.i2t, row.t2i
        if i2t.interval and t2i.interval and row.rsum_interval:
            figures = [(i2t.recall[1], *i2t.interval[1]), (t2i.recall[1], *t2i.interval[1])]
            rows.append((row.name, [*figures, (row.rsum, *row.rsum_interval)]))
    return dot_plot(rows) if rows else None


def sweep_plot(path: str | os.PathLike) -> str:
    """Plots the rows of a CSV file of amp sweep, as means with standard errors.

    Raises:
        AmpError: The file is not a sweep's CSV file, or it has no row with figures.
    """
    rows: dict[str, dict[str, tuple[float, float, float]]] = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                if line["mean"]:
                    mean, error = float(line["mean"]), float(line["standard_error"] or 0)
                    rows.setdefault(line["row"], {})[line["metric"]] = (mean, mean - error, mean + error)
        complete = [(name, [figures[m] for m in METRICS]) for name, figures in rows.items()]
    except (OSError, KeyError, ValueError, UnicodeDecodeError) as error:
        raise AmpError(f"{path}: no results of a sweep ({error}), expected the CSV file of amp sweep") from error
    if not complete:
        raise AmpError(f"{path}: no row with figures; expected at least one; run amp sweep")
    return dot_plot(complete)


def training_plot(runs: dict[str, Path]) -> str | None:
    """Plots loss and validation R@1 of runs from their TensorBoard files; None if there are no such files."""
    curves = {name: found for name, folder in runs.items() if (found := _curves(folder))}
    if not curves:
        return None
    with _style():
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        FigureCanvasSVG(figure)
        left, right = figure.subplots(1, 2)
        for index, (name, tags) in enumerate(curves.items()):
            colour = COLOURS[index % len(COLOURS)]
            for stage, style in (("stage1", "-"), ("stage2", ":")):
                if points := tags.get(f"{stage}/loss"):
                    left.plot(*zip(*points, strict=True), style, color=colour, label=f"{name}, {stage}", linewidth=1.3)
            for tag in (tag for tag in tags if tag.startswith("validation/") and tag.endswith("_R@1")):
                direction = tag.removeprefix("validation/").removesuffix("_R@1").replace("_", " ")
                style = {"t2i": "-o", "i2t pooled": "--o"}.get(direction, ":o")
                right.plot(
                    *zip(*tags[tag], strict=True),
                    style,
                    color=colour,
                    markersize=3,
                    linewidth=1.3,
                    label=f"{name}, {direction}",
                )
        for axes, title in ((left, "training loss"), (right, "validation R@1, percent")):
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("optimizer step")
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            if axes.lines:
                axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
        return _svg(figure)


def _curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # A resumed run repeats the steps after its checkpoint. TensorBoard drops the older ones, and warns about it.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    found: dict[str, list[tuple[int, float]]] = {}
    for place in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
        log = EventAccumulator(str(place)).Reload()
        for tag in log.Tags()["scalars"]:
            found.setdefault(tag, [])
            found[tag] += [(event.step, event.value) for event in log.Scalars(tag)]
    return {tag: sorted(points) for tag, points in found.items()}


@contextmanager
def _style():
    keys: tuple[Any, ...] = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    colours = dict.fromkeys(keys, _GROUND)
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.parse_math": False,  # a "$" in a name starts no formula
        "svg.hashsalt": "report",
    }
    with rc_context({**colours, **settings}), warnings.catch_warnings():
        # The SVG contains text that the browser draws, so it doesn't matter if Matplotlib's font lacks a character.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :].replace(_GROUND, "currentColor")
