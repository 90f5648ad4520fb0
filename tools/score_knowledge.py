"""Score knowledge against captions labelled by hand: precision, recall and F1 of the triplets, a check of the states.

First the labelled captions as a captions file, then knowledge for them by any engine, then the score::

    python tools/score_knowledge.py --write_captions gold.csv
    amp generate_knowledge --captions gold.csv --out runs/gold/rules
    python tools/score_knowledge.py --knowledge runs/gold/rules/knowledge.jsonl
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
    parser.add_argument("--knowledge", type=str | None, help="knowledge.jsonl of the labelled captions")
    parser.add_argument("--write_captions", type=str | None, help="write the labelled captions to this CSV instead")
    parser.add_argument("--worst", type=int, default=0, help="show so many captions with the most mistakes and misses")
    parser.add_argument("--out", type=str | None, help="JSON file for the figures")
    options = parser.parse_args(arguments)
    console = PlainConsole(soft_wrap=True, highlight=False)
    gold = load_gold()
    if (options.knowledge is None) == (options.write_captions is None):
        raise AmpError("expected one of --knowledge and --write_captions; give it")
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
    """A captions file whose data row numbers are the places in the gold file."""
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["image", "caption", "split"])
    rows.writerows([f"gold-{number:03d}.jpg", label.caption, "test"] for number, label in enumerate(gold))
    write_atomically(path, text.getvalue().encode())


def read_knowledge(path: Path, gold: list[GoldCaption]) -> list[Knowledge]:
    """The knowledge of each labelled caption, in order.

    Raises:
        AmpError: a caption without a record.
    """
    by_caption = {}
    for number, record in jsonl_objects(path):
        by_caption[record.get("caption")] = parse_knowledge(record, f"{path} line {number}")
    missing = [label.caption for label in gold if label.caption not in by_caption]
    if missing:
        raise AmpError(
            f"{path}: no record for {len(missing)} of {len(gold)} labelled captions, the first {missing[0]!r}; "
            "expected one each with 'caption'; generate it for the file that --write_captions writes"
        )
    return [by_caption[label.caption] for label in gold]


def show(found: list[Knowledge], gold: list[GoldCaption], console) -> dict:
    """Prints the table and returns its figures."""
    from rich.table import Table

    table = Table("triplets", "match", "precision", "recall", "F1", "95 % of F1", "hits", "mistakes", "misses")
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
                *(str(count) for count in (score.hits, score.mistakes, score.misses)),
            )
            figures[f"{kind or 'all'} {level}"] = {
                "precision": score.precision,
                "recall": score.recall,
                "f1": score.f1,
                "interval": score.interval,
            }
    console.print(table)
    states = [good for item, label in zip(found, gold, strict=True) for good in good_states(item, label.caption)]
    figures["states"] = {"count": len(states), "good": sum(states)}
    console.print(f"{sum(states)} of {len(states)} states of good form and about their triplet (not: true)")
    return figures


def show_worst(found: list[Knowledge], gold: list[GoldCaption], count: int, console) -> None:
    """The captions with the most mistakes and misses."""
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
