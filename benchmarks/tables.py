"""Formats the figures of a run as Markdown tables and inserts them into docs/performance.md."""

import re
from collections.abc import Iterable
from importlib import import_module

MARK = re.compile(r"(<!-- figures: ([\w.]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str, figures: dict) -> str:
    """Returns the page with each marked part replaced by its table; parts whose benchmark was not run are kept."""

    def replaced(found: re.Match) -> str:
        name = found[2].partition(".")[0]
        if name == "run":
            lines = runs(figures)
        elif name in figures:
            lines = import_module(f"benchmarks.{name}").TABLES[found[2]](figures[name])
        else:
            return found[0]
        return "".join([found[1], *(f"{line}\n" for line in lines), found[3]])

    return MARK.sub(replaced, page)


def of_part(name: str, figures: dict) -> str:
    """Returns all tables of one benchmark."""
    return "\n\n".join("\n".join(lines(figures)) for lines in import_module(f"benchmarks.{name}").TABLES.values())


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """Returns the lines of a Markdown table; the first column is aligned left, the others right."""
    head = list(head)
    rule = "|" + "|".join(["---", *["---:"] * (len(head) - 1)]) + "|"
    return [row_of(head), rule, *map(row_of, rows)]


def row_of(cells: Iterable[object]) -> str:
    return "| " + " | ".join(shown(cell) for cell in cells) + " |"


def shown(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:,.0f}" if cell >= 100 else f"{cell:.3g}"
    return "" if cell is None else str(cell)


def spread(figures: dict) -> str:
    """Formats the median with minimum and maximum."""
    return f"{shown(figures['median'])} ({shown(figures['least'])} to {shown(figures['most'])})"


def machine(figures: dict) -> list[str]:
    found = figures["machine"]
    peak = found["matmul_GFLOP_per_second"]
    return [
        f"{found['processor']}, {found['cores']} cores, {found['threads']} thread, torch {found['torch']}, Python "
        f"{found['python']}; matrix products at {shown(peak['fp32'])} GFLOP/s in fp32, {shown(peak['bf16'])} in bf16, "
        f"copies at {shown(found['copy_GB_per_second'])} GB/s.",
    ]


def runs(figures: dict) -> list[str]:
    """Returns the table of time and memory of all benchmarks."""
    return table(
        ["", "minutes", "peak resident, MB"],
        ([name, x["minutes"], x["peak_resident_MB"]] for name, x in figures.items()),
    )


def listed(name: str):
    """Returns a function that makes a table of names and values from one part of the figures."""

    def lines(figures: dict) -> list[str]:
        rows = ([key.replace("_", " "), f"{x:,}" if isinstance(x, int) else x] for key, x in figures[name].items())
        return table(["", ""], rows)

    return lines
