"""Parses replies: a strict check of the format, then a repair of replies whose only fault is their format.

The result always follows the schema and the caption: slots hold only lower-case words of the caption (and copulas, in
attributes), and a state is one line of printable text. Anything that can't be converted to this form is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from amp.generation.grammar import COPULAS, MAX_WORDS_IN_SLOT
from amp.generation.words import ARTICLES, slot_words, stem, words_of
from amp.knowledge.schema import Triplet

MAX_TRIPLETS = 6
MIN_STATE_WORDS, MAX_STATE_CHARACTERS = 3, 160
# Limits on what is parsed: a server may ignore the maximum number of tokens.
MAX_REPLY_CHARACTERS, MAX_LINE_CHARACTERS = 20_000, 2_000

StateSource = Literal["strict", "repaired"]

_KIND = re.compile(r"(action|attribute)\b\s*[:\-]?\s*", re.IGNORECASE)
_BULLET = re.compile(r"^\s*(?:[-*•]\s+|\(?\d{1,2}[.):]\s*)+")
_NUMBER = re.compile(r"^\W{0,3}(\d{1,2})\s*[.):\-]\s*")
_SEPARATORS = re.compile(r"\s*\|\s*|\s*[;,]\s*|\s*->\s*|\t+")
_QUOTES = "\"'`*_“”‘’«»"
_BRACKETS = "()<>[]{}"
_NOTHING = frozenset({"", "-", "none", "null", "nothing", "n/a"})
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")


@dataclass(frozen=True, slots=True)
class TripletReply:
    """A parsed reply to Q1.

    Attributes:
        triplets: Usable triplets, actions first.
        strict: Whether the reply has exactly the requested format.
        usable: Whether no retry is needed: the reply is strict, a repair found at least one triplet, or it says "none".
    """

    triplets: tuple[Triplet, ...]
    strict: bool
    usable: bool


def triplet_line(triplet: Triplet) -> str:
    """A triplet in the format of prompts and replies."""
    return f"{triplet.kind}: {triplet.subject} | {triplet.action} | {triplet.object or '-'}"


def parse_triplet_line(line: str) -> Triplet | None:
    """The inverse of `triplet_line`; None for anything else."""
    kind, colon, rest = line.partition(": ")
    slots = rest.split(" | ")
    if not colon or kind not in ("action", "attribute") or len(slots) != 3:
        return None
    subject, action, object_ = slots
    if any(slot != slot.strip() or not slot for slot in slots) or "-" in (subject, action):
        return None
    if object_ == "-":
        return Triplet(subject, action, "", kind) if kind == "action" else None
    return Triplet(subject, action, object_, kind)


def parse_triplet_lines(lines: Sequence[str]) -> tuple[Triplet, ...] | None:
    """The triplets of all lines; None if a line is not a triplet."""
    triplets = tuple(triplet for line in lines if (triplet := parse_triplet_line(line)) is not None)
    return triplets if len(triplets) == len(lines) else None


def read_triplets(reply: str, caption: str) -> TripletReply:
    """Parses the triplets of a reply to Q1: first the strict check, then the repair.

    Args:
        reply: The reply without the empty line that ends it.
        caption: The caption. Slots may hold only its words.
    """
    reply = _bounded(reply)
    words = frozenset(slot_words(caption))
    strict = _strict_triplets(reply.rstrip("\n"), words)
    if strict is not None:
        return TripletReply(_actions_first(strict), strict=True, usable=True)
    body = re.sub(r"```\w*", "", reply).strip()
    if body.strip(_QUOTES + _BRACKETS + ". ").lower() in {"none", "no triplets", "nothing", "n/a"}:
        return TripletReply((), strict=False, usable=True)
    found: dict[Triplet, None] = {}
    for line in _candidates(body):
        triplet = _repair(line, words)
        if triplet is not None:
            found.setdefault(triplet)
    kept = tuple(found)[:MAX_TRIPLETS]
    return TripletReply(_actions_first(kept), strict=False, usable=bool(kept))


def read_states(reply: str, count: int) -> list[tuple[str | None, StateSource]]:
    """Parses the states of a reply to Q2: one (text or None, "strict" or "repaired") per triplet.

    Args:
        reply: The reply without the empty line that ends it.
        count: Number of triplets in the request.
    """
    lines = [line for line in _bounded(reply).strip().splitlines() if line.strip()]
    numbered = [match for line in lines if (match := re.fullmatch(r"(\d{1,2})\. (\S.*)", line))]
    in_order = [int(match[1]) == index for index, match in enumerate(numbered, start=1)]
    if len(numbered) == len(lines) == count and all(in_order):
        return [_state(match[2]) for match in numbered]
    states: list[tuple[str | None, StateSource]] = [(None, "repaired")] * count
    place = 0
    for line in lines:
        match = _NUMBER.match(line)
        place = int(match[1]) - 1 if match else place
        if 0 <= place < count and states[place][0] is None:
            states[place] = (_state(line[match.end() :] if match else line)[0], "repaired")
        place += 1
    return states


def _bounded(reply: str) -> str:
    """Cuts a reply to the length limits. Finding separators takes time quadratic in the length of a line."""
    return "\n".join(line[:MAX_LINE_CHARACTERS] for line in reply[:MAX_REPLY_CHARACTERS].split("\n"))


def _strict_triplets(reply: str, words: frozenset[str]) -> tuple[Triplet, ...] | None:
    """Accepts the same language as `TripletGrammar.regex`, without backtracking over a long caption."""
    if reply == "none":
        return ()
    triplets = parse_triplet_lines(reply.split("\n"))
    if triplets is None or not 1 <= len(triplets) <= MAX_TRIPLETS or len(set(triplets)) < len(triplets):
        return None
    return triplets if all(_grounded(triplet, words) for triplet in triplets) else None


def _grounded(triplet: Triplet, words: frozenset[str]) -> bool:
    verbs = words | set(COPULAS) if triplet.kind == "attribute" else words
    slots = ((triplet.subject, words), (triplet.action, verbs), (triplet.object, words))
    return triplet.subject != triplet.object and all(
        len(slot.split(" ")) <= MAX_WORDS_IN_SLOT and all(word in known for word in slot.split(" "))
        for slot, known in slots
        if slot
    )


def _candidates(body: str) -> list[str]:
    """Pieces that may each hold a triplet: bracketed groups if there are any, else lines."""
    groups = re.findall(r"[(<\[{]([^()<>\[\]{}\n]{3,200})[)>\]}]", body)
    triples = [group for group in groups if len(_SEPARATORS.split(group)) in (3, 4)]
    return triples or body.splitlines()


def _repair(line: str, words: frozenset[str]) -> Triplet | None:
    line = _BULLET.sub("", line).strip()
    match = _KIND.match(line)
    kind = match[1].lower() if match else None
    line = re.sub(r"[\"']?(?:subject|action|object|kind)[\"']?\s*:\s*", "", line[match.end() :] if match else line)
    slots = [_clean(slot) for slot in _SEPARATORS.split(line)]
    if len(slots) == 4 and slots[3] in ("action", "attribute"):
        kind, slots = kind or slots[3], slots[:3]
    if len(slots) == 2:
        slots.append("")
    if len(slots) != 3:
        return None
    subject, action, object_ = (_to_caption(slot, words) for slot in slots)
    if not subject or action is None or object_ is None or not action:
        return None
    kind = kind or ("attribute" if action in COPULAS else "action")
    if kind == "attribute" and not object_:
        return None
    triplet = Triplet(subject, action, object_, kind)
    return triplet if _grounded(triplet, words) else None


def _clean(slot: str) -> str:
    slot = slot.strip().strip(_QUOTES + _BRACKETS + ".:").strip().lower()
    if slot in _NOTHING:
        return ""
    found = words_of(slot)
    while len(found) > 1 and found[0] in ARTICLES:
        found = found[1:]
    return " ".join(found)


def _to_caption(slot: str, words: frozenset[str]) -> str | None:
    """Replaces each word by its form in the caption ("jumping" by "jumps"); None if a word is not in the caption."""
    result = []
    for word in slot.split():
        if word not in words and word not in COPULAS:
            stems = {stem(known): known for known in sorted(words, reverse=True)}
            found = stems.get(stem(word))
            if found is None:
                return None
            word = found
        result.append(word)
    return " ".join(result)


def _actions_first(triplets: tuple[Triplet, ...]) -> tuple[Triplet, ...]:
    return tuple(sorted(triplets, key=lambda triplet: triplet.kind != "action"))


def _state(text: str) -> tuple[str | None, StateSource]:
    """Cleans a sentence for use as a state; None if too little is left."""
    clean = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    clean = clean.strip(_QUOTES).strip()
    # The grammar's or the model's length limit cut the sentence, possibly within a word.
    if len(clean) > MAX_STATE_CHARACTERS or (
        len(clean) == MAX_STATE_CHARACTERS and not _SENTENCE_END.search(clean[-3:])
    ):
        clean = _cut(clean[:MAX_STATE_CHARACTERS])
    if len(clean.split()) < MIN_STATE_WORDS or not any(letter.isalpha() for letter in clean):
        return None, "repaired"
    return clean, "strict" if clean == text else "repaired"


def _cut(text: str) -> str:
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    if ends:
        return text[: ends[-1]]
    comma = text.rfind(",")
    return text[:comma] if comma > len(text) // 2 else text.rpartition(" ")[0]
