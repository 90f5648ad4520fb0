"""Figures of a run as tables, in docs/performance.md each between two comments that name it."""

import re
from collections.abc import Iterable

MARK = re.compile(r"(<!-- figures: ([\w.]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str, figures: dict) -> str:
    """The page with each marked part replaced by its table; parts whose benchmark has not run stay."""

    def replaced(found: re.Match) -> str:
        name = found[2].partition(".")[0]
        if name != "run" and name not in figures:
            return found[0]
        lines = TABLES[found[2]](figures if name == "run" else figures[name])
        return "".join([found[1], *(f"{line}\n" for line in lines), found[3]])

    return MARK.sub(replaced, page)


def of_part(name: str, figures: dict) -> str:
    """All tables of one benchmark."""
    parts = [lines(figures) for key, lines in TABLES.items() if key.partition(".")[0] == name]
    return "\n\n".join("\n".join(lines) for lines in parts)


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


def streams(figures: dict) -> list[str]:
    rows = []
    for workers, row in figures["workers"].items():
        for name, rate in row["images_a_second"].items():
            ratio = row["ratio"].get(f"ours / {name}")
            rows.append([workers, name, spread(rate), ratio, row["worker_MB"].get(name)])
    return table(["workers", "", "images/s", "ours is x times as fast", "a worker's own MB"], rows)


def conversions(figures: dict) -> list[str]:
    rows = [
        [name, spread(rate), figures["ratio"].get(f"{name} / make_shards")]
        for name, rate in figures["images_a_second"].items()
    ]
    return table(["", "images/s", "as fast as make_shards, times"], rows)


def steps(figures: dict) -> list[str]:
    peak, rows = figures["machine"]["matmul_GFLOP_a_second"]["fp32"], []
    for layer, found in figures["layers"].items():
        times = found["times_as_long"]
        for name, row in found["rows"].items():
            rate, share = row["images_a_second"], row["gflop_a_second"] / peak
            rows.append(
                [
                    layer,
                    name,
                    spread(rate),
                    times.get(f"{name} / plain prompt tuning"),
                    times.get(f"contrastive m=2, the equations / {name}"),
                    row["gflop_an_image"],
                    f"{share:.0%}",
                    row.get("kept_MB_an_image"),
                    row.get("kept_MB_by_hand"),
                ]
            )
    return table(
        [
            "l",
            "",
            "images/s",
            "times as long as plain",
            "the equations: times as long",
            "GFLOP an image",
            "of the peak",
            "MB kept an image",
            "the same by hand",
        ],
        rows,
    )


def reranks(figures: dict) -> list[str]:
    rows = []
    for interaction, found in figures["speed"].items():
        for name, rate in found["pairs_a_second"].items():
            rows.append(
                [
                    interaction,
                    name,
                    spread(rate),
                    found["ratio"].get(f"ours / {name}"),
                    found["gflop_a_pair"].get(name),
                    found["ratio_by_work"].get(f"ours / {name}"),
                ]
            )
    return table(["interaction", "", "pairs/s", "ours is x times as fast", "GFLOP a pair", "by work"], rows)


def galleries(figures: dict) -> list[str]:
    head = ["images", "first stage, MB", "re-ranking, MB", "a matrix of all scores, MB"]
    return table(
        head,
        ([f"{x['images']:,}", x["first_stage_MB"], x["rerank_MB"], x["score_matrix_MB"]] for x in figures["memory"]),
    )


def generations(figures: dict) -> list[str]:
    rows = [
        [name, spread(rate), figures["ratio"].get(f"{name} / plain call")]
        for name, rate in figures["captions_a_second"].items()
    ]
    return table(["", "captions/s", "times the plain call"], rows)


def evaluations(figures: dict) -> list[str]:
    work = figures["images"] + figures["captions"]
    return table(["", "seconds", "queries/s"], ([name, x, work / x] for name, x in figures["seconds"].items()))


def sizes(figures: dict) -> list[str]:
    rows = ([name, *found.values()] for name, found in figures["sizes"].items())
    return table(["interaction", "all weights, MB", "trained, MB", "adapter file, MB", "checkpoint, MB"], rows)


def runs(figures: dict) -> list[str]:
    """Of all benchmarks, unlike the others."""
    return table(
        ["", "minutes", "peak resident, MB"],
        ([name, x["minutes"], x["peak_resident_MB"]] for name, x in figures.items()),
    )


def ranks(figures: dict) -> list[str]:
    return table(
        ["ranks", "images/s", "seconds a step"],
        ([n, x["images_a_second"], x["seconds_a_step"]] for n, x in figures["ranks"].items()),
    )


def listed(name: str):
    """A table of the figures that one part holds by name."""

    def lines(figures: dict) -> list[str]:
        rows = ([key.replace("_", " "), f"{x:,}" if isinstance(x, int) else x] for key, x in figures[name].items())
        return table(["", ""], rows)

    return lines


TABLES = {
    "stream.machine": machine,
    "stream": streams,
    "conversion": conversions,
    "step": steps,
    "rerank": reranks,
    "rerank.memory": galleries,
    "generation": generations,
    "scaling": ranks,
    "scaling.plan": listed("plan"),
    "scaling.roofline": listed("roofline"),
    "evaluation": evaluations,
    "step.sizes": sizes,
    "run": runs,
}
