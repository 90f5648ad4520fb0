"""Prints a result file as a table: rows, intervals, ceiling and chance, and a short protocol."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from amp.errors import printable
from amp.evaluate.results import DIRECTIONS, ResultFile
from amp.retrieval.figures import RetrievalRow
from amp.retrieval.metrics import KS, rsum

# Protocol keys in the two lines under the table: the data, then the method. The file contains all keys.
_DATA_KEYS = ("dataset", "split", "images", "captions")
_METHOD_KEYS = ("model", "top_k", "fusion_weight", "resize", "image_size", "precision", "seed")
_BARE_KEYS = ("dataset", "split", "model")


def print_table(result: ResultFile, console: Console | None = None) -> None:
    """Prints the rows, with the best value of each column in bold, then ceiling, chance and protocol.

    Args:
        result: Results to print.
        console: Console to print to; None prints to standard output.
    """
    console = console or Console()
    table = Table(box=None, header_style="bold", pad_edge=False, title_justify="left")
    table.add_column("method", overflow="fold")
    for name in DIRECTIONS:
        for k in KS:
            table.add_column(f"{name}\nR@{k}", justify="right", no_wrap=True)
    table.add_column("\nRsum", justify="right", no_wrap=True)
    for name in DIRECTIONS:
        table.add_column(f"{name}\nq/s", justify="right", no_wrap=True)

    methods = [(row.name, row.i2t.recall, row.t2i.recall) for row in result.rows]
    # Rounded before they are compared, so that figures printed alike are all bold or none is.
    figures = [_figures(i2t, t2i) for _, i2t, t2i in methods]
    best = [max(column) for column in zip(*figures, strict=True)] if len(figures) > 1 else None
    for row, values in zip(result.rows, figures, strict=True):
        cells = [
            Text(f"{value:.1f}", style="bold" if best and value == best[i] else "") for i, value in enumerate(values)
        ]
        speeds = [_speed(side.queries_per_second) for side in (row.i2t, row.t2i)]
        table.add_row(Text(printable(row.name)), *cells, *speeds)
    if result.rows:
        table.add_section()
    for label, i2t, t2i in _references(result.rows):
        table.add_row(Text(printable(label)), *(f"{value:.1f}" for value in _figures(i2t, t2i)), style="dim")
    console.print(table)
    if any(row.rsum_interval for row in result.rows):
        console.print(_intervals(result.rows))
    for line in protocol_lines(result.protocol):
        console.print(Text(printable(line), style="dim"))


def _intervals(rows: list[RetrievalRow]) -> Table:
    """Half the width of each interval. Intervals are nearly symmetric, and their ends are in the files."""
    table = Table(box=None, header_style="bold", pad_edge=False, title_justify="left")
    table.add_column("half width of the\n95 % interval", overflow="fold")
    for name in DIRECTIONS:
        for k in KS:
            table.add_column(f"{name}\nR@{k}", justify="right", no_wrap=True)
    table.add_column("\nRsum", justify="right", no_wrap=True)
    for row in rows:
        if row.rsum_interval and row.i2t.interval and row.t2i.interval:
            bounds = [*row.i2t.interval.values(), *row.t2i.interval.values(), row.rsum_interval]
            table.add_row(Text(printable(row.name)), *(f"±{(high - low) / 2:.1f}" for low, high in bounds), style="dim")
    return table


def _references(rows: list[RetrievalRow]) -> list[tuple[str, dict, dict]]:
    """Ceiling and chance of each distinct pre-selection. Usually all rows share one."""
    first_rows: dict[tuple, RetrievalRow] = {}
    for row in rows:
        key = tuple(tuple(d.values()) for side in (row.i2t, row.t2i) for d in (side.ceiling, side.chance))
        first_rows.setdefault(key, row)
    references = []
    for row in first_rows.values():
        ks = dict.fromkeys((row.i2t.top_k, row.t2i.top_k))
        of = "top " + "/".join(str(k) for k in ks) + (f", {row.name}" if len(first_rows) > 1 else "")
        references.append((f"ceiling ({of})", row.i2t.ceiling, row.t2i.ceiling))
        references.append((f"chance ({of})", row.i2t.chance, row.t2i.chance))
    return references


def protocol_lines(protocol: dict) -> tuple[str, ...]:
    """Returns the protocol as short lines: the data, the method, and the missing rows of an incomplete evaluation.

    Empty lines are left out.
    """
    lines = []
    for keys in (_DATA_KEYS, _METHOD_KEYS):
        parts = [_protocol_part(key, protocol[key]) for key in keys if protocol.get(key) is not None]
        lines.append(" · ".join(parts))
    if missing := protocol.get("missing_rows"):
        lines.append(f"incomplete, {len(missing)} rows are missing: {', '.join(map(str, missing))}")
    return tuple(line for line in lines if line)


def _figures(i2t: dict[int, float], t2i: dict[int, float]) -> Sequence[float]:
    return [round(value, 1) for value in (*i2t.values(), *t2i.values(), rsum(i2t, t2i))]


def _speed(queries_per_second: float) -> str:
    """Formats a speed briefly, so that the table fits into 80 columns: 4.6, 53, 5584, 30k."""
    if queries_per_second < 10:
        return f"{queries_per_second:.1f}"
    return f"{queries_per_second:.0f}" if queries_per_second < 10_000 else f"{queries_per_second / 1000:.0f}k"


def _protocol_part(key: str, value: object) -> str:
    if key in _BARE_KEYS:
        return str(value)
    if key in ("images", "captions") and isinstance(value, int):
        return f"{value:,} {key}"
    return f"{key.replace('_', ' ')} {value}"
