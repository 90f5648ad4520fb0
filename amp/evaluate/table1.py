"""Table 1 of the paper next to open_clip's published figures and our own runs, with inconsistencies marked."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from amp.errors import AmpError, Problems, printable
from amp.evaluate.results import ResultFile

DATASETS = {"coco": "COCO 5K", "flickr30k": "Flickr30K 1K"}
FIGURES = ("i2t R@1", "i2t R@5", "i2t R@10", "t2i R@1", "t2i R@5", "t2i R@10", "Rsum")
ROUNDING = 0.35  # largest difference between a printed Rsum and the sum of six figures rounded to 0.1
FAR = 0.5  # points of difference from open_clip's figure above which a baseline is reported
CONFIGS = "launchers/configs"

Figures = list[float | None]


@dataclass
class Row:
    """A method with one backbone.

    Attributes:
        backbone, method: Names as in the paper.
        id: Name of the result files without suffixes; None for methods that can't be run here.
        base: Model name and weights in open_clip; None if open_clip does not have them.
        figures: Seven figures in the order of `FIGURES`, by dataset and source (`paper`, `open_clip` or `here`).
        training: Configuration and options of our training run, by dataset; empty for methods that we don't train.
    """

    backbone: str
    method: str
    id: str | None
    base: tuple[str, str] | None
    figures: dict[str, dict[str, Figures]]
    training: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.method}, {self.backbone}"


def load_published(path: str | os.PathLike) -> tuple[list[Row], dict[str, str]]:
    """Reads the published figures.

    Returns:
        The rows, and a description of each source.

    Raises:
        AmpError: The file is missing or has another format, or a row does not have seven figures.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        rows = [_row(entry) for entry in content["rows"]]
        sources = dict(content["sources"])
    except OSError as error:
        raise AmpError(f"{path}: can't be read ({error.strerror}), expected the published figures") from error
    except (yaml.YAMLError, RecursionError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AmpError(f"{path}: not a file of published figures ({error})") from error
    for row in rows:
        for dataset, by_source in row.figures.items():
            for source, values in by_source.items():
                if len(values) != len(FIGURES):
                    raise AmpError(
                        f"{path}: {row.name}, {dataset}, {source} has {len(values)} figures, expected {len(FIGURES)}"
                    )
    return rows, sources


def _row(entry: dict) -> Row:
    figures = {d: {k: v for k, v in entry[d].items() if k != "train"} for d in DATASETS}
    training = {d: entry[d]["train"] for d in DATASETS if "train" in entry[d]}
    base = (entry["model"], entry["pretrained"]) if "model" in entry else None
    return Row(entry["backbone"], entry["method"], entry.get("id"), base, figures, training)


def add_results(rows: list[Row], folder: str | os.PathLike) -> list[str]:
    """Adds the figures of the result files FOLDER/ID.DATASET.json, written by `amp evaluate`.

    For methods that we train, the last row of a file is used; for the others, the row of base CLIP.

    Returns:
        Error messages about files that can't be read or lack the row. These files are left out.
    """
    problems = Problems()
    for row in rows:
        for dataset in DATASETS:
            path = Path(folder) / f"{row.id}.{dataset}.json"
            if row.id is not None and path.exists():
                with problems.collect():
                    row.figures[dataset]["here"] = _figures(path, ours=bool(row.training))
    return problems.found


def _figures(path: Path, ours: bool) -> Figures:
    """Reads the figures of base CLIP or, if `ours`, of the last row. The evaluation must be complete."""
    result = ResultFile.load_json(path)
    if missing := result.protocol.get("missing_rows"):
        raise AmpError(f"{path}: {len(missing)} rows are missing, expected all; run the same amp evaluate again")
    if len(result.rows) < 1 + ours:
        raise AmpError(
            f"{path}: has {len(result.rows)} rows, expected base CLIP{' and an adapter' if ours else ''}; "
            "write it again with amp evaluate"
        )
    found = result.rows[-1 if ours else 0]
    return [*found.i2t.recall.values(), *found.t2i.recall.values(), found.rsum]


def commands(rows: list[Row], folder: str) -> list[str]:
    """Returns the commands that produce the missing figures of our own runs."""
    found = []
    for row in rows:
        for dataset in DATASETS:
            if row.id is None or "here" in row.figures[dataset]:
                continue
            out = f"--out {folder}/{row.id}.{dataset}.json"
            if dataset in row.training:
                run = f"runs/{row.id}/{dataset}"
                train = f"--config {CONFIGS}/{row.training[dataset]} --out {run}"
                found.append(f"accelerate launch launchers/train.py {train}")
                found.append(
                    f"accelerate launch -m amp.commands.evaluate {out} --config {run}/config.yaml "
                    f"--search.i2t pairwise --adapters ours={run}/stage2/adapter.safetensors"
                )
            elif row.base is not None:
                name, pretrained = row.base
                model = f"--model.name {name} --model.pretrained {pretrained}"
                found.append(f"amp evaluate --shards data/{dataset} {model} {out}")
    return found


def anomalies(rows: list[Row]) -> list[tuple[Row, str, str]]:
    """Finds inconsistencies in the paper's figures. Returns tuples (row, dataset, description).

    These are: an Rsum that differs from the sum of its figures, two methods with the same three figures in one
    direction, and a baseline that is far from open_clip's figures for the same weights.
    """
    return [*_sums(rows), *_equal_directions(rows), *_far_baselines(rows)]


def _sums(rows: list[Row]) -> Iterator[tuple[Row, str, str]]:
    for row, dataset, values in _of_paper(rows):
        known = [value for value in values if value is not None]
        if len(known) == len(values) and abs(sum(known[:6]) - known[6]) > ROUNDING:
            yield row, dataset, f"Rsum is printed as {known[6]}, its six figures sum to {sum(known[:6]):.1f}"


def _equal_directions(rows: list[Row]) -> Iterator[tuple[Row, str, str]]:
    seen: dict[tuple, Row] = {}
    for row, dataset, values in _of_paper(rows):
        for start, direction in ((0, "i2t"), (3, "t2i")):
            part = tuple(values[start : start + 3])
            if None in part:
                continue
            other = seen.setdefault((dataset, direction, part), row)
            if other is not row:
                text = f"all three {direction} figures equal those of"
                yield row, dataset, f"{text} {other.name}"
                yield other, dataset, f"{text} {row.name}"


def _far_baselines(rows: list[Row]) -> Iterator[tuple[Row, str, str]]:
    for row, dataset, values in _of_paper(rows):
        known = row.figures[dataset].get("open_clip", [None] * len(FIGURES))
        far = [
            f"{name} {a} against {b}"
            for name, a, b in zip(FIGURES, values, known, strict=True)
            if a is not None and b is not None and round(abs(a - b), 1) > FAR
        ]
        if far:
            yield row, dataset, f"more than {FAR} points from open_clip's figure of these weights: {', '.join(far)}"


def _of_paper(rows: list[Row]) -> Iterator[tuple[Row, str, Figures]]:
    for row in rows:
        for dataset in DATASETS:
            if "paper" in row.figures[dataset]:
                yield row, dataset, row.figures[dataset]["paper"]


def render_markdown(rows: list[Row], sources: dict[str, str], left_out: Sequence[str] = ()) -> str:
    """Renders the table as Markdown, one line per row and source, followed by notes on anomalies.

    Args:
        rows: Rows of the table.
        sources: Description of each source.
        left_out: Error messages about result files that are left out.
    """
    found = anomalies(rows)
    notes = {key: number for number, key in enumerate(dict.fromkeys((r.name, d) for r, d, _ in found), start=1)}
    lines = ["# Table 1", ""]
    for dataset, title in DATASETS.items():
        lines += [
            f"## {title}",
            "",
            f"| backbone | method | figures of | {' | '.join(FIGURES)} |",
            f"|---|---|---|{'---:|' * len(FIGURES)}",
        ]
        for row in rows:
            for source in ("paper", "open_clip", "here"):
                # A line for our own runs stays empty until they have been run.
                values = row.figures[dataset].get(source)
                if values is None and (source != "here" or row.id is None):
                    continue
                mark = f" [{notes[row.name, dataset]}]" if source == "paper" and (row.name, dataset) in notes else ""
                cells = ["" if v is None else f"{v:.1f}" for v in values or [None] * len(FIGURES)]
                lines.append(
                    f"| {row.backbone} | {row.method} | {source.replace('_', ' ')}{mark} | {' | '.join(cells)} |"
                )
        lines.append("")
    lines += ["## Inconsistencies in the paper's figures", ""]
    for (name, dataset), number in notes.items():
        what = "; ".join(text for row, d, text in found if (row.name, d) == (name, dataset))
        lines.append(f"- [{number}] {name}, {DATASETS[dataset]}: {what}.")
    if left_out:
        lines += ["", "## Results left out", "", *(f"- {printable(reason)}" for reason in left_out)]
    lines += [
        "",
        "## Sources",
        "",
        *(f"- {name.replace('_', ' ')}: {text}" for name, text in sources.items()),
        "- here: runs of this project; rows without figures have not been run.",
        "",
    ]
    return "\n".join(lines)
