"""Result files of evaluations: rows of recall in both directions, and their protocol, as JSON and CSV."""

import csv
import io
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from amp.csv_cell import csv_cell
from amp.errors import AmpError
from amp.files import sha256_of, write_atomically
from amp.json_text import parse_json
from amp.retrieval.figures import FIGURES, DirectionResult, RetrievalRow, RowKey

FORMAT = "open-clip-amp retrieval results"
VERSION = 1
DIRECTIONS = ("i2t", "t2i")


@dataclass
class ResultFile:
    """Rows that share a protocol.

    Args:
        protocol: Data and settings of the evaluation, any keys with JSON values. These are shown under the table if
            present: dataset, split, images, captions; model, top_k, fusion_weight, resize, image_size, precision, seed.
        rows: One per method, mode and probe, in the order of the table.
    """

    protocol: dict
    rows: list[RetrievalRow] = field(default_factory=list)

    def find(self, words: str, where: str | os.PathLike) -> RetrievalRow:
        """Finds a row by its name in tables, such as "ours (pairwise)", or by its method.

        Args:
            words: Name of a row, or of a method that has only one row without a probe.
            where: Name of this file for error messages.

        Raises:
            AmpError: No row or several rows match. The message lists the rows.
        """
        found = [row for row in self.rows if row.name == words]
        found = found or [row for row in self.rows if row.key.method == words and not row.key.probe]
        if len(found) != 1:
            names = ", ".join(repr(row.name) for row in self.rows)
            raise AmpError(f"{where}: {'several rows' if found else 'no row'} {words!r}, expected one of {names}")
        return found[0]

    def save_json(self, path: str | os.PathLike) -> Path:
        """Writes protocol and rows, unrounded.

        Raises:
            AmpError: A value of the protocol can't be stored as JSON, or the path can't be written.
        """
        rows = []
        for row in self.rows:
            entry: dict[str, Any] = {"name": row.name, **row.key._asdict()}
            for name in DIRECTIONS:
                direction = getattr(row, name)
                entry[name] = asdict(direction) | {"queries_per_second": direction.queries_per_second}
                for figures in (*FIGURES, *(["interval"] if direction.interval else [])):
                    entry[name][figures] = {f"R@{k}": value for k, value in entry[name][figures].items()}
            rows.append(entry | {"rsum": row.rsum, "rsum_interval": row.rsum_interval})
        content = {"format": FORMAT, "version": VERSION, "protocol": self.protocol, "rows": rows}
        try:
            text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise AmpError(f"{path}: the protocol contains a value that can't be stored as JSON ({error})") from error
        return write_atomically(path, f"{text}\n".encode())

    def check_adapter(self, adapter: str | os.PathLike, where: str | os.PathLike) -> None:
        """Raises `AmpError` if no row was made with this adapter; `where` names this file in the message."""
        if sha256_of(Path(adapter)) not in self.protocol.get("adapters", {}).values():
            raise AmpError(
                f"{where}: no row was made with {adapter}, expected results of this adapter; run amp evaluate with it"
            )

    @classmethod
    def load_json(cls, path: str | os.PathLike) -> "ResultFile":
        """Reads a file written by `save_json`.

        Raises:
            AmpError: The file is missing, has another format, or contains impossible figures.
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
                i2t, t2i = (_read_direction(entry[name]) for name in DIRECTIONS)
                interval = entry.get("rsum_interval")
                # Files of earlier versions have only the name.
                key = [str(entry[name]) for name in RowKey._fields if name in entry] or [str(entry["name"])]
                result.rows.append(RetrievalRow(RowKey(*key), i2t, t2i, interval and tuple(interval)))
        except KeyError as error:
            raise AmpError(f"{path}: {where}: key {error} is missing; {again}") from error
        except (AmpError, TypeError, ValueError, AttributeError) as error:
            raise AmpError(f"{path}: {where}: {error}; {again}") from error
        return result

    def save_csv(self, path: str | os.PathLike) -> Path:
        """Writes one line per row, with percentages to two decimals and without the protocol."""
        header = ["method"]
        lines = []
        for row in self.rows:
            line = {"method": csv_cell(row.name)}
            for name in DIRECTIONS:
                line |= {f"{name}_R@{k}": f"{value:.2f}" for k, value in getattr(row, name).recall.items()}
            line["Rsum"] = f"{row.rsum:.2f}"
            for name in DIRECTIONS:
                direction = getattr(row, name)
                line |= {f"{name}_ceiling_R@{k}": f"{value:.2f}" for k, value in direction.ceiling.items()}
                line |= {f"{name}_chance_R@{k}": f"{value:.2f}" for k, value in direction.chance.items()}
                line |= {f"{name}_queries": direction.queries, f"{name}_top_k": direction.top_k}
                line |= {f"{name}_seconds": f"{direction.seconds:.2f}"}
                line |= {f"{name}_queries_per_second": f"{direction.queries_per_second:.4g}"}
            for name in DIRECTIONS:
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
