"""Foils: captions of a photo made false by a small change, to learn and to test who does what to whom.

A foil exchanges two people or animals, or replaces an action, an object or an attribute by another word of its group in
`foil_words.yaml`. No caption of the photo contains the new word.

A replacement must not be recognizable without the photo: if frequent words were replaced by rare ones, a model could
learn that the rarer word is wrong. So words are exchanged in balance: in all captions together, each word of a group
replaces another one as often as that one replaces it. Of several forms of a word ("bike", "bicycle"), each is written
as often as the captions use it.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from amp.generation.inflect import article_before, inflect, s_form
from amp.generation.lexicon_files import read_lexicon
from amp.generation.rules import children_of, is_passive, is_verb, noun_phrase, subjects_of
from amp.generation.states import plain_verb
from amp.knowledge.schema import FOIL_KINDS

FOILS_VERSION = 1
"""Increase when the same captions get other foils."""

_PLACING = frozenset({"on", "in", "near", "by", "beside", "behind", "under", "outside", "next", "during", "inside"})
_SAME_AS_BEFORE = frozenset({"another", "other", "others", "each"})
_DESCRIBING = frozenset({"in", "with", "wearing", "holding", "carrying", "dressed"})
_PRONOUNS = ("PRP", "PRP$", "WP$")


@dataclass(frozen=True, slots=True)
class _Slot:
    """A place of a caption where a word can be replaced by another one of its group."""

    kind: str
    group: str  # name of the group and of the grammatical place, for counting
    members: tuple[tuple[str, ...], ...]  # each member's forms
    own: int
    form: str
    start: int
    stop: int
    tag: str


def write_foils(
    images: Sequence[Sequence[str]], parse: Callable[[Iterable[str]], Iterator], seed: int = 0
) -> Iterator[list[dict[str, str]]]:
    """Yields the foils of each image's captions: at most one per caption and kind, by kind (`FOIL_KINDS`).

    Args:
        images: The captions of each photo.
        parse: Parses captions, such as `RuleTriplets.parsed`.
        seed: Random seed.
    """
    texts, places, exchanged, words = [], [], [], []
    for doc in parse(caption for captions in images for caption in captions):
        texts.append(doc.text)
        places.append(tuple(_slots(doc)))
        exchanged.append(_exchanged(doc))
        words.append(_words(doc))
    counts: dict[str, Counter] = defaultdict(Counter)
    forms: dict[tuple[str, int], Counter] = defaultdict(Counter)
    for slot in (slot for found in places for slot in found):
        counts[slot.group][slot.own] += 1
        forms[slot.group, slot.own][slot.form] += 1
    chances = {group: balanced(counts[group]) for group in counts}
    number = 0
    for captions in images:
        numbers = range(number, number + len(captions))
        number += len(captions)
        seen = frozenset().union(*(words[n] for n in numbers))
        known = {caption.lower() for caption in captions}
        found = []
        for n in numbers:
            draw = random.Random(f"{seed}/{texts[n]}")
            own = {}
            if (text := exchanged[n]) and text.lower() not in known:
                own["roles"] = text
            for kind in FOIL_KINDS[1:]:
                slots = [slot for slot in places[n] if slot.kind == kind]
                draw.shuffle(slots)
                tried = (_replaced(texts[n], slot, chances[slot.group][slot.own], forms, seen, draw) for slot in slots)
                if text := next(filter(None, tried), None):
                    own[kind] = text
            found.append(own)
        yield found


def balanced(counts: dict[int, int]) -> dict[int, dict[int, float]]:
    """Returns the chances that one word is replaced by each other one, so that exchanges are balanced.

    `counts[v] * chances[v][w]` is the same as `counts[w] * chances[w][v]`: a product of two factors, one per word, such
    that each word is always replaced. A word with more than half of all occurrences is replaced as often as the
    others together.
    """
    total = sum(counts.values())
    wanted = {word: float(min(count, total - count)) for word, count in counts.items()}
    factors = {word: value**0.5 for word, value in wanted.items()}
    for _ in range(200):
        for word in factors:
            others = sum(factors.values()) - factors[word]
            factors[word] = wanted[word] / others if others else 0.0
    return {
        v: {w: factors[v] * factors[w] / counts[v] for w in counts if w != v and factors[v] * factors[w]}
        for v in counts
    }


def _replaced(
    caption: str,
    slot: _Slot,
    chances: dict[int, float],
    forms: dict[tuple[str, int], Counter],
    seen: frozenset[str],
    draw: random.Random,
) -> str | None:
    kept = max(0.0, 1 - sum(chances.values()))
    new = draw.choices([*chances, slot.own], [*chances.values(), kept])[0]
    if new == slot.own or not seen.isdisjoint(slot.members[new]):
        return None
    written = forms[slot.group, new]
    word = draw.choices([*written], [*written.values()])[0]
    word = (inflect(word, slot.tag) if slot.kind == "action" else s_form(word) if slot.tag == "NNS" else word) or ""
    return _write(caption, slot.start, slot.stop, word)


def _write(caption: str, start: int, stop: int, text: str) -> str:
    """The caption with a span replaced, and with an article that fits."""
    text = text[:1].upper() + text[1:] if start == 0 and caption[0].isupper() else text
    before = re.sub(r"\b([Aa])n?(\s+)$", lambda match: match[1] + article_before(text)[1:] + match[2], caption[:start])
    return before + text + caption[stop:]


def _words(doc) -> frozenset[str]:
    """All forms in which a caption's words are listed in the groups."""
    found = set()
    for token in doc:
        word = token.lower_
        found |= {word, plain_verb(word) or word, word.removesuffix("s"), word.removesuffix("es")}
        found |= {noun_phrase(token)}
    return frozenset(found)


def _slots(doc) -> Iterator[_Slot]:
    for token in doc:
        if is_verb(token):
            yield from _action_slots(token)
        elif token.dep_ in ("dobj", "pobj"):
            yield from _object_slots(token)
        elif token.dep_ in ("amod", "acomp", "nummod"):
            yield from _attribute_slots(token)


def _action_slots(verb) -> Iterator[_Slot]:
    infinitive = plain_verb(verb.lower_)
    subjects = subjects_of(verb)
    passive = is_passive(verb) and verb.tag_ != "VBG"
    if infinitive is None or not subjects or passive or verb.tag_ == "VBN" or children_of(verb, "prt", "neg", "xcomp"):
        return
    kind = next((k for k in ("people", "animals") if all(_is_in(subject, k) for subject in subjects)), None)
    preposition, thing = _after(verb)
    prepositions = children_of(verb, "prep", "dative")
    held = any(noun.lower_ in _list("held_in") for child in prepositions for noun in children_of(child, "pobj"))
    if held or any(child.lower_ not in _PLACING for child in prepositions if child.lower_ != preposition):
        return
    for number, (members, wanted, subject_kinds, things) in enumerate(_frames()):
        own = next((n for n, forms in enumerate(members) if infinitive in forms), None)
        fits = "any" in things or (thing is not None and any(_is_in(thing, name) for name in things))
        if own is not None and kind in subject_kinds and preposition in wanted and fits:
            yield _Slot(
                "action",
                f"frame {number}",
                members,
                own,
                infinitive,
                verb.idx,
                verb.idx + len(verb.text),
                _tag_of_verb(verb),
            )


def _tag_of_verb(verb) -> str:
    if not verb.tag_.startswith("VB"):
        return "VBG" if verb.lower_.endswith("ing") else "VBZ" if verb.lower_.endswith("s") else "VBP"
    return verb.tag_


def _after(verb) -> tuple[str | None, Any]:
    """What follows a verb: ("", its object), (preposition, noun), ("alone", None), or else (None, None)."""
    objects = children_of(verb, "dobj")
    if objects:
        return ("", objects[0]) if len(objects) == 1 and not children_of(objects[0], "conj") else (None, None)
    end = verb.i + 1
    if end == len(verb.doc) or (verb.doc[end].is_punct and not _rest(verb)):
        return "alone", None
    for length in (3, 2, 1):
        span = verb.doc[end : end + length]
        last = span[-1] if len(span) == length else None
        nouns = children_of(last, "pobj") if last is not None else []
        if nouns and span.text.lower() in _prepositions():
            return span.text.lower(), nouns[0]
    return None, None


def _rest(verb) -> bool:
    return any(child.i > verb.i and not child.is_punct for child in verb.children)


def _object_slots(noun) -> Iterator[_Slot]:
    of = noun.head.lower_ == "of" or any(child.lower_ == "of" for child in children_of(noun, "prep"))
    if of or children_of(noun, "conj") or noun.dep_ == "conj":
        return
    phrase = noun_phrase(noun)
    plural = noun.tag_ == "NNS"
    form = phrase.removesuffix("s") if plural else phrase
    for name in _content()["exchanged"]:
        members = _groups()[name]
        own = next((n for n, forms in enumerate(members) if form in forms), None)
        if own is not None:
            start = noun.doc[noun.i - len(phrase.split()) + 1].idx
            place = f"{name} {noun.head.lower_ if noun.dep_ == 'pobj' else plain_verb(noun.head.lower_)}"
            yield _Slot(
                "object", place, members, own, form, start, noun.idx + len(noun.text), "NNS" if plural else "NN"
            )


def _attribute_slots(word) -> Iterator[_Slot]:
    noun = word.head if word.dep_ != "acomp" else next(iter(children_of(word.head, "nsubj")), None)
    if noun is None or children_of(word, "conj") or word.dep_ == "conj" or noun.lower_ in _list("children"):
        return
    kind = next((kind for kind in ("adults", "animals") if _is_in(noun, kind)), "things")
    for number, (members, kinds) in enumerate(_attributes()):
        own = next((n for n, forms in enumerate(members) if word.lower_ in forms), None)
        if own is not None and kind in kinds:
            yield _Slot(
                "attribute", f"{kind} {number}", members, own, word.lower_, word.idx, word.idx + len(word.text), "JJ"
            )


def _exchanged(doc) -> str | None:
    """The caption with two people or animals exchanged who do different things; None if there are no such two."""
    if any(token.tag_ in _PRONOUNS for token in doc):
        return None  # "his" would refer to somebody else
    doers = []
    for verb in doc:
        action = plain_verb(verb.lower_) if is_verb(verb) else None
        subjects = children_of(verb, "nsubj", "nsubjpass") if is_passive(verb) else subjects_of(verb)
        if action is None or len(subjects) != 1:
            continue
        for preposition, noun in _sufferers(verb):
            if f"{action} {preposition}".strip() in _list("directed"):
                text = _swapped(doc, subjects[0], noun)
                if text:
                    return text
        doers.append((verb, subjects[0]))
    for place, (verb, one) in enumerate(doers):
        for other, two in doers[place + 1 :]:
            together = verb in _above(two) or other in _above(one)  # "looks at", which may hold both ways
            if not together and plain_verb(verb.lower_) != plain_verb(other.lower_):
                text = _swapped(doc, one, two)
                if text:
                    return text
    living = [noun for noun in doc if _role_of(noun) is not None and noun.dep_ != "compound"]
    for place, one in enumerate(living):
        for two in living[place + 1 :]:
            if _described(one, two) or _described(two, one):
                text = _swapped(doc, one, two, joined=True)
                if text:
                    return text
    return None


def _described(noun, other) -> bool:
    """Whether a description stays behind if two nouns are exchanged: "a man in red", not "a man and a boy in red"."""
    joined = other in noun.children or noun in other.children
    found = [child for child in children_of(noun, "prep", "acl", "relcl") if child.lower_ in _DESCRIBING]
    found = [child for child in found if noun.i < child.i < other.i or (not joined and noun.i < child.i)]
    return any(other not in child.subtree for child in found)


def _above(noun) -> tuple:
    """The word that governs a noun, and the one that governs its preposition."""
    return (noun.head, noun.head.head) if noun.dep_ == "pobj" else (noun.head,) if noun.dep_ == "dobj" else ()


def _sufferers(verb) -> Iterator[tuple[str, Any]]:
    """Yields (preposition, noun) for what a verb acts on, or for the doer of a passive; "" for no preposition."""
    for noun in children_of(verb, "dobj"):
        yield "", noun
    for preposition in children_of(verb, "agent", "prep"):
        for noun in children_of(preposition, "pobj"):
            yield "" if preposition.dep_ == "agent" else preposition.lower_, noun


def _swapped(doc, one, two, joined: bool = False) -> str | None:
    """The caption with two nouns exchanged, each with its article and adjectives; None if they don't fit.

    Args:
        doc: A parsed caption.
        one: A noun.
        two: Another noun.
        joined: Whether the nouns may be joined to each other or to others.
    """
    one, two = sorted((one, two), key=lambda noun: noun.i)
    roles = [_role_of(noun) for noun in (one, two)]
    if roles[0] is None or roles[1] is None or roles[0][0] != roles[1][0]:
        return None
    spans = []
    for noun in (one, two):
        words = doc[noun.left_edge.i : noun.i + 1]
        part = noun.head.lower_ == "of" or any(child.lower_ == "of" for child in children_of(noun, "prep"))
        several = children_of(noun, "conj", "appos") or noun.dep_ == "conj"
        if part or (several and not joined) or any(word.lower_ in _SAME_AS_BEFORE for word in words):
            return None
        spans.append((words.start_char, words.end_char, words.text, words[0].tag_))
    (start, stop, first, tag), (begin, end, second, _) = spans
    adjectives = [{word.lower_ for word in children_of(noun, "amod")} for noun in (one, two)]
    if stop > begin or (roles[0] == roles[1] and adjectives[0] == adjectives[1]):
        return None
    if start == 0 and doc.text[0].isupper():
        first = first if tag == "NNP" and one.i else first[0].lower() + first[1:]
        second = second[0].upper() + second[1:]
    return doc.text[:start] + second + doc.text[stop:begin] + first + doc.text[end:]


def _role_of(noun) -> tuple[int, tuple[str, ...]] | None:
    """(number of the group, forms) of a single person or animal; None for others."""
    if noun.tag_ == "NNS":
        return None
    return next(((n, forms) for n, group in enumerate(_roles()) for forms in group if noun.lower_ in forms), None)


def _is_in(noun, name: str) -> bool:
    if name == "people":
        return noun.lower_ in _list("adults") | _list("children")
    if name in ("adults", "children", "animals"):
        return noun.lower_ in _list(name)
    words = {noun.lower_, noun_phrase(noun), noun.lower_.removesuffix("s")}
    return any(not words.isdisjoint(forms) for forms in _groups()[name])


@cache
def _content() -> dict[str, Any]:
    return read_lexicon("foil_words.yaml")


@cache
def _list(name: str) -> frozenset[str]:
    content = read_lexicon("state_lexicon.yaml") if name == "animals" else _content()
    return frozenset(content[name])


def _members(entries: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(entry.split("/")) for entry in entries)


@cache
def _groups() -> dict[str, tuple[tuple[str, ...], ...]]:
    return {name: _members(entries) for name, entries in _content()["objects"].items()}


@cache
def _attributes() -> tuple[tuple[tuple[tuple[str, ...], ...], frozenset[str]], ...]:
    return tuple((_members(entry["words"]), frozenset(entry["of"])) for entry in _content()["attributes"])


@cache
def _roles() -> tuple[tuple[tuple[str, ...], ...], ...]:
    return tuple(_members(entries) for entries in _content()["roles"])


@cache
def _frames() -> tuple[tuple[tuple[tuple[str, ...], ...], frozenset[str], frozenset[str], tuple[str, ...]], ...]:
    frames = _content()["frames"]
    return tuple((_members(f["verbs"]), frozenset(f["with"]), frozenset(f["of"]), tuple(f["to"])) for f in frames)


@cache
def _prepositions() -> frozenset[str]:
    return frozenset(preposition for frame in _frames() for preposition in frame[1])
