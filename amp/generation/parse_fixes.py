"""Fixes dependency trees in which spaCy parsed the verb as a noun: "A woman in black walks down the road".

The caption is parsed again with an unambiguous form of the verb ("is walking"), and the new tree is transferred to the
words of the caption.
"""

from __future__ import annotations

from functools import cache

from amp.generation.inflect import ing_form
from amp.generation.lexicon_files import read_lexicon
from amp.generation.states import plain_verb

NOUNS = frozenset({"NN", "NNS", "NNP", "NNPS"})

_FOLLOWERS = frozenset({"IN", "TO", "RP", "DT", "RB", "PRP$", "VBG", "."})


def fix_parse(doc, parse):
    """Returns the caption with a fixed tree if its verb was parsed as a noun, else unchanged.

    Args:
        doc: A parsed caption.
        parse: Adds tags and dependencies to a `Doc` of words.
    """
    place = _hidden_verb(doc)
    return doc if place is None else _parsed_with_verb(doc, place, parse) or doc


@cache
def words(name: str) -> frozenset[str]:
    """Returns a word list of rule_words.yaml."""
    return frozenset(read_lexicon("rule_words.yaml")[name])


def _hidden_verb(doc) -> int | None:
    if len(doc) > 100 or any(token.tag_ in ("VBZ", "VBP", "VBD", "MD") for token in doc):
        return None
    return next((token.i for token in doc if token.i and _may_be_verb(token)), None)


def _may_be_verb(token) -> bool:
    """Whether a noun may be a verb form that follows its subject, or a description of its subject."""
    if token.tag_ not in NOUNS or plain_verb(token.lower_) is None or token.text[0].isupper():
        return False
    before = token.nbor(-1)
    after = token.nbor(1).tag_ if token.i + 1 < len(token.doc) else "."
    ends_description = before.tag_ in NOUNS or (before.lower_ in words("colours") and _is_in(before))
    first = next((other for other in token.doc[: token.i] if other.tag_ in NOUNS), None)
    if not ends_description or first is None or token.lower_ in words("clothes") | words("nouns_like_verbs"):
        return False
    if token.tag_ == "NNS" and token.lower_.endswith("s"):
        return after in _FOLLOWERS or _has_one(token)
    return (
        after in _FOLLOWERS
        and not token.lower_.endswith("ing")
        and (first.tag_ == "NNS" or first.lower_ in words("counted") or before.tag_ == "NNS" or _joined_before(token))
    )


def _is_in(colour) -> bool:
    return colour.i > 0 and colour.nbor(-1).lower_ == "in"


def _has_one(token) -> bool:
    """Whether a plural noun has a singular article, as in "a hat shoots"."""
    return any(child.lower_ in ("a", "an", "one") for child in (*token.children, *token.head.children))


def _joined_before(token) -> bool:
    return any(other.lower_ == "and" for other in token.doc[: token.i])


def _parsed_with_verb(doc, place: int, parse):
    from spacy.tokens import Doc

    texts = [token.text for token in doc]
    one = doc[place].tag_ == "NNS"
    trial = parse(
        Doc(
            doc.vocab,
            [
                *texts[:place],
                "is" if one else "are",
                ing_form(plain_verb(doc[place].lower_) or doc[place].lower_),
                *texts[place + 1 :],
            ],
        )
    )
    verb = trial[place + 1]
    subjects = [child for child in verb.children if child.dep_ == "nsubj" and child.i < place]
    fitting = any((child.tag_ in ("NNS", "NNPS")) != one or _is_many(child) for child in subjects)
    if verb.dep_ != "ROOT" or verb.tag_ != "VBG" or not fitting:
        return None
    kept = [token for token in trial if token.i != place]
    return Doc(
        doc.vocab,
        words=texts,
        spaces=[bool(token.whitespace_) for token in doc],
        heads=[token.head.i - (token.head.i > place) for token in kept],
        deps=[token.dep_ for token in kept],
        tags=[("VBZ" if one else "VBP") if token.i == verb.i else token.tag_ for token in kept],
    )


def _is_many(noun) -> bool:
    return noun.lower_ in words("counted") or any(child.dep_ == "conj" for child in noun.children)
