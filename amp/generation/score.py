"""Scores knowledge: compares triplets with hand-labelled captions, and checks the form and the subject of states.

A format check can't replace this: a grammar makes every reply of a small model valid, but few of them correct.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

from amp.errors import AmpError, shorten
from amp.generation.replies import parse_triplet_lines
from amp.generation.words import ARTICLES, stem, words_of
from amp.knowledge.schema import Knowledge, Triplet

GOLD = Path(__file__).with_name("gold.yaml")
Level = Literal["lenient", "exact"]

_COPULAS = frozenset({"is", "are", "was", "were", "be", "has", "have", "with", "of"})
_WORDS = (4, 30)
_NEW_WORDS = 3


@dataclass(frozen=True, slots=True)
class GoldCaption:
    """A hand-labelled caption.

    Attributes:
        caption: Text of the caption.
        triplets: Triplets that must be found.
        optional: Triplets that may be found. They count neither as hits nor as mistakes.
    """

    caption: str
    triplets: tuple[Triplet, ...]
    optional: tuple[Triplet, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """Precision, recall and their harmonic mean, each from 0 to 1.

    Attributes:
        hits: Number of predicted triplets that match a label.
        mistakes: Number of predicted triplets that match no label, not even an optional one.
        misses: Number of labels without a match.
        swapped: Number of mistakes that would match with subject and object exchanged.
        interval: 95% interval of F1, by bootstrap over captions.
    """

    hits: int
    mistakes: int
    misses: int
    swapped: int
    interval: tuple[float, float]

    @property
    def precision(self) -> float:
        return self.hits / max(self.hits + self.mistakes, 1)

    @property
    def recall(self) -> float:
        return self.hits / max(self.hits + self.misses, 1)

    @property
    def f1(self) -> float:
        return _f1(self.hits, self.mistakes, self.misses)


def load_gold(path: Path = GOLD) -> list[GoldCaption]:
    """Reads the labelled captions.

    Raises:
        AmpError: The file can't be read, or has another form.
    """

    def triplets(lines: Sequence[str], caption: str) -> tuple[Triplet, ...]:
        found = parse_triplet_lines(lines)
        if found is None:
            raise AmpError(
                f"{path}: triplets of {shorten(caption)} are {shorten(lines)}; expected triplets only; correct them"
            )
        return found

    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise AmpError(f"{path}: can't be read as YAML ({shorten(error)}); expected labels as in {GOLD}") from None
    for number, entry in enumerate(entries if isinstance(entries, list) else [None]):
        lists = (entry.get("triplets"), entry.get("optional", [])) if isinstance(entry, dict) else (None,)
        if not all(isinstance(x, list) for x in lists) or not isinstance(entry.get("caption"), str):
            raise AmpError(
                f"{path}: entry {number} is {shorten(entry, 60)}, expected a list of entries with 'caption' (text), "
                f"'triplets' (list) and perhaps 'optional' (list), as in {GOLD}; correct it"
            )
    return [
        GoldCaption(
            entry["caption"],
            triplets(entry["triplets"], entry["caption"]),
            triplets(entry.get("optional", ()), entry["caption"]),
        )
        for entry in entries
    ]


def score_triplets(
    predicted: Sequence[Knowledge], gold: Sequence[GoldCaption], level: Level = "lenient", kind: str | None = None
) -> Score:
    """Scores predicted triplets against labels.

    A triplet matches a label at the level

    - `exact` if all three slots have the same words, ignoring articles and endings ("jumps over" = "jumping over");
    - `lenient` (the level to report) if the last words of the subjects and of the objects agree, ignoring endings, and
      the first words of the actions agree or are both copulas. Prepositions are ignored. An empty object matches only
      an empty object.

    A maximum matching assigns at most one triplet to each label.

    Args:
        predicted: Knowledge of each caption.
        gold: Labels of the same captions, in the same order.
        level: Matching level.
        kind: Scores only triplets and labels of this kind; None scores all. Optional labels apply to any kind.
    """
    counts = np.array(
        [
            _count([t for t in found.triplets if kind in (None, t.kind)], label, _MATCHES[level], kind)
            for found, label in zip(predicted, gold, strict=True)
        ]
    )
    draw = np.random.default_rng(0).integers(len(counts), size=(2000, len(counts)))
    samples = [_f1(*total[:3]) for total in counts[draw].sum(axis=1)]
    low, high = np.percentile(samples, (2.5, 97.5))
    hits, mistakes, misses, swapped = counts.sum(axis=0).tolist()
    return Score(hits, mistakes, misses, swapped, (float(low), float(high)))


def good_states(knowledge: Knowledge, caption: str) -> list[bool]:
    """Whether each state has the right form and is about its triplet. This doesn't check whether it is true.

    A good state is one line of 4 to 30 words, names the subject or the object, and adds at least three words that are
    neither in the caption nor function words.
    """
    known = {stem(word) for word in words_of(caption)} | _SMALL
    results = []
    for triplet, state in zip(knowledge.triplets, knowledge.states, strict=True):
        words = [stem(word) for word in words_of(state)]
        about = {stem(slot.split()[-1]) for slot in (triplet.subject, triplet.object) if slot}
        right_form = state.isprintable() and _WORDS[0] <= len(state.split()) <= _WORDS[1]
        results.append(right_form and bool(about & set(words)) and len(set(words) - known) >= _NEW_WORDS)
    return results


def _count(found: list[Triplet], label: GoldCaption, match: Callable, kind: str | None) -> tuple[int, int, int, int]:
    """Returns (hits, mistakes, misses, swapped) of one caption."""
    wanted = [t for t in label.triplets if kind in (None, t.kind)]
    options = [[place for place, other in enumerate(wanted) if match(triplet, other)] for triplet in found]
    taken: dict[int, int] = {}  # label -> triplet

    def assign(triplet: int, tried: set[int]) -> bool:
        for place in options[triplet]:
            if place not in tried:
                tried.add(place)
                if place not in taken or assign(taken[place], tried):
                    taken[place] = triplet
                    return True
        return False

    for triplet in range(len(found)):
        assign(triplet, set())
    hit = set(taken.values())
    # A match with a label of another kind is no mistake. It counts in the score of that kind.
    excused = [*label.optional, *(t for t in label.triplets if kind not in (None, t.kind))]
    mistakes = [
        triplet
        for place, triplet in enumerate(found)
        if place not in hit and not any(match(triplet, other) for other in excused)
    ]
    exchanged = [replace(t, subject=t.object, object=t.subject) for t in mistakes if t.object]
    swapped = sum(any(match(triplet, other) for other in wanted) for triplet in exchanged)
    return len(hit), len(mistakes), len(wanted) - len(hit), swapped


def _exact(a: Triplet, b: Triplet) -> bool:
    return all(_normal(x) == _normal(y) for x, y in ((a.subject, b.subject), (a.object, b.object))) and (
        _normal(a.action) == _normal(b.action) or (a.action in ("is", "are") and b.action in ("is", "are"))
    )


def matches(a: Triplet, b: Triplet) -> bool:
    """Whether two triplets match at the level `lenient`."""
    heads = _head(a.subject) == _head(b.subject) and _head(a.object) == _head(b.object)
    return heads and verb(a.action) == verb(b.action)


_MATCHES = {"exact": _exact, "lenient": matches}


def _normal(slot: str) -> list[str]:
    return [stem(word) for word in slot.lower().split() if word not in ARTICLES]


def _head(slot: str) -> str:
    return stem(slot.lower().split()[-1]) if slot else ""


def verb(action: str) -> str:
    """The stem of an action's first word, the same for all copulas."""
    first = action.lower().split()[0]
    return "be" if first in _COPULAS else stem(first)


def _f1(hits: int, mistakes: int, misses: int) -> float:
    return 2 * hits / max(2 * hits + mistakes + misses, 1)


_SMALL_WORDS = "a an the is are at in on of to and or with by from its their his her it they as one both while"
_SMALL = frozenset(map(stem, _SMALL_WORDS.split()))
