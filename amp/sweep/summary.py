"""Means and standard errors over seeds, as CSV and as tables next to the paper's figures."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from amp.errors import AmpError, Problems, printable
from amp.evaluate.results import ResultFile
from amp.retrieval.figures import BASE, RetrievalRow, RowKey
from amp.retrieval.metrics import KS
from amp.sweep.config import SweepConfig
from amp.sweep.runs import RESULTS, Run

METRICS = (*(f"i2t R@{k}" for k in KS), *(f"t2i R@{k}" for k in KS), "Rsum")


@dataclass(frozen=True)
class Line:
    """Results of one method over its seeds.

    Attributes:
        key: The row of the table, with the probe and the mode of image queries; pairwise is not named.
        values: The metrics of each seed, in the order of `METRICS`.
        paper: The paper's seven figures, or None.
    """

    key: RowKey
    values: dict[int, tuple[float, ...]]
    paper: tuple[float, ...] | None = None

    def mean(self, metric: int) -> float | None:
        return sum(v[metric] for v in self.values.values()) / len(self.values) if self.values else None

    def error(self, metric: int) -> float | None:
        return standard_error([v[metric] for v in self.values.values()])

    def gain(self, other: "Line", metric: int) -> tuple[float | None, float | None]:
        """Mean difference from another line and its standard error, over the seeds that both have.

        A line with a single value (the base CLIP) is used for every seed.
        """
        pairs = [(v[metric], other.values[seed][metric]) for seed, v in self.values.items() if seed in other.values]
        differences = [a - b for a, b in pairs]
        return (sum(differences) / len(differences) if differences else None), standard_error(differences)


def standard_error(values: Sequence[float]) -> float | None:
    """sd / sqrt(n), with the variance over n - 1; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


def figures(row: RetrievalRow) -> tuple[float, ...]:
    return (*row.i2t.recall.values(), *row.t2i.recall.values(), row.rsum)


def collect(config: SweepConfig, runs: dict[str, list[Run]]) -> tuple[dict[RowKey, Line], Line, list[str]]:
    """Reads the existing results.

    Returns:
        Lines by key, probes after their row; the line of the base CLIP; and reasons why results are left out: they
        can't be read, or their base CLIP differs from that of most runs, so they were evaluated on another split or
        model.
    """
    results, base, left_out = _read(runs)
    lines = {}
    papers = {row.name: row.paper for table in config.tables for row in table.rows}
    for name, of_row in runs.items():
        found: dict[RowKey, dict[int, tuple[float, ...]]] = {RowKey(name): {}}
        for run in of_row:
            for row in results[run].rows[1:] if run in results else ():
                # The evaluation uses the name of the first row with this configuration.
                key = RowKey(name, row.key.mode if row.key.mode != "pairwise" else "", row.key.probe)
                found.setdefault(key, {})[run.seed] = figures(row)
        for key, values in found.items():
            lines[key] = Line(key, values, with_sum(papers[name]) if key == RowKey(name) else None)
    return lines, Line(BASE, base), left_out


def _read(
    runs: dict[str, list[Run]],
) -> tuple[dict[Run, ResultFile], dict[int, tuple[float, ...]], list[str]]:
    """Results by run, figures of the base CLIP by seed, and reasons why other results are left out."""
    again = "remove the file and start the sweep again"
    results, problems = {}, Problems()
    for run in dict.fromkeys(run for of_row in runs.values() for run in of_row if run.done):
        path = run.folder / RESULTS
        with problems.collect():
            try:
                found = ResultFile.load_json(path)
            except AmpError as error:
                raise AmpError(f"{error}; or {again}") from error
            if len(found.rows) < 2:
                raise AmpError(f"{path}: has {len(found.rows)} rows, expected base CLIP and {run.row!r}; {again}")
            if other := [row.name for row in found.rows[1:] if row.key.method != run.row]:
                raise AmpError(f"{path}: has the row {other[0]!r}, expected rows of {run.row!r} only; {again}")
            results[run] = found
    base = {run: figures(found.rows[0]) for run, found in results.items()}
    rounded = {run: tuple(round(value, 2) for value in values) for run, values in base.items()}
    usual = max(base, key=lambda run: list(rounded.values()).count(rounded[run]), default=None)
    for run, values in base.items():
        expected = base[usual] if usual is not None else values
        if max(abs(a - b) for a, b in zip(values, expected, strict=True)) > 1e-3:
            problems.found.append(
                f"{run.folder / RESULTS}: base CLIP has Rsum {values[-1]:.2f}, expected {expected[-1]:.2f} as in most "
                f"runs: it was evaluated with another model, split or shards; {again}"
            )
            del results[run]
    return results, {run.seed: base[run] for run in results}, problems.found


def with_sum(paper: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if paper is None else (*map(float, paper), float(sum(paper)))


def to_csv(lines: dict[RowKey, Line], base: Line, control: str | None) -> str:
    """One line per method and metric: mean, standard error, seeds, the paper's figure, gains over base and control."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            "row",
            "metric",
            "mean",
            "standard_error",
            "seeds",
            "paper",
            "over_base",
            "over_base_error",
            "over_control",
            "over_control_error",
        ]
    )
    for line in (base, *lines.values()):
        for i, metric in enumerate(METRICS):
            gains = [*line.gain(base, i), *(line.gain(lines[RowKey(control)], i) if control else (None, None))]
            figures = [line.mean(i), line.error(i), len(line.values), line.paper[i] if line.paper else None, *gains]
            writer.writerow(
                [
                    str(line.key),
                    metric,
                    *("" if x is None else f"{x:.3f}" if isinstance(x, float) else x for x in figures),
                ]
            )
    return out.getvalue()


def to_markdown(
    config: SweepConfig, lines: dict[RowKey, Line], base: Line, command: str, left_out: Sequence[str] = ()
) -> str:
    """The tables: our mean ± standard error, then the paper's figures. A gain of more than two standard errors is bold.

    Probes are in the first table that has their row; `left_out`, results that can't be used, comes last."""
    parts = [
        f"Made by `{command}`. Mean ± standard error over seeds {', '.join(map(str, config.seeds))}; rows "
        "without figures were not run. Bold: more than two standard errors above base CLIP"
        + (f"; *: also above {config.control}" if config.control else "")
        + f". The paper's figures ({config.paper_columns}) were measured on other data and another model: compare the "
        "order of rows, not values."
    ]
    control = lines.get(RowKey(config.control)) if config.control else None
    probed = set()  # rows whose probes are in an earlier table
    for table in config.tables:
        papers = any(row.paper for row in table.rows)
        head = ["row", "seeds", *METRICS] + ([f"paper {m}" for m in METRICS] if papers else [])
        body = []
        for row in table.rows:
            shown = (
                [base]
                if not row.train
                else [lines[RowKey(row.name)]]
                + [x for key, x in lines.items() if row.name not in probed and key.method == row.name and key.probe]
            )
            probed.add(row.name)
            for line in shown:
                name = row.name if line is base else str(line.key)
                cells = [
                    name,
                    str(len(line.values) or ""),
                    *(cell(line, i, base, control) for i in range(7)),
                ]
                if papers:
                    paper = with_sum(row.paper) if line is base or line.key == RowKey(row.name) else None
                    cells += [f"{x:.1f}" for x in paper] if paper else [""] * len(METRICS)
                body.append(cells)
        rule = ["---"] + ["---:"] * (len(head) - 1)
        parts.append(f"## {table.title}\n\n" + "\n".join("| " + " | ".join(c) + " |" for c in [head, rule, *body]))
    if left_out:
        parts.append("## Results left out\n\n" + "\n".join(f"- {printable(reason)}" for reason in left_out))
    return "\n\n".join(parts) + "\n"


def cell(line: Line, metric: int, base: Line, control: Line | None) -> str:
    mean, error = line.mean(metric), line.error(metric)
    if mean is None:
        return ""
    text = f"{mean:.1f}" + (f" ± {error:.1f}" if error is not None and line is not base else "")
    if line is not base and clear(*line.gain(base, metric)):
        text = f"**{text}**"
    if control is not None and line is not control and line is not base and clear(*line.gain(control, metric)):
        text += " *"
    return text


def clear(gain: float | None, error: float | None) -> bool:
    """Whether a gain is above zero by more than two standard errors; unknown with a single seed."""
    return gain is not None and error is not None and gain > 2 * error
