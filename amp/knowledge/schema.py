"""Action knowledge of a caption: triplets (eq. 1-2 of arXiv 2506.23502) with one state description each (eq. 3).

A caption may also have foils: false captions with knowledge of their own.

This module defines well-formed knowledge. The modules next to it turn knowledge into texts and tensors.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from amp.errors import AmpError, shorten
from amp.json_text import check_text, is_unicode, seen_keys, value_of

KINDS = ("action", "attribute")
FOIL_KINDS = ("roles", "action", "object", "attribute")
"""What a foil changes: who acts on whom or has which description, or one word."""

# Files in a folder of generated knowledge, from which shards are made.
KNOWLEDGE_NAME, PROVENANCE_NAME = "knowledge.jsonl", "knowledge_provenance.json"

_SLOTS = ("subject", "action", "object")
_KEYS = frozenset((*_SLOTS, "kind"))
_HINT = "correct that record or generate the knowledge again"


@dataclass(frozen=True, slots=True)
class Triplet:
    """One `(subject, action, object)` triplet of a caption.

    Attributes:
        subject: Who or what acts, or has the attribute; never empty.
        action: Verb phrase, or the copula of an attribute ("is"); never empty.
        object: What is acted upon, or the attribute; empty for an intransitive action ("man jumps").
        kind: `"action"` or `"attribute"`. The attribute ablation (Table 3) filters by it.
    """

    subject: str
    action: str
    object: str
    kind: str = "action"


@dataclass(frozen=True, slots=True)
class Knowledge:
    """The K triplets of a caption and their K state descriptions, in the same order; K may be 0."""

    triplets: tuple[Triplet, ...] = ()
    states: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.triplets) != len(self.states):
            raise AmpError(
                f"knowledge has {len(self.triplets)} triplets, {len(self.states)} states; expected one state per "
                "triplet"
            )

    def to_dict(self) -> dict[str, list]:
        """The JSON form, which `parse_knowledge` reads back to an equal object."""
        return {
            "triplets": [
                {"subject": t.subject, "action": t.action, "object": t.object, "kind": t.kind} for t in self.triplets
            ],
            "states": list(self.states),
        }

    def only(self, kinds: Collection[str]) -> Knowledge:
        """The triplets whose kind is in `kinds`, with their states, in the same order.

        Raises:
            AmpError: A kind doesn't exist, which would silently drop all triplets.
        """
        if isinstance(kinds, str) or not set(kinds) <= set(KINDS):
            raise AmpError(f"kinds is {shorten(kinds)}; expected some of {', '.join(KINDS)}")
        if all(t.kind in kinds for t in self.triplets):
            return self
        kept = [(t, s) for t, s in zip(self.triplets, self.states, strict=True) if t.kind in kinds]
        return Knowledge(tuple(t for t, _ in kept), tuple(s for _, s in kept))


@dataclass(frozen=True, slots=True)
class Foil:
    """A caption made false by a small change, with its own knowledge.

    Attributes:
        kind: What was changed: one of `FOIL_KINDS`.
        caption: The false caption.
        knowledge: Knowledge of the false caption, by the same writer as that of the true one.
    """

    kind: str
    caption: str
    knowledge: Knowledge

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, which `parse_foils` reads."""
        return {"kind": self.kind, "caption": self.caption, **self.knowledge.to_dict()}


def parse_knowledge(record: dict[str, Any], where: str) -> Knowledge:
    """Checks a knowledge record and builds a `Knowledge` from it. Whitespace around texts is removed.

    Args:
        record: `{"triplets": [{"subject", "action", "object", "kind"}], "states": [str]}`. `kind` may be missing, which
            means `"action"`. Other keys of the record, such as `sentid` and `image`, are ignored.
        where: Start of the error message, such as `"knowledge.jsonl line 12"`.

    Raises:
        AmpError: The record is malformed. The message names `where`, the key, the value seen and the value expected.
    """
    knowledge = _in_form(record)
    if knowledge is not None:
        return knowledge
    given, described = (value_of(record, key, list, where, _HINT) for key in ("triplets", "states"))
    if len(given) != len(described):
        raise AmpError(
            f"{where}: 'triplets' has {len(given)} entries and 'states' has {len(described)}; expected one state per "
            f"triplet; {_HINT}"
        )
    triplets = tuple(_parse_triplet(value, f"{where}: triplets[{i}]") for i, value in enumerate(given))
    states = tuple(_text(value, f"{where}: states[{i}]") for i, value in enumerate(described))
    return Knowledge(triplets, states)


def _in_form(record: Any) -> Knowledge | None:
    """Returns the knowledge of a well-formed record; None for other records.

    This takes a quarter of the time of the single checks of `parse_knowledge`, which then find what is wrong.
    Conversion and training call it for every caption.
    """
    try:
        given, described = record["triplets"], record["states"]
        triplets = tuple(
            Triplet(t["subject"].strip(), t["action"].strip(), t["object"].strip(), t.get("kind", "action"))
            for t in given
        )
        states = tuple(state.strip() for state in described)
        named = all(t.subject and t.action and t.kind in KINDS for t in triplets) and all(states)
        if not (named and type(given) is type(described) is list and all(_KEYS.issuperset(t) for t in given)):
            return None
        "".join([*states, *(slot for t in triplets for slot in (t.subject, t.action, t.object))]).encode()
        return Knowledge(triplets, states)
    except (TypeError, KeyError, AttributeError, ValueError):
        return None


def parse_origin(record: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns the origin of the knowledge that a record states, for readers and reports. Training doesn't use it.

    Args:
        record: A record with `sources`, a list with one `{"triplet": str, "state": str}` per triplet (strict, repaired,
            retry1, retry2, rules), and `empty`, the reason why there is no triplet. Both may be missing.
        where: Start of the error message.

    Raises:
        AmpError: See `parse_knowledge`.
    """
    origin = {}
    if "sources" in record:
        sources = record["sources"]
        fitting = isinstance(sources, list) and len(sources) == len(record["triplets"])
        if not fitting or not all(_is_source(source) for source in sources):
            raise AmpError(
                f"{where}: 'sources' is {shorten(sources)}; expected an object with the strings 'triplet' and 'state' "
                f"for each of {len(record['triplets'])} triplets; {_HINT}"
            )
        origin["sources"] = sources
    if "empty" in record:
        origin["empty"] = _text(record["empty"], f"{where}: 'empty'")
    return origin


def parse_foils(record: dict[str, Any], where: str) -> tuple[Foil, ...]:
    """Returns the foils of a record's caption, from its key `foils`, which may be missing.

    Raises:
        AmpError: See `parse_knowledge`.
    """
    foils = []
    for number, value in enumerate(value_of(record, "foils", list, where, _HINT) if "foils" in record else ()):
        here = f"{where}: foils[{number}]"
        kind = value_of(value, "kind", str, here, _HINT)
        if kind not in FOIL_KINDS:
            raise AmpError(f"{here}: 'kind' is {shorten(kind)}; expected one of {', '.join(FOIL_KINDS)}; {_HINT}")
        caption = _text(value_of(value, "caption", str, here, _HINT), f"{here}: 'caption'")
        foils.append(Foil(kind, caption, parse_knowledge(value, here)))
    return tuple(foils)


def _is_source(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"triplet", "state"}
        and all(isinstance(rung, str) and is_unicode(rung) for rung in value.values())
    )


def _parse_triplet(value: Any, where: str) -> Triplet:
    slots = [value_of(value, key, object, where, _HINT) for key in _SLOTS]
    # A misspelled "kind" would otherwise silently turn an attribute into an action.
    unknown = {key: value[key] for key in value if key not in _KEYS}
    if unknown:
        raise AmpError(f"{where}: unknown key {seen_keys(unknown)}; expected subject, action, object, kind; {_HINT}")
    kind = value.get("kind", "action")
    if kind not in KINDS:
        raise AmpError(f"{where}: 'kind' is {shorten(kind)}; expected one of {', '.join(KINDS)}; {_HINT}")
    subject, action, object_ = (
        _text(slot, f"{where}: '{key}'", allow_empty=key == "object") for key, slot in zip(_SLOTS, slots, strict=True)
    )
    return Triplet(subject, action, object_, kind)


def _text(value: Any, where: str, allow_empty: bool = False) -> str:
    value = check_text(value, where, _HINT).strip()
    if not value and not allow_empty:
        raise AmpError(f"{where} is empty; expected a text; {_HINT}")
    return value
