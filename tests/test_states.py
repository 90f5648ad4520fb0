"""States generated from the lexicon."""

import re

import pytest

from amp.generation.replies import read_states
from amp.generation.states import _lexicon, _stems, has_verb, state_of
from amp.knowledge.schema import Triplet

FORMS = """
    jumps:jump, jumping:jump, jumped:jump, riding:ride, rides:ride, ridden:ride, running:run, ran:run,
    hopping:hop, carries:carry, carried:carry, catches:catch, lying:lie, laying:lie, swimming:swim, sits:sit,
    thrown:throw, passes:pass, pushing:push, playing:play, dives:dive, diving:dive, goes:go, hitting:hit,
    cutting:cut, eats:eat
"""


@pytest.mark.parametrize("pair", FORMS.replace(",", " ").split())
def test_forms_of_verbs(pair):
    """The first base form that the lexicon contains is used."""
    form, verb = pair.split(":")
    assert next(stem for stem in _stems(form) if stem in _lexicon()["verbs"]) == verb


@pytest.mark.parametrize("word", ["xylophoning", "is", "s", "ing", "zzzed", ""])
def test_unknown_verbs_have_a_sentence(word):
    assert "of" in state_of(Triplet("man", word or "x", "ball"))


def every_triplet():
    lexicon = _lexicon()
    for verb in lexicon["verbs"]:
        for subject in ("man", "brown dog", "dogs"):
            for object_ in ("", "ball"):
                yield Triplet(subject, f"{verb} over", object_)
    for word in lexicon["properties"]:
        yield Triplet("man", "is", word, "attribute")
    for action in ("wearing", "with", "has", "on", "covered in", "is"):
        yield Triplet("man", action, "something", "attribute")
    for object_ in ("", "ball"):
        yield Triplet("man", "xyzing", object_)


def test_every_sentence_reads_well():
    for triplet in every_triplet():
        state = state_of(triplet)
        assert not re.search(r"[{}]", state), state
        assert 6 <= len(state.split()) <= 25 and len(state) <= 160, state
        assert state[0] == "T" and state.isprintable() and not state.endswith("."), state
        assert triplet.subject in state and triplet.object in state
        assert not re.search(r"\b(he|she|his|her|him)\b", state.lower()), state
        assert read_states(f"1. {state}", 1) == [(state, "strict")]


def test_animals_have_no_hands():
    assert "jaws" in state_of(Triplet("dog", "carrying", "stick")) and "arms" in state_of(
        Triplet("man", "carrying", "stick")
    )


def test_slots_are_never_templates():
    assert state_of(Triplet("{object}", "runs", "{subject}")).count("{") <= 2
    assert "{subject}" in state_of(Triplet("man", "holds", "{subject}"))


def test_lexicon_covers_two_hundred_verbs():
    assert len(_lexicon()["verbs"]) > 200 and has_verb("running through") and not has_verb("xyzing")
