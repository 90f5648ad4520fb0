"""The summary as CSV and as Markdown tables beside the paper's figures."""

import csv
import io
from collections.abc import Iterator, Sequence

from amp.sweep.config import SweepConfig
from amp.sweep.summary import BASE, METRICS, Line, Summary, clear

EXTRAS = "Probes and controls"
SHORT = ("i2t R@1", "t2i R@1", "Rsum")  # of which Markdown shows differences; the CSV has all
HEAD = ("table", "row", "metric", "mean", "standard_error", "seeds", "paper", "over_base", "over_base_error",
        "over_base_exceeds_2se", "over_control", "over_control_error", "over_control_exceeds_2se")  # fmt: skip


def entries(config: SweepConfig, summary: Summary) -> Iterator[tuple[str, str, list[tuple[Line, Sequence | None]]]]:
    """Each table's title, the meaning of its paper columns, and its lines with the paper's seven figures or None."""
    base_shown = any(not row.train for table in config.tables for row in table.rows)
    for number, table in enumerate(config.tables):
        lines = [] if base_shown or number else [(summary.base, None)]
        for row in table.rows:
            line = summary.rows[row.name] if row.train else Line(row.name, summary.base.values)
            lines.append((line, None if row.paper is None else (*row.paper, sum(row.paper))))
        yield table.title, table.columns, lines
    if summary.extras:
        yield EXTRAS, "", [(line, None) for line in summary.extras]


def differences(line: Line, other: Line | None, metric: int) -> tuple[float | None, float | None, bool | None]:
    """Difference to another line, its standard error and whether it exceeds two; None to itself."""
    if other is None or line.values == other.values:
        return None, None, None
    gain, error = line.gain(other, metric)
    return gain, error, clear(gain, error)


def to_csv(config: SweepConfig, summary: Summary) -> str:
    """A line a table, row and metric; what nobody has measured is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEAD)
    control = summary.rows.get(config.control)
    for title, _, lines in entries(config, summary):
        for line, paper in lines:
            for i, metric in enumerate(METRICS):
                values = [line.mean(i), line.error(i), len(line.seeds) or None, paper[i] if paper else None,
                          *differences(line, summary.base, i), *differences(line, control, i)]  # fmt: skip
                writer.writerow([title, line.name, metric, *map(plain, values)])
    return out.getvalue()


def plain(value: float | int | bool | None) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def to_markdown(config: SweepConfig, summary: Summary, command: str) -> str:
    """Each table: mean ± standard error of ours and the paper's figures; below it the differences."""
    seeds = ", ".join(map(str, config.seeds))
    measured = next(iter(summary.base.values), "") is None
    against = [(BASE, summary.base)] if measured else []
    if config.control and summary.rows[config.control].values:
        against.append((config.control, summary.rows[config.control]))
    parts = [
        f"# {config.name}",
        f"```\n{command}\n```",
        f"Split `{config.split}`, image queries {config.i2t}, recall in percent. Mean ± standard error over seeds "
        f"{seeds}, as many as the column says; without ± one seed; empty where nobody has run it. Under each table differences, "
        "paired by seed: bold where they exceed two standard errors. These are errors of seeds alone, not of the test "
        "split. The paper's figures were measured on what their columns name: compare the order of rows, not values.",
    ]
    for title, columns, lines in entries(config, summary):
        papers = any(paper for _, paper in lines)
        paper_head = [f"paper {metric}" for metric in METRICS] if papers else []
        body = []
        for line, paper in lines:
            shown = [f"{x:.1f}" for x in paper] if paper else [""] * len(paper_head)
            body.append([line.name, str(len(line.seeds) or ""), *(cell(line.mean(i), line.error(i)) for i in range(7)),
                         *shown])  # fmt: skip
        note = f"Paper: {columns}.\n\n" if papers and columns else ""
        parts.append(f"## {title}\n\n{note}" + markdown_table(["row", "seeds", *METRICS, *paper_head], body))
        gains = [
            [line.name, *(gain_cell(line, other, METRICS.index(m)) for _, other in against for m in SHORT)]
            for line, _ in lines
        ]
        gains = [row for row in gains if any(row[1:])]
        if gains:
            parts.append(
                markdown_table(["difference", *(f"{m} to {name}" for name, _ in against for m in SHORT)], gains)
            )
    return "\n\n".join(parts) + "\n"


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    rows = [[text.replace("|", "\\|") for text in row] for row in (head, *body)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:]))


def cell(value: float | None, error: float | None, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{value:{sign}.1f}" + ("" if error is None else f" ± {error:.1f}")


def gain_cell(line: Line, other: Line, metric: int) -> str:
    gain, error, exceeds = differences(line, other, metric)
    text = cell(gain, error, "+")
    return f"**{text}**" if exceeds else text
