"""Action knowledge of a caption: triplets (eq. 1-2 of arXiv 2506.23502), one state description each (eq. 3).

This module says what well-formed knowledge is, nothing else; rendering it as text and tokenising it live beside it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from amp.errors import AmpError, shorten

KINDS = ("action", "attribute")
# What a folder of generated knowledge holds for shards.
KNOWLEDGE_NAME, PROVENANCE_NAME = "knowledge.jsonl", "knowledge_provenance.json"

_SLOTS = ("subject", "action", "object")
_KEYS = frozenset((*_SLOTS, "kind"))
_HINT = "correct that record or generate the knowledge again"


class KnowledgeFormatError(AmpError):
    """A knowledge record is not of the form ``{"triplets": [...], "states": [...]}``."""


@dataclass(frozen=True, slots=True)
class Triplet:
    """One ``(subject, action, object)`` of a caption.

    Attributes:
        subject: who or what, never empty.
        action: verb phrase, or the copula of an attribute ("is"), never empty.
        object: what is acted upon, or the attribute; empty for an intransitive action ("man jumps").
        kind: ``"action"`` or ``"attribute"``, so that the attribute ablation (Table 3) is a filter.
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
            raise KnowledgeFormatError(
                f"knowledge has {len(self.triplets)} triplets, {len(self.states)} states; expected one state a triplet"
            )

    def to_dict(self) -> dict[str, list]:
        """The JSON form, which :func:`parse_knowledge` reads back to an equal object."""
        return {
            "triplets": [
                {"subject": t.subject, "action": t.action, "object": t.object, "kind": t.kind} for t in self.triplets
            ],
            "states": list(self.states),
        }

    def only(self, kinds: Collection[str]) -> Knowledge:
        """The triplets whose kind is in ``kinds``, with their states; order kept.

        Raises:
            KnowledgeFormatError: a kind that doesn't exist, which would silently drop everything.
        """
        if isinstance(kinds, str) or not set(kinds) <= set(KINDS):
            raise KnowledgeFormatError(f"kinds is {shorten(kinds)}; expected a collection out of {', '.join(KINDS)}")
        if all(t.kind in kinds for t in self.triplets):
            return self
        kept = [(t, s) for t, s in zip(self.triplets, self.states, strict=True) if t.kind in kinds]
        return Knowledge(tuple(t for t, _ in kept), tuple(s for _, s in kept))


def parse_knowledge(record: dict[str, Any], where: str) -> Knowledge:
    """Check the form of a knowledge record and build it; white space around texts is dropped.

    Args:
        record: ``{"triplets": [{"subject", "action", "object", "kind"}], "states": [str]}``. ``kind`` may be absent
            (then ``"action"``); keys beside these two are the caller's (``sentid``, ``image``).
        where: what the error message points at, e.g. ``"knowledge.jsonl line 12"``.

    Raises:
        KnowledgeFormatError: naming ``where``, the key, the value seen and the value expected.
    """
    knowledge = _in_form(record)
    if knowledge is not None:
        return knowledge
    if not isinstance(record, dict):
        raise KnowledgeFormatError(f"{where}: the record is {shorten(record)}; expected a JSON object; {_HINT}")
    lists = {}
    for key in ("triplets", "states"):
        if key not in record:
            raise KnowledgeFormatError(
                f"{where}: key '{key}' is missing; expected a list; keys seen: {_names(record)}; {_HINT}"
            )
        lists[key] = record[key]
        if not isinstance(lists[key], list):
            raise KnowledgeFormatError(f"{where}: '{key}' is {shorten(lists[key])}; expected a list; {_HINT}")
    if len(lists["triplets"]) != len(lists["states"]):
        raise KnowledgeFormatError(
            f"{where}: 'triplets' has {len(lists['triplets'])} entries and 'states' has {len(lists['states'])}; "
            f"expected one state a triplet; {_HINT}"
        )
    triplets = tuple(_parse_triplet(t, f"{where}: triplets[{i}]") for i, t in enumerate(lists["triplets"]))
    states = tuple(_text(s, f"{where}: states[{i}]", allow_empty=False) for i, s in enumerate(lists["states"]))
    return Knowledge(triplets, states)


def _in_form(record: Any) -> Knowledge | None:
    """What `parse_knowledge` returns of a record that is in form, at a quarter of the time of its checks one by one.

    None of any other, which they then name. Every caption passes here, in conversion and in training.
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
    except (TypeError, KeyError, AttributeError, UnicodeEncodeError, KnowledgeFormatError):
        return None


def parse_origin(record: dict[str, Any], where: str) -> dict[str, Any]:
    """What a record says of where its knowledge comes from, for readers and reports; training doesn't use it.

    Args:
        record: with ``sources``, a list with ``{"triplet": str, "state": str}`` for each triplet (strict, repaired,
            retry1, retry2, rules), and ``empty``, why there is no triplet; both may be absent.
        where: as in :func:`parse_knowledge`.

    Raises:
        KnowledgeFormatError: as there.
    """
    origin = {}
    if "sources" in record:
        sources = record["sources"]
        fitting = isinstance(sources, list) and len(sources) == len(record["triplets"])
        if not fitting or not all(_is_source(source) for source in sources):
            raise KnowledgeFormatError(
                f"{where}: 'sources' is {shorten(sources)}; expected an object with the strings 'triplet' and 'state' "
                f"for each of {len(record['triplets'])} triplets; {_HINT}"
            )
        origin["sources"] = sources
    if "empty" in record:
        origin["empty"] = _text(record["empty"], f"{where}: 'empty'", allow_empty=False)
    return origin


def _is_source(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"triplet", "state"}
        and all(isinstance(rung, str) and is_unicode(rung) for rung in value.values())
    )


def _parse_triplet(value: Any, where: str) -> Triplet:
    if not isinstance(value, dict):
        raise KnowledgeFormatError(
            f"{where} is {shorten(value)}; expected an object with subject, action, object and kind; {_HINT}"
        )
    for key in _SLOTS:
        if key not in value:
            raise KnowledgeFormatError(
                f"{where}: key '{key}' is missing; expected a string; keys seen: {_names(value)}; {_HINT}"
            )
    # A misspelt "kind" would otherwise turn an attribute into an action without a word.
    unknown = set(value) - _KEYS
    if unknown:
        raise KnowledgeFormatError(
            f"{where}: unknown key {_names(unknown)}; expected subject, action, object, kind; {_HINT}"
        )
    kind = value.get("kind", "action")
    if kind not in KINDS:
        raise KnowledgeFormatError(f"{where}: 'kind' is {shorten(kind)}; expected one of {', '.join(KINDS)}; {_HINT}")
    subject, action, object_ = (_text(value[key], f"{where}: '{key}'", allow_empty=key == "object") for key in _SLOTS)
    return Triplet(subject, action, object_, kind)


def _text(value: Any, where: str, allow_empty: bool) -> str:
    if not isinstance(value, str):
        raise KnowledgeFormatError(f"{where} is {shorten(value)}; expected a string; {_HINT}")
    value = value.strip()
    if not value and not allow_empty:
        raise KnowledgeFormatError(f"{where} is empty; expected a text; {_HINT}")
    if not is_unicode(value):
        raise KnowledgeFormatError(f"{where} is {shorten(value)}, not valid Unicode (a lone surrogate); {_HINT}")
    return value


def is_unicode(text: str) -> bool:
    """Whether ``text`` can be written as UTF-8: JSON's ``"\\ud800"`` is a string in Python, but no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _names(keys: Collection[str]) -> str:
    return ", ".join(shorten(key) for key in sorted(keys, key=str)) or "none"
