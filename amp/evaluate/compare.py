"""Compares two rows on the same queries by a paired bootstrap over images (Efron and Tibshirani 1993, ch. 16)."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from amp.errors import AmpError, Problems
from amp.evaluate.bootstrap import interval, resampled_recalls
from amp.evaluate.per_query import load_queries
from amp.evaluate.results import DIRECTIONS, ResultFile
from amp.files import write_atomically
from amp.retrieval.metrics import KS

# Protocol keys that must be equal in both files, so that queries, correct answers and galleries are the same.
SHARED = ("captions_sha256", "folds", "queries")


@dataclass(frozen=True)
class Difference:
    """One figure of both rows.

    Attributes:
        figure: Name of the figure, such as "t2i R@1".
        a, b: The figure of each row, in percent.
        low, high: 95 % interval of b - a.
        p: Two-sided p-value: twice the fraction of samples whose difference has the less frequent sign, at most 1.
        fixed, broken: Number of queries with a correct item among the first K only in b, and only in a; None for Rsum.
    """

    figure: str
    a: float
    b: float
    low: float
    high: float
    p: float
    fixed: int | None = None
    broken: int | None = None


@dataclass(frozen=True)
class Comparison:
    """All figures of two rows.

    Attributes:
        a, b: Names of the rows.
        files: Names of their result files.
        bootstrap: Number of bootstrap samples.
        differences: Figures in the order of the table.
    """

    a: str
    b: str
    files: tuple[str, str]
    bootstrap: int
    differences: list[Difference]

    def save_json(self, path: str | os.PathLike) -> Path:
        """Writes all attributes."""
        return write_atomically(path, f"{json.dumps(asdict(self), indent=2, ensure_ascii=False)}\n".encode())

    def print_table(self, console: Console) -> None:
        """Prints one line per figure; differences whose interval leaves out zero are bold."""
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("figure", "a", "b", "b - a", "95 % interval", "p", "fixed", "broken"):
            table.add_column(column, justify="left" if column == "figure" else "right", no_wrap=True)
        for d in self.differences:
            style = "bold" if d.low > 0 or d.high < 0 else ""
            counts = ["" if n is None else f"{n:,}" for n in (d.fixed, d.broken)]
            table.add_row(
                d.figure,
                f"{d.a:.1f}",
                f"{d.b:.1f}",
                Text(f"{d.b - d.a:+.1f}", style=style),
                f"{d.low:+.1f} to {d.high:+.1f}",
                f"{d.p:.3f}",
                *counts,
            )
        console.print(table)
        console.print(Text(f"a: {self.a} · b: {self.b} · {self.bootstrap:,} bootstrap samples of the images", "dim"))


def compare(
    a: str | os.PathLike, a_row: str, b: str | os.PathLike, b_row: str, bootstrap: int = 10_000, seed: int = 0
) -> Comparison:
    """Compares a row of result file `b` with a row of result file `a`.

    Args:
        a, b: JSON files written by amp evaluate; may be the same file.
        a_row, b_row: Names of the rows, as in `ResultFile.find`.
        bootstrap: Number of bootstrap samples.
        seed: Random seed of the bootstrap.

    Raises:
        AmpError: A row or file is missing, or the queries differ.
    """
    if bootstrap < 1:
        raise AmpError(f"bootstrap is {bootstrap}, expected at least 1")
    problems, files = Problems(), []
    for path in dict.fromkeys((a, b)):
        with problems.collect():
            files.append(ResultFile.load_json(path))
    problems.check()
    one, two = files[0], files[-1]
    for key in SHARED:
        seen = [file.protocol.get(key) for file in (one, two)]
        if seen[0] != seen[1]:
            raise AmpError(
                f"{a} and {b}: {key} is {seen[0]!r} and {seen[1]!r}, expected equal values; evaluate both on the same "
                "split with the same search settings"
            )
    rows, sides = [], []
    for path, file, words in ((a, one, a_row), (b, two, b_row)):
        with problems.collect():
            row = file.find(words, path)
            queries = load_queries(Path(path).with_suffix(".npz"))
            rows.append(row)
            sides.append({direction: queries[row.key, direction] for direction in DIRECTIONS})
    problems.check()
    for direction in DIRECTIONS:
        if not np.array_equal(sides[0][direction].queries, sides[1][direction].queries):
            raise AmpError(
                f"{a} and {b}: the {direction} queries differ, expected the same; evaluate both with the same "
                "--search.max_queries"
            )
    fold = None
    if one.protocol.get("folds", 1) > 1:
        fold = np.arange(one.protocol["images"]) * one.protocol["folds"] // one.protocol["images"]
    samples = [
        resampled_recalls([s[d].ranks for d in DIRECTIONS], [s[d].images for d in DIRECTIONS], bootstrap, fold, seed)
        for s in sides
    ]
    change, differences = samples[1] - samples[0], []
    for index, direction in enumerate(DIRECTIONS):
        for column, k in enumerate(KS):
            hits = [s[direction].ranks < k for s in sides]
            recall = [getattr(row, direction).recall[k] for row in rows]
            low, high = interval(change[:, index, column])
            differences.append(
                Difference(
                    f"{direction} R@{k}",
                    recall[0],
                    recall[1],
                    low,
                    high,
                    _two_sided(change[:, index, column]),
                    int((hits[1] & ~hits[0]).sum()),
                    int((hits[0] & ~hits[1]).sum()),
                )
            )
    total = change.sum(axis=(1, 2))
    differences.append(Difference("Rsum", rows[0].rsum, rows[1].rsum, *interval(total), _two_sided(total)))
    return Comparison(rows[0].name, rows[1].name, (Path(a).name, Path(b).name), bootstrap, differences)


def _two_sided(change: np.ndarray) -> float:
    # Samples at zero count for both signs, so equal rows have p = 1.
    return min(1.0, 2.0 * min(float((change <= 0).mean()), float((change >= 0).mean())))
