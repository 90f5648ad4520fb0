"""States without a language model, from a lexicon of sentences that say what an action or an attribute looks like."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from amp.generation.lexicon_files import read_lexicon
from amp.knowledge.schema import Triplet

_BE = frozenset({"is", "are", "was", "were", "be"})
_WEAR = frozenset({"wearing", "wears", "wear", "wore"})
_HAVE = frozenset({"has", "have", "with", "having"})


def state_of(triplet: Triplet) -> str:
    """Returns a state of 6 to 25 words for any triplet."""
    template = _attribute(triplet) if triplet.kind == "attribute" else _action(triplet)
    slots = {"subject": triplet.subject, "action": triplet.action, "object": triplet.object}
    for name, value in slots.items():  # not str.format, because a slot may contain braces
        template = template.replace("{" + name + "}", value)
    return template


def has_verb(action: str) -> bool:
    """Whether the lexicon has an entry for the verb of an action."""
    return _verb(action) is not None


def plain_verb(word: str) -> str | None:
    """Infinitive of a word that may be a form of a verb in the lexicon; None if no verb matches."""
    return next((stem for stem in _stems(word) if stem in _lexicon()["verbs"]), None)


def lexicon_version() -> int:
    """Version of the lexicon. Increases when the same triplet gets another state."""
    return _lexicon()["version"]


def _action(triplet: Triplet) -> str:
    lexicon = _lexicon()
    entry = _verb(triplet.action) or lexicon["generic"]
    keys = ["with"] if triplet.object else ["alone"]
    if triplet.subject.split()[-1] in lexicon["animals"]:
        keys.insert(0, "animal" if triplet.object else "animal_alone")
    return next(entry[key] for key in keys if key in entry)


def _attribute(triplet: Triplet) -> str:
    lexicon, first = _lexicon(), triplet.action.split()[0]
    if first in _WEAR:
        return lexicon["attributes"]["wear"]
    if first in _BE:
        words = (triplet.object, triplet.object.split()[-1])
        return next(
            (lexicon["properties"][w] for w in words if w in lexicon["properties"]), lexicon["attributes"]["be"]
        )
    if first in _HAVE:
        return lexicon["attributes"]["have"]
    verb = _verb(triplet.action)
    return verb["with"] if verb else lexicon["attributes"]["place"]


def _verb(action: str) -> dict[str, str] | None:
    verb = plain_verb(action.split()[0])
    return None if verb is None else _lexicon()["verbs"][verb]


def _stems(word: str) -> Iterator[str]:
    """Possible infinitives of a word, most likely first: "hopping" -> hopping, hopp, hoppe, hop."""
    yield _lexicon()["irregular"].get(word, word)
    for ending in ("ing", "ed", "es", "s"):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            base = word[: -len(ending)]
            yield base
            yield base + "e"
            if len(base) > 2 and base[-1] == base[-2]:
                yield base[:-1]
            if base.endswith("i"):  # carried, carries
                yield base[:-1] + "y"


@cache
def _lexicon() -> dict[str, Any]:
    content = read_lexicon("state_lexicon.yaml")
    verbs: dict[str, dict[str, str]] = {}
    for entry in content["verbs"]:
        for verb in entry["verbs"]:
            verbs.setdefault(verb, entry)  # a verb in two groups uses the first
    properties: dict[str, str] = {}
    for entry in content["properties"]:
        for word in entry["words"]:
            properties.setdefault(word, entry["state"])
    return {**content, "verbs": verbs, "properties": properties, "animals": frozenset(content["animals"])}
