"""Splits captions into words, and reduces words to their stems."""

from __future__ import annotations

import re
from functools import cache

ARTICLES = frozenset({"a", "an", "the"})

_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
_IRREGULAR = {
    "thrown": "throw",
    "threw": "throw",
    "ridden": "ride",
    "rode": "ride",
    "sat": "sit",
    "stood": "stand",
    "ran": "run",
    "held": "hold",
    "fell": "fall",
    "caught": "catch",
    "eaten": "eat",
    "ate": "eat",
    "lying": "lie",
    "laying": "lie",
    "worn": "wear",
    "swam": "swim",
    "taken": "take",
    "given": "give",
    "driven": "drive",
}


def words_of(text: str) -> list[str]:
    """Distinct words in lower case, in order of appearance: letters and digits with inner `'` and `-`."""
    return list(dict.fromkeys(word.lower() for word in _WORD.findall(text)))


def slot_words(caption: str) -> tuple[str, ...]:
    """Words that a slot may hold: the words of the caption except articles, or all if there are only articles."""
    words = words_of(caption)
    return tuple(word for word in words if word not in ARTICLES) or tuple(words)


@cache
def stem(word: str) -> str:
    """Stem of a word. Irregular verbs that are frequent in captions are replaced by their infinitive first."""
    return _stemmer().stemWord(_IRREGULAR.get(word, word))


@cache
def _stemmer():
    from snowballstemmer import stemmer

    return stemmer("english")
