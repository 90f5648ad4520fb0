"""English word forms: verbs in the form of another verb's tag, plurals, and the article before a word."""

from __future__ import annotations

import re

from amp.generation.lexicon_files import read_lexicon

_VOWELS = "aeiou"
_SIBILANT = ("s", "x", "z", "ch", "sh")
_SOUNDS_CONSONANT = re.compile(r"(?:uni|use|eu|one\b|once\b|ukulele)")
_SOUNDS_VOWEL = re.compile(r"(?:hour|honest|heir)")


def inflect(verb: str, tag: str) -> str | None:
    """An infinitive in the form of a Penn Treebank tag; None for a participle or no verb."""
    if tag in ("VB", "VBP"):
        return verb
    if tag == "VBG":
        return ing_form(verb)
    if tag in ("VBZ", "NNS"):  # a verb that the parser takes for a plural noun
        return s_form(verb)
    if tag == "VBD":
        return read_lexicon("foil_words.yaml")["irregular"].get(verb) or _regular_past(verb)
    return None


def ing_form(verb: str) -> str:
    """The present participle of an infinitive."""
    if verb.endswith("ie"):
        return verb[:-2] + "ying"
    if verb.endswith("e") and not verb.endswith(("ee", "oe")):
        return verb[:-1] + "ing"
    return _doubled(verb) + "ing"


def s_form(word: str) -> str:
    """The third person of a verb, or the plural of a noun."""
    if word.endswith(_SIBILANT):
        return word + "es"
    if word.endswith("y") and word[-2:-1] not in _VOWELS:
        return word[:-1] + "ies"
    return word + "s"


def article_before(word: str) -> str:
    """`a` or `an`."""
    word = word.lower()
    vowel = word[:1] in _VOWELS and not _SOUNDS_CONSONANT.match(word)
    return "an" if vowel or _SOUNDS_VOWEL.match(word) else "a"


def _regular_past(verb: str) -> str:
    if verb.endswith("y") and verb[-2:-1] not in _VOWELS:
        return verb[:-1] + "ied"
    return _doubled(verb).removesuffix("e") + "ed"


def _doubled(verb: str) -> str:
    """The verb with its last consonant doubled if it is a short syllable: "run" but not "row" or "paint"."""
    short = len(verb) > 2 and verb[-1] not in _VOWELS + "wxy" and verb[-2] in _VOWELS and verb[-3] not in _VOWELS
    return verb + (verb[-1] if short and len(verb) < 5 else "")
