"""Settings of a sweep: tables of rows, each a configuration that is trained and evaluated once per seed."""

from dataclasses import dataclass, field
from typing import Any

from amp.errors import AmpError


@dataclass
class Row:
    """One row of a table.

    Args:
        name: Name of the row in the table.
        configs: Configuration files applied after the sweep's `base`, in this order.
        set: Dotted keys of amp train, applied after the files.
        paper: The paper's six recalls, i2t R@1, 5, 10 and t2i R@1, 5, 10, in percent; null shows none.
        evaluate: Dotted keys of amp evaluate for this row, applied after the sweep's, such as its probes.
        train: Whether the row is trained; false for the base CLIP, which every evaluation contains.
    """

    name: str
    configs: list[str] = field(default_factory=list)
    set: dict[str, Any] = field(default_factory=dict)
    paper: list[float] | None = None
    evaluate: dict[str, Any] = field(default_factory=dict)
    train: bool = True


@dataclass
class Table:
    """Rows shown in one table.

    Args:
        title: Title of the table.
        rows: Rows in order. Rows with equal configurations are trained once, also across tables.
    """

    title: str
    rows: list[Row]


@dataclass
class SweepConfig:
    """A sweep.

    Args:
        tables: Tables of the results.
        base: Configuration files of every run.
        set: Dotted keys of amp train for every run.
        evaluate: Dotted keys of amp evaluate, such as `search.skip_decided: true` or `probes: [grey]`.
        split: Split to evaluate.
        seeds: Random seeds; every row is run once per seed.
        launcher: Command in front of `-m amp.commands.train` that starts training.
        out: Folder of the runs.
        results: Path of the results without a suffix; .csv, .md and .png are written.
        control: Row that the others are compared with, in addition to base CLIP; null for none.
        paper_columns: Dataset and model of the paper's figures.
        rows: Names of the rows to run; empty for all.
        shard: `i/n` runs every n-th missing run, starting with the i-th (0-based); for job arrays.
        dry_run: Print the missing runs, and run nothing.
        report_only: Write the results of finished runs, and run nothing.
    """

    tables: list[Table] = field(default_factory=list)
    base: list[str] = field(default_factory=list)
    set: dict[str, Any] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)
    split: str = "test"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    launcher: list[str] = field(
        default_factory=lambda: ["accelerate", "launch", "--config_file", "launchers/accelerate/one_process.yaml"]
    )
    out: str = "runs/sweep"
    results: str = "results/sweep"
    control: str | None = None
    paper_columns: str = "paper"
    rows: list[str] = field(default_factory=list)
    shard: str = "0/1"
    dry_run: bool = False
    report_only: bool = False

    def check(self) -> None:
        """Raises AmpError if the sweep can't be run or shown."""
        rows = [row for table in self.tables for row in table.rows]
        if not rows or not self.base or not self.seeds:
            raise AmpError(
                "tables, base or seeds is empty, expected at least one of each; add --config launchers/sweeps/FILE"
            )
        names = {row.name for row in rows if row.train}
        for name in [*self.rows, *([self.control] if self.control else [])]:
            if name not in names:
                raise AmpError(f"row {name!r} is in no table, expected one of: {', '.join(sorted(names))}")
        for row in rows:
            if row.paper is not None and len(row.paper) != 6:
                raise AmpError(
                    f"row {row.name!r}: paper has {len(row.paper)} figures, expected 6: i2t R@1 5 10, t2i R@1 5 10"
                )
        if len(set(self.seeds)) < len(self.seeds):
            raise AmpError(f"seeds is {self.seeds}, expected each once")
        self.part()

    def part(self) -> tuple[int, int]:
        """`shard` as (i, n)."""
        try:
            index, count = (int(x) for x in self.shard.split("/"))
        except ValueError:
            index, count = 0, 0
        if not 0 <= index < count:
            raise AmpError(f"shard is {self.shard!r}, expected i/n with 0 <= i < n, such as 0/4")
        return index, count
