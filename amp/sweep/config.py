"""What a sweep runs: tables of rows, each a configuration that is trained and evaluated once a seed."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from amp.errors import AmpError
from amp.retrieval.evaluate import RetrievalSettings
from amp.retrieval.probes import Probe


@dataclass
class Row:
    """One row of a table.

    Args:
        name: As shown.
        configs: Configuration files laid over the sweep's `base`, in this order.
        set: Keys of launchers/train.py, dotted, over the files.
        paper: The paper's six recalls, i2t R@1, 5, 10 and t2i R@1, 5, 10, in percent; null shows none.
        train: False for the base CLIP, which every evaluation holds.
    """

    name: str
    configs: list[str] = field(default_factory=list)
    set: dict[str, Any] = field(default_factory=dict)
    paper: list[float] | None = None
    train: bool = True


@dataclass
class Table:
    """Rows that are read together.

    Args:
        title: Of the table.
        rows: In order. Rows with equal configurations are trained once, also across tables.
        columns: What the paper's figures were measured on, such as "COCO 5K, ViT-B/16".
    """

    title: str
    rows: list[Row]
    columns: str = ""


@dataclass
class SweepConfig:
    """A sweep.

    Args:
        name: Of the sweep; names the folders that aren't given.
        tables: What is shown.
        base: Configuration files of every run.
        set: Keys of launchers/train.py for every run, dotted.
        split: Split that is evaluated.
        search: How the split is searched.
        i2t: Way of conditioning image queries that the tables show, one of `search.i2t`.
        probes: Rows with one input spoilt, as of launchers/evaluate.py.
        text_only: Add the text-only control.
        seeds: Seeds of every row.
        launcher: Command that starts training, before ``launchers/train.py``.
        out: Folder of the runs; null takes ``runs/sweep-NAME``.
        results: Path of the results without ending: .csv, .md and .png are written; null takes ``results/NAME``.
        control: Row that gains are also measured against; null for none.
        rows: Names of the rows to run; empty for all.
        shard: ``i/n`` runs every n-th run from the i-th on (from 0), for job arrays.
        dry_run: Say what is missing and run nothing.
        report_only: Write the results of what is there and run nothing.
        rerun_changed: Delete what a run's folder holds of another configuration and run it anew.
    """

    name: str = "sweep"
    tables: list[Table] = field(default_factory=list)
    base: list[str] = field(default_factory=list)
    set: dict[str, Any] = field(default_factory=dict)
    split: str = "test"
    search: RetrievalSettings = field(default_factory=RetrievalSettings)
    i2t: Literal["pairwise", "pooled"] = "pairwise"
    probes: list[Probe] = field(default_factory=list)
    text_only: bool = False
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    launcher: list[str] = field(
        default_factory=lambda: ["accelerate", "launch", "--config_file", "launchers/accelerate/one_process.yaml"]
    )
    out: str | None = None
    results: str | None = None
    control: str | None = None
    rows: list[str] = field(default_factory=list)
    shard: str = "0/1"
    dry_run: bool = False
    report_only: bool = False
    rerun_changed: bool = False

    @property
    def folder(self) -> Path:
        """Folder of the runs."""
        return Path(self.out or f"runs/sweep-{self.name}")

    @property
    def results_path(self) -> Path:
        """Path of the results without ending."""
        return Path(self.results or f"results/{self.name}")

    def check(self) -> None:
        """Raises AmpError where the sweep can't be run or shown."""
        rows = [row for table in self.tables for row in table.rows]
        for key, value in {"tables": rows, "base": self.base, "seeds": self.seeds, "launcher": self.launcher}.items():
            if not value:
                raise AmpError(f"{key} is empty, expected one entry at least; add --sweep launchers/sweeps/FILE")
        if len(set(self.seeds)) < len(self.seeds):
            raise AmpError(f"seeds is {self.seeds}, expected each once")
        names = {row.name for row in rows if row.train}
        for key, wanted in {"rows": self.rows, "control": [self.control] if self.control else []}.items():
            for name in wanted:
                if name not in names:
                    raise AmpError(
                        f"{key} names {name!r}, which no table trains, expected one of: {', '.join(sorted(names))}"
                    )
        for row in rows:
            if row.paper is not None and len(row.paper) != 6:
                raise AmpError(
                    f"row {row.name!r}: paper has {len(row.paper)} figures, expected 6: i2t R@1 5 10, t2i R@1 5 10"
                )
            if not row.train and (row.configs or row.set):
                raise AmpError(
                    f"row {row.name!r}: train is false and configs or set aren't empty, expected neither: an untrained "
                    "row shows the base CLIP of all runs"
                )
            for key in ("seed", "out"):
                if key in {**self.set, **row.set}:
                    raise AmpError(f"row {row.name!r}: set holds {key!r}, expected it in the sweep's `seeds` or `out`")
        if self.i2t not in self.search.i2t:
            raise AmpError(f"i2t is {self.i2t!r}, expected one of search.i2t, {self.search.i2t}")
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
