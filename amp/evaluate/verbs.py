"""Accuracy by action verb, of the base model and of another row."""

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from amp.csv_cell import csv_cell
from amp.evaluate.per_query import QueryTable
from amp.files import write_atomically
from amp.generation.states import plain_verb
from amp.generation.words import stem
from amp.knowledge.schema import Knowledge
from amp.retrieval.figures import BASE, RowKey

_AUXILIARY = frozenset({"is", "are", "was", "were", "be", "being", "been", "has", "have", "having"})


@dataclass(frozen=True)
class VerbCount:
    """Counts of caption queries with one verb.

    Attributes:
        verb: Base form of the verb, or its stem if it is not in the lexicon.
        queries: Number of captions with the verb.
        base, row: Number of these whose image is ranked first by the base model, and by the row.
        fixed, broken: Number of these whose image is ranked first only by the row, and only by the base model.
    """

    verb: str
    queries: int
    base: int
    row: int
    fixed: int
    broken: int


def verb_of(action: str) -> str | None:
    """Returns the base form of an action's first word that is not an auxiliary: "run" for "is running through"."""
    words = [word for word in action.lower().split() if word not in _AUXILIARY]
    return (plain_verb(words[0]) or stem(words[0])) if words else None


def verbs_of(knowledge: Knowledge) -> list[str]:
    """Returns the distinct verbs of a caption's action triplets."""
    found = (verb_of(triplet.action) for triplet in knowledge.triplets if triplet.kind == "action")
    return list(dict.fromkeys(verb for verb in found if verb))


def by_verb(table: QueryTable, row: RowKey, knowledge: Sequence[Knowledge], base: RowKey = BASE) -> list[VerbCount]:
    """Counts text-to-image results by verb, the most frequent verb first.

    Args:
        table: Per-query results.
        row: Row to compare with `base`.
        knowledge: Knowledge of all captions of the split.
        base: Row of the base model.
    """
    before, after = (table[name, "t2i"].ranks == 0 for name in (base, row))
    counts: dict[str, list[int]] = {}
    for query, was, now in zip(table[row, "t2i"].queries.tolist(), before.tolist(), after.tolist(), strict=True):
        for verb in verbs_of(knowledge[query]):
            found = counts.setdefault(verb, [0] * 5)
            for place, value in enumerate((1, was, now, now and not was, was and not now)):
                found[place] += value
    return [VerbCount(verb, *counts[verb]) for verb in sorted(counts, key=lambda v: (-counts[v][0], v))]


def save_verbs(path: str | os.PathLike, rows: dict[RowKey, list[VerbCount]]) -> Path:
    """Writes one line per row and verb: counts, and R@1 of the base model and of the row in percent."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("method", "verb", "queries", "base_R@1", "R@1", "fixed", "broken"))
    for row, counts in rows.items():
        for c in counts:
            rates = (f"{100 * n / c.queries:.1f}" for n in (c.base, c.row))
            writer.writerow((csv_cell(str(row)), csv_cell(c.verb), c.queries, *rates, c.fixed, c.broken))
    return write_atomically(path, text.getvalue().encode())
