"""Means and standard errors over seeds, and differences paired by seed."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from amp.errors import AmpError
from amp.retrieval.metrics import KS
from amp.retrieval.results import ResultFile, RetrievalRow
from amp.sweep.config import SweepConfig
from amp.sweep.plan import Run

METRICS = (*(f"i2t R@{k}" for k in KS), *(f"t2i R@{k}" for k in KS), "Rsum")
BASE = "base CLIP"
_AGREE = 1e-3  # percent; the same features ranked on another machine


@dataclass(frozen=True)
class Line:
    """One method over its seeds.

    Attributes:
        name: As shown.
        values: The metrics of each seed, in the order of `METRICS`; under None what no seed changes.
    """

    name: str
    values: dict[int | None, tuple[float, ...]] = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        return sorted(seed for seed in self.values if seed is not None)

    def mean(self, metric: int) -> float | None:
        return mean([v[metric] for v in self.values.values()])

    def error(self, metric: int) -> float | None:
        return standard_error([v[metric] for v in self.values.values()])

    def gain(self, other: "Line", metric: int) -> tuple[float | None, float | None]:
        """Mean difference to another line and its standard error, paired by seed, over the seeds that both have."""
        seeds = [seed for seed in {*self.values, *other.values} if seed is not None] or [None]
        pairs = [(self._of(seed), other._of(seed)) for seed in seeds]
        differences = [a[metric] - b[metric] for a, b in pairs if a is not None and b is not None]
        return mean(differences), standard_error(differences)

    def _of(self, seed: int | None) -> tuple[float, ...] | None:
        return self.values.get(seed, self.values.get(None))


@dataclass
class Summary:
    """What the runs of a sweep say so far.

    Attributes:
        base: The base CLIP, the same in all runs; without values where no run has a result.
        rows: The trained rows by name; without values where nobody has run them.
        extras: Text-only control, probes, and the way of conditioning image queries that tables don't show.
        left_out: Runs of another configuration, whose results aren't shown.
    """

    base: Line
    rows: dict[str, Line]
    extras: list[Line]
    left_out: list[Run]


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def standard_error(values: Sequence[float]) -> float | None:
    """sd / sqrt(n) with n - 1 under the variance; None below two values."""
    n = len(values)
    if n < 2:
        return None
    centre = sum(values) / n
    return math.sqrt(sum((v - centre) ** 2 for v in values) / (n - 1) / n)


def clear(gain: float | None, error: float | None) -> bool | None:
    """Whether a difference exceeds two standard errors, above or below; None with a single seed."""
    return None if gain is None or error is None else abs(gain) > 2 * error


def figures(row: RetrievalRow) -> tuple[float, ...]:
    return (*row.i2t.recall.values(), *row.t2i.recall.values(), row.rsum)


def collect(config: SweepConfig, runs: dict[str, list[Run]]) -> Summary:
    """Reads the results that are there.

    Raises:
        AmpError: Two runs disagree on the base CLIP: they weren't evaluated on the same split or model.
    """
    base, first, left_out = {}, None, []
    rows = {name: Line(name) for name in runs}
    probes, texts = {}, {}
    read = {}
    for name, of_row in runs.items():
        for run in of_row:
            if run not in read:
                state = run.state()
                if state == "changed":
                    left_out.append(run)
                read[run] = ResultFile.load_json(run.results) if state == "done" else None
                shown_before = False
            else:
                shown_before = True  # under another name
            result = read[run]
            if result is None:
                continue
            own = figures(result.rows[0])
            first = first or (run.results, own)
            if max(abs(a - b) for a, b in zip(first[1], own, strict=True)) > _AGREE:
                raise AmpError(
                    f"{run.results}: base CLIP has Rsum {own[-1]:.2f}, expected {first[1][-1]:.2f} as in {first[0]}: "
                    "the runs differ in model, split or shards. Remove the wrong result and start the sweep again"
                )
            base[None] = first[1]
            (adapter,) = result.protocol["adapters"]
            for row in result.rows[1:]:
                part = re.fullmatch(rf"{re.escape(adapter)}(?:, (\w+))?(?: \((\w+)\))?", row.name)
                if part is None:  # the one row without an adapter
                    texts.setdefault((row.name, name), {})[run.seed] = figures(row)
                    continue
                probe, mode = part.groups()
                if probe is None and mode in (None, config.i2t):
                    rows[name].values[run.seed] = figures(row)
                elif not shown_before:
                    shown = name + (f", {probe}" if probe else "") + (f" ({mode})" if mode != config.i2t else "")
                    probes.setdefault(shown, {})[run.seed] = figures(row)
    extras = text_lines(texts) + [Line(shown, values) for shown, values in probes.items()]
    return Summary(Line(BASE, base), rows, extras, left_out)


def text_lines(found: dict[tuple[str, str], dict[int, tuple[float, ...]]]) -> list[Line]:
    """The text-only control: one line for all rows that read the same texts, which no seed changes."""
    lines = {}
    for (what, row), values in found.items():
        for value in values.values():
            key = tuple(round(v, 3) for v in value)
            lines.setdefault(key, Line(f"{what}, {row}" if lines else what, {None: value}))
    return list(lines.values())
