"""Scores knowledge against hand-labelled captions: precision, recall and F1 of the triplets, and a check of the states.

Write the labelled captions to a captions file, generate their knowledge with any engine, then score it::

    python tools/score_knowledge.py --write_captions gold.csv
    amp generate_knowledge --captions gold.csv --out runs/gold/rules
    python tools/score_knowledge.py --knowledge runs/gold/rules/knowledge.jsonl

A second labeller's file gives the agreement of the two. Prompts are chosen on `--labels benchmarks/development.yaml`.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from amp.errors import exit_on_error

with exit_on_error():
    from amp.data.captions.text_file import jsonl_objects
    from amp.errors import AmpError
    from amp.files import check_writable, write_atomically
    from amp.generation.replies import triplet_line
    from amp.generation.score import GoldCaption, good_states, load_gold, score_triplets
    from amp.knowledge.schema import Knowledge, parse_knowledge


@exit_on_error()
def main(arguments: list[str] | None = None) -> None:
    from amp.command_line import CommandLine
    from amp.terminal import PlainConsole

    parser = CommandLine(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--knowledge", type=str | None, help="knowledge.jsonl of the labelled captions, or a YAML file of other labels"
    )
    parser.add_argument(
        "--labels", type=str | None, help="YAML file of labelled captions; null takes the 213 captions of this project"
    )
    parser.add_argument(
        "--write_captions", type=str | None, help="CSV file to write the labelled captions to, instead of scoring"
    )
    parser.add_argument(
        "--worst", type=int, default=0, help="number of captions with the most mistakes and misses to show"
    )
    parser.add_argument("--out", type=str | None, help="JSON file for the figures; null writes none")
    options = parser.parse_args(arguments)
    console = PlainConsole(soft_wrap=True, highlight=False)
    gold = load_gold(Path(options.labels)) if options.labels else load_gold()
    if (options.knowledge is None) == (options.write_captions is None):
        raise AmpError("expected either --knowledge or --write_captions; give one of them")
    if options.write_captions is not None:
        write_captions(gold, Path(options.write_captions))
        console.print(f"{len(gold)} captions written to {options.write_captions}")
        return
    if options.out:
        check_writable(options.out)
    found = read_knowledge(Path(options.knowledge), gold)
    figures = show(found, gold, console)
    if options.worst:
        show_worst(found, gold, options.worst, console)
    if options.out:
        write_atomically(options.out, f"{json.dumps(figures, indent=1)}\n".encode())


def write_captions(gold: list[GoldCaption], path: Path) -> None:
    """Writes a captions file with one row per labelled caption, in the order of the gold file."""
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["image", "caption", "split"])
    rows.writerows([f"gold-{number:03d}.jpg", label.caption, "test"] for number, label in enumerate(gold))
    write_atomically(path, text.getvalue().encode())


def read_knowledge(path: Path, gold: list[GoldCaption]) -> list[Knowledge]:
    """Reads the knowledge of each labelled caption, in order.

    Raises:
        AmpError: A caption has no record.
    """
    by_caption = {}
    if path.suffix in (".yaml", ".yml"):
        for label in load_gold(path):
            by_caption[label.caption] = Knowledge(label.triplets, ("",) * len(label.triplets))
    else:
        for number, record in jsonl_objects(path):
            by_caption[record.get("caption")] = parse_knowledge(record, f"{path} line {number}")
    missing = [label.caption for label in gold if label.caption not in by_caption]
    if missing:
        raise AmpError(
            f"{path}: no record for {len(missing)} of {len(gold)} labelled captions, the first is {missing[0]!r}; "
            "expected one record with 'caption' for each; generate them from the file that --write_captions writes"
        )
    return [by_caption[label.caption] for label in gold]


def show(found: list[Knowledge], gold: list[GoldCaption], console) -> dict:
    """Prints the table and returns its figures."""
    from rich.table import Table

    table = Table(
        "triplets", "match", "precision", "recall", "F1", "95 % of F1", "hits", "mistakes", "swapped", "misses"
    )
    figures: dict = {"captions": len(gold)}
    for kind in (None, "action", "attribute"):
        for level in ("lenient", "exact"):
            score = score_triplets(found, gold, level, kind)
            low, high = score.interval
            table.add_row(
                kind or "all",
                level,
                *(f"{value:.3f}" for value in (score.precision, score.recall, score.f1)),
                f"{low:.3f} - {high:.3f}",
                *(str(count) for count in (score.hits, score.mistakes, score.swapped, score.misses)),
            )
            figures[f"{kind or 'all'} {level}"] = {
                "precision": score.precision,
                "recall": score.recall,
                "f1": score.f1,
                "interval": score.interval,
                "swapped": score.swapped,
            }
    console.print(table)
    states = [good for item, label in zip(found, gold, strict=True) for good in good_states(item, label.caption)]
    if any(any(item.states) for item in found):
        figures["states"] = {"count": len(states), "good": sum(states)}
        console.print(
            f"{sum(states)} of {len(states)} states have a good form and are about their triplet (truth is not checked)"
        )
    return figures


def show_worst(found: list[Knowledge], gold: list[GoldCaption], count: int, console) -> None:
    """Prints the captions with the most mistakes and misses."""
    errors = []
    for item, label in zip(found, gold, strict=True):
        score = score_triplets([item], [label])
        errors.append((score.mistakes + score.misses, label, item))
    for number, label, item in sorted(errors, key=lambda error: -error[0])[:count]:
        console.print(f"\n{label.caption}  ({number} wrong)", markup=False)
        console.print("  found:    " + "; ".join(map(triplet_line, item.triplets)), markup=False)
        console.print("  labelled: " + "; ".join(map(triplet_line, label.triplets)), markup=False)


if __name__ == "__main__":
    main()
