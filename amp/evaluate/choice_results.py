"""Results of caption-choice tests, as CSV and as a table on the terminal."""

import csv
import io
import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from amp.csv_cell import csv_cell
from amp.evaluate.choice import Choices
from amp.files import write_atomically
from amp.retrieval.figures import BASE


def save_choices(path: str | os.PathLike, tests: dict[str, dict[str, Choices]]) -> Path:
    """Writes one line per test, method and group. The group "all" comes first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("test", "method", "group", "choices", "right", "accuracy"))
    for test, methods in tests.items():
        for name, found in methods.items():
            groups = {"all": (len(found.scores), sum(found.right)), **found.by_group()}
            for group, (count, right) in groups.items():
                if group:
                    writer.writerow((*map(csv_cell, (test, name, group)), count, right, f"{100 * right / count:.2f}"))
    return write_atomically(path, text.getvalue().encode())


def save_skipped(path: str | os.PathLike, tests: dict[str, dict[str, str]]) -> Path:
    """Writes one line per skipped entry or photo of each test, with the reason."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("test", "skipped", "reason"))
    for test, skipped in tests.items():
        writer.writerows(map(csv_cell, (test, *line)) for line in skipped.items())
    return write_atomically(path, text.getvalue().encode())


def print_choices(results: dict[str, dict[str, Choices]], console: Console) -> None:
    """Prints one line per test and method."""
    table = Table("test", "method", "choices", "accuracy", "mean of groups", "fixed", "broken")
    for test, methods in results.items():
        base_right = methods[BASE.method].right
        for method, found in methods.items():
            changes = [(a, b) for a, b in zip(base_right, found.right, strict=True) if a != b]
            fixed = sum(new for _, new in changes)
            table.add_row(
                test,
                method,
                f"{len(found.right):,}",
                f"{found.accuracy:.1f}",
                f"{found.group_mean:.1f}",
                f"{fixed:,}",
                f"{len(changes) - fixed:,}",
            )
    console.print(table)
