"""The result of an evaluation: rows of recall in both directions, as a table, as JSON and as CSV."""

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from amp.csv_cell import csv_cell
from amp.errors import AmpError, printable
from amp.files import sha256_of, write_atomically
from amp.json_text import parse_json
from amp.retrieval.figures import FIGURES, DirectionResult, RetrievalRow, RowKey
from amp.retrieval.metrics import KS, rsum

FORMAT = "open-clip-amp retrieval results"
VERSION = 1
_DIRECTIONS = ("i2t", "t2i")
# What the two lines under the table show of the protocol: what was searched, then how. The file holds the rest too.
_DATA_KEYS = ("dataset", "split", "images", "captions")
_METHOD_KEYS = ("model", "top_k", "fusion_weight", "resize", "image_size", "precision", "seed")
_BARE_KEYS = ("dataset", "split", "model")


@dataclass
class ResultFile:
    """Rows that share a protocol.

    Args:
        protocol: What was searched and how: any keys with JSON values. Shown under the table, if present:
            dataset, split, images, captions; model, top_k, fusion_weight, resize, image_size, precision, seed.
        rows: One a method, in the order of the table.
    """

    protocol: dict
    rows: list[RetrievalRow] = field(default_factory=list)

    def save_json(self, path: str | os.PathLike) -> Path:
        """Writes everything, unrounded.

        Raises:
            AmpError: A protocol value is not JSON, or the path can't be written.
        """
        rows = []
        for row in self.rows:
            entry: dict[str, Any] = {"name": row.name, **row.key._asdict()}
            for name in _DIRECTIONS:
                direction = getattr(row, name)
                entry[name] = asdict(direction) | {"queries_per_second": direction.queries_per_second}
                for figures in (*FIGURES, *(["interval"] if direction.interval else [])):
                    entry[name][figures] = {f"R@{k}": value for k, value in entry[name][figures].items()}
            rows.append(entry | {"rsum": row.rsum, "rsum_interval": row.rsum_interval})
        content = {"format": FORMAT, "version": VERSION, "protocol": self.protocol, "rows": rows}
        try:
            text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise AmpError(f"{path}: the protocol holds a value that JSON can't ({error})") from error
        return write_atomically(path, f"{text}\n".encode())

    def check_adapter(self, adapter: str | os.PathLike, where: str | os.PathLike) -> None:
        """Refuses an adapter that no row was made with; `where` names this file."""
        if sha256_of(Path(adapter)) not in self.protocol.get("adapters", {}).values():
            raise AmpError(
                f"{where}: no row of it was made with {adapter}, expected that adapter's evaluation; evaluate it"
            )

    @classmethod
    def load_json(cls, path: str | os.PathLike) -> "ResultFile":
        """Reads what `save_json` wrote.

        Raises:
            AmpError: The file is missing, isn't such a file, or holds figures that no evaluation can give.
        """
        path = Path(path)
        again = "write it again with amp evaluate"
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise AmpError(f"{path}: can't be read ({error.strerror}), expected a results file; {again}") from error
        except ValueError as error:
            raise AmpError(f"{path}: not JSON ({error}), expected a results file; {again}") from error
        found = (content.get("format"), content.get("version")) if isinstance(content, dict) else type(content).__name__
        if found != (FORMAT, VERSION):
            raise AmpError(f"{path}: format and version are {found}, expected {(FORMAT, VERSION)}; {again}")
        where = "protocol"
        try:
            result = cls(dict(content["protocol"]))
            where = "rows"
            for number, entry in enumerate(content["rows"]):
                where = f"rows[{number}]"
                i2t, t2i = (_read_direction(entry[name]) for name in _DIRECTIONS)
                interval = entry.get("rsum_interval")
                # Files of earlier versions have the name only.
                key = [str(entry[name]) for name in RowKey._fields if name in entry] or [str(entry["name"])]
                result.rows.append(RetrievalRow(RowKey(*key), i2t, t2i, interval and tuple(interval)))
        except KeyError as error:
            raise AmpError(f"{path}: {where}: key {error} is missing; {again}") from error
        except (AmpError, TypeError, ValueError, AttributeError) as error:
            raise AmpError(f"{path}: {where}: {error}; {again}") from error
        return result

    def save_csv(self, path: str | os.PathLike) -> Path:
        """Writes one line a method, percentages to two decimals; the protocol is in the JSON only."""
        header = ["method"]
        lines = []
        for row in self.rows:
            line = {"method": csv_cell(row.name)}
            for name in _DIRECTIONS:
                line |= {f"{name}_R@{k}": f"{value:.2f}" for k, value in getattr(row, name).recall.items()}
            line["Rsum"] = f"{row.rsum:.2f}"
            for name in _DIRECTIONS:
                direction = getattr(row, name)
                line |= {f"{name}_ceiling_R@{k}": f"{value:.2f}" for k, value in direction.ceiling.items()}
                line |= {f"{name}_chance_R@{k}": f"{value:.2f}" for k, value in direction.chance.items()}
                line |= {f"{name}_queries": direction.queries, f"{name}_top_k": direction.top_k}
                line |= {f"{name}_seconds": f"{direction.seconds:.2f}"}
                line |= {f"{name}_queries_per_second": f"{direction.queries_per_second:.4g}"}
            for name in _DIRECTIONS:
                for k, (low, high) in (getattr(row, name).interval or {}).items():
                    line |= {f"{name}_low_R@{k}": f"{low:.2f}", f"{name}_high_R@{k}": f"{high:.2f}"}
            if row.rsum_interval:
                line |= {f"Rsum_{side}": f"{x:.2f}" for side, x in zip(("low", "high"), row.rsum_interval, strict=True)}
            header = list(dict.fromkeys([*header, *line]))
            lines.append(line)
        text = io.StringIO()
        writer = csv.DictWriter(text, header, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return write_atomically(path, text.getvalue().encode())

    def print_table(self, console: Console | None = None) -> None:
        """Prints the rows with the best of each column in bold and queries a second, then ceiling, chance and protocol.

        Args:
            console: Where to print; standard output if None.
        """
        console = console or Console()
        table = Table(box=None, header_style="bold", pad_edge=False, title_justify="left")
        table.add_column("method", overflow="fold")
        for name in _DIRECTIONS:
            for k in KS:
                table.add_column(f"{name}\nR@{k}", justify="right", no_wrap=True)
        table.add_column("\nRsum", justify="right", no_wrap=True)
        for name in _DIRECTIONS:
            table.add_column(f"{name}\nq/s", justify="right", no_wrap=True)

        methods = [(row.name, row.i2t.recall, row.t2i.recall) for row in self.rows]
        # Compared as printed, so that two equal figures are both bold or both not.
        figures = [_figures(i2t, t2i) for _, i2t, t2i in methods]
        best = [max(column) for column in zip(*figures, strict=True)] if len(figures) > 1 else None
        for row, values in zip(self.rows, figures, strict=True):
            cells = [
                Text(f"{value:.1f}", style="bold" if best and value == best[i] else "")
                for i, value in enumerate(values)
            ]
            speeds = [_speed(side.queries_per_second) for side in (row.i2t, row.t2i)]
            table.add_row(Text(printable(row.name)), *cells, *speeds)
        if self.rows:
            table.add_section()
        for label, i2t, t2i in self._references():
            table.add_row(Text(printable(label)), *(f"{value:.1f}" for value in _figures(i2t, t2i)), style="dim")
        console.print(table)
        if any(row.rsum_interval for row in self.rows):
            console.print(self._intervals())
        for line in self.protocol_lines():
            console.print(Text(printable(line), style="dim"))

    def _intervals(self) -> Table:
        """Half the width of each interval; its ends, seldom far from symmetric, are in the files."""
        table = Table(box=None, header_style="bold", pad_edge=False, title_justify="left")
        table.add_column("half width of the\n95 % interval", overflow="fold")
        for name in _DIRECTIONS:
            for k in KS:
                table.add_column(f"{name}\nR@{k}", justify="right", no_wrap=True)
        table.add_column("\nRsum", justify="right", no_wrap=True)
        for row in self.rows:
            if row.rsum_interval and row.i2t.interval and row.t2i.interval:
                bounds = [*row.i2t.interval.values(), *row.t2i.interval.values(), row.rsum_interval]
                table.add_row(
                    Text(printable(row.name)), *(f"±{(high - low) / 2:.1f}" for low, high in bounds), style="dim"
                )
        return table

    def _references(self) -> list[tuple[str, dict, dict]]:
        """Ceiling and chance, once for each pre-selection among the rows (usually all share one)."""
        first_rows: dict[tuple, RetrievalRow] = {}
        for row in self.rows:
            key = tuple(tuple(d.values()) for side in (row.i2t, row.t2i) for d in (side.ceiling, side.chance))
            first_rows.setdefault(key, row)
        references = []
        for row in first_rows.values():
            ks = dict.fromkeys((row.i2t.top_k, row.t2i.top_k))
            of = "top " + "/".join(str(k) for k in ks) + (f", {row.name}" if len(first_rows) > 1 else "")
            references.append((f"ceiling ({of})", row.i2t.ceiling, row.t2i.ceiling))
            references.append((f"chance ({of})", row.i2t.chance, row.t2i.chance))
        return references

    def protocol_lines(self) -> tuple[str, ...]:
        """The protocol in two short lines: what was searched, and how; empty ones are left out. A third line names rows
        that are missing because the evaluation has not ended."""
        lines = []
        for keys in (_DATA_KEYS, _METHOD_KEYS):
            parts = [_protocol_part(key, self.protocol[key]) for key in keys if self.protocol.get(key) is not None]
            lines.append(" · ".join(parts))
        if missing := self.protocol.get("missing_rows"):
            lines.append(f"incomplete, {len(missing)} rows are missing: {', '.join(map(str, missing))}")
        return tuple(line for line in lines if line)


def _read_direction(entry: dict) -> DirectionResult:
    figures = {name: {int(k.removeprefix("R@")): float(v) for k, v in entry[name].items()} for name in FIGURES}
    interval = entry.get("interval")
    if interval is not None:
        interval = {int(k.removeprefix("R@")): (float(low), float(high)) for k, (low, high) in interval.items()}
    return DirectionResult(
        **figures,
        queries=int(entry["queries"]),
        top_k=int(entry["top_k"]),
        seconds=float(entry["seconds"]),
        interval=interval,
    )


def _figures(i2t: dict[int, float], t2i: dict[int, float]) -> Sequence[float]:
    return [round(value, 1) for value in (*i2t.values(), *t2i.values(), rsum(i2t, t2i))]


def _speed(queries_per_second: float) -> str:
    """Short enough for a table of 80 columns: 4.6, 53, 5584, 30k."""
    if queries_per_second < 10:
        return f"{queries_per_second:.1f}"
    return f"{queries_per_second:.0f}" if queries_per_second < 10_000 else f"{queries_per_second / 1000:.0f}k"


def _protocol_part(key: str, value: object) -> str:
    if key in _BARE_KEYS:
        return str(value)
    if key in ("images", "captions") and isinstance(value, int):
        return f"{value:,} {key}"
    return f"{key.replace('_', ' ')} {value}"
