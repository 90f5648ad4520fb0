"""What knowledge of different writers is worth: captions and shards' knowledge for the sweep, and its plot.

    python -m benchmarks.writers captions --source dataset_flickr8k.json --exclude_images pretrain_images.txt \
        --out runs/writers/captions.csv
    python -m benchmarks.writers shuffle --knowledge runs/writers/rules/knowledge.jsonl \
        --out runs/writers/shuffled.jsonl
    python -m benchmarks.writers plot --results results/flickr8k_writers.csv --choices runs/writers/choices.csv \
        --f1 '{"rules": 0.863}' --lines '[base CLIP]' --out results/flickr8k_writers_f1.png
"""

import csv
import io
import json
import random
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from amp.errors import AmpError, exit_on_error

with exit_on_error():
    from jsonargparse import auto_cli

    from amp.data.captions.load import load_captions
    from amp.data.captions.text_file import jsonl_objects
    from amp.files import write_atomically

Points = dict[str, dict[str, tuple[float, float]]]  # row -> measure -> (mean, standard error), in percent
MEASURES = (("i2t R@1", "t2i R@1"), ("swapped-roles", "swapped-actions"))


def captions(source: str, out: Path, exclude_images: Path | None = None, train: int = 1000, test: int = 500) -> None:
    """Chooses photos with one caption each, since a slow language model can't write for five.

    Args:
        source: Captions file with the splits train and test.
        out: CSV file of captions.
        exclude_images: Text file of images to leave out, one path per line.
        train: Number of training photos.
        test: Number of test photos.
    """
    excluded = set(exclude_images.read_text().split()) if exclude_images else set()
    rows = choose(load_captions(source).images, excluded, {"train": train, "test": test}, random.Random(0))
    text = io.StringIO()
    csv.writer(text).writerows([("image", "caption", "split"), *rows])
    write_atomically(out, text.getvalue().encode())
    print(f"{len(rows)} captions written to {out}")


def shuffle(knowledge: Path, out: Path) -> None:
    """Gives each caption the knowledge of another one: a writer that is always wrong.

    Args:
        knowledge: `knowledge.jsonl` of amp generate_knowledge.
        out: JSONL file of the shuffled knowledge.
    """
    records = shuffled([record for _, record in jsonl_objects(knowledge)], random.Random(0))
    write_atomically(out, "".join(json.dumps(record) + "\n" for record in records).encode())


def plot(results: Path, choices: Path, f1: dict[str, float], out: Path, lines: list[str] | None = None) -> None:
    """Draws R@1 and the accuracy on swapped captions against the F1 of the knowledge.

    Args:
        results: CSV file of amp sweep.
        choices: CSV file of amp choose for the sweep's adapters, named as "ROW SEED".
        f1: F1 of each row's triplets. Rows that are not listed are not drawn.
        out: PNG file.
        lines: Rows without knowledge, drawn as horizontal lines.
    """
    points = read_points(results, choices)
    if missing := [row for row in (*f1, *(lines or [])) if row not in points]:
        raise AmpError(f"{results}: has no row {missing[0]!r}, expected one of {', '.join(points)}; check --f1")
    write_atomically(out, draw(points, f1, lines or []))


def choose(images, excluded: set[str], counts: dict[str, int], draw: random.Random) -> list[tuple[str, str, str]]:
    """(image, caption, split) of randomly chosen images with one of their captions each."""
    rows = []
    for split, count in counts.items():
        known = [image for image in images if image.split == split and image.path not in excluded]
        for image in draw.sample(known, count):
            rows.append((image.path, draw.choice(image.captions).text, split))
    return rows


def shuffled(records: list[dict], draw: random.Random) -> list[dict]:
    """The records, each with the knowledge of the next one in a random circle."""
    order = list(records)
    draw.shuffle(order)
    known = {}
    for record, other in zip(order, order[1:] + order[:1], strict=True):
        known[record["sentid"]] = {
            key: other[key] for key in ("triplets", "states", "sources", "empty") if key in other
        }
    place = ("sentid", "image", "caption")
    return [{key: record[key] for key in place} | known[record["sentid"]] for record in records]


def read_points(results: Path, choices: Path) -> Points:
    """Means over seeds of the figures in the two files."""
    points: Points = defaultdict(dict)
    with results.open(newline="") as file:
        for line in csv.DictReader(file):
            if line["mean"]:
                points[line["row"]][line["metric"]] = (float(line["mean"]), float(line["standard_error"] or 0))
    seeds: dict[tuple[str, str], list[float]] = defaultdict(list)
    with choices.open(newline="") as file:
        for line in csv.DictReader(file):
            name, _, seed = line["method"].rpartition(" ")
            if line["group"] == "all":
                row = name if seed.isdigit() else line["method"]
                seeds[row, line["test"]].append(float(line["accuracy"]))
    for (row, test), found in seeds.items():
        points[row][test] = (mean(found), stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0.0)
    return dict(points)


def draw(points: Points, f1: dict[str, float], lines: list[str]) -> bytes:
    """Draws the points as PNG, a panel for each pair of `MEASURES`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    names: dict[float, list[str]] = defaultdict(list)  # rows with the same F1 are drawn next to each other
    places = {}
    for row, x in f1.items():
        places[row] = x + 0.025 * len(names[x])
        names[x].append(row)
    for axes, measures in zip(figure.subplots(1, 2), MEASURES, strict=True):
        for measure, colour in zip(measures, ("#0072b2", "#d55e00"), strict=True):
            for row, style in zip(lines, ("--", ":", "-."), strict=False):
                value = points[row][measure][0]
                axes.axhline(value, color=colour, linestyle=style, linewidth=1)
                axes.annotate(row, (0.25, value), ha="center", va="bottom", fontsize=8, color=colour)
            means, errors = zip(*(points[row][measure] for row in f1), strict=True)
            axes.errorbar(list(places.values()), means, errors, fmt="o", capsize=3, color=colour, label=measure)
        top = axes.secondary_xaxis("top")
        top.set_xticks(list(names), ["\n".join(reversed(rows)) for rows in names.values()], fontsize=8)
        axes.set(xlim=(-0.1, 1.05), xlabel="F1 of the triplets, on the gold file", ylabel="percent")
        axes.spines["right"].set_visible(False)
        axes.margins(y=0.1)
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=90)
    return out.getvalue()


if __name__ == "__main__":
    with exit_on_error():
        auto_cli([captions, shuffle, plot], as_positional=False)
