"""Figures of a run as tables, in docs/performance.md each between two comments that name it."""

import re
from collections.abc import Iterable
from importlib import import_module

MARK = re.compile(r"(<!-- figures: ([\w.]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str, figures: dict) -> str:
    """The page with each marked part replaced by its table; parts whose benchmark has not run stay."""

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
    """All tables of one benchmark."""
    return "\n\n".join("\n".join(lines(figures)) for lines in import_module(f"benchmarks.{name}").TABLES.values())


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """Lines of a Markdown table, its first column left, the others right."""
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
    """The median with the least and the most."""
    return f"{shown(figures['median'])} ({shown(figures['least'])} to {shown(figures['most'])})"


def machine(figures: dict) -> list[str]:
    found = figures["machine"]
    peak = found["matmul_GFLOP_a_second"]
    return [
        f"{found['processor']}, {found['cores']} cores, {found['threads']} thread, torch {found['torch']}, Python "
        f"{found['python']}; matrix products at {shown(peak['fp32'])} GFLOP/s in fp32, {shown(peak['bf16'])} in bf16, "
        f"copies at {shown(found['copy_GB_a_second'])} GB/s.",
    ]


def runs(figures: dict) -> list[str]:
    """Of all benchmarks, unlike the others."""
    return table(
        ["", "minutes", "peak resident, MB"],
        ([name, x["minutes"], x["peak_resident_MB"]] for name, x in figures.items()),
    )


def listed(name: str):
    """A table of the figures that one part holds by name."""

    def lines(figures: dict) -> list[str]:
        rows = ([key.replace("_", " "), f"{x:,}" if isinstance(x, int) else x] for key, x in figures[name].items())
        return table(["", ""], rows)

    return lines
