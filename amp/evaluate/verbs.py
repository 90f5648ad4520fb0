"""Accuracy by action verb: which verbs does the base model get wrong, and which does a row mend?"""

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
    """Caption queries with one verb.

    Attributes:
        verb: Its plain form, or its stem where the lexicon doesn't know it.
        queries: Captions with it.
        base, row: Of these, whose image the base model and the row have in the first place.
        mended, broken: Whose first place the row won, and lost.
    """

    verb: str
    queries: int
    base: int
    row: int
    mended: int
    broken: int


def verb_of(action: str) -> str | None:
    """The verb of an action such as "is running through": its first word that is no auxiliary, in its plain form."""
    words = [word for word in action.lower().split() if word not in _AUXILIARY]
    return (plain_verb(words[0]) or stem(words[0])) if words else None


def verbs_of(knowledge: Knowledge) -> list[str]:
    """The different verbs of a caption's action triplets."""
    found = (verb_of(triplet.action) for triplet in knowledge.triplets if triplet.kind == "action")
    return list(dict.fromkeys(verb for verb in found if verb))


def by_verb(table: QueryTable, row: RowKey, knowledge: Sequence[Knowledge], base: RowKey = BASE) -> list[VerbCount]:
    """Counts of text-to-image retrieval, the most frequent verb first.

    Args:
        table: Results per query.
        row: The row that is compared with `base`.
        knowledge: Knowledge of all captions of the split.
        base: Row of the frozen CLIP.
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
    """Writes one line per row and verb: counts, and R@1 of base and row in percent."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("method", "verb", "queries", "base_R@1", "R@1", "mended", "broken"))
    for row, counts in rows.items():
        for c in counts:
            rates = (f"{100 * n / c.queries:.1f}" for n in (c.base, c.row))
            writer.writerow((csv_cell(str(row)), csv_cell(c.verb), c.queries, *rates, c.mended, c.broken))
    return write_atomically(path, text.getvalue().encode())
