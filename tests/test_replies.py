"""Parsing of replies: strict ones, ones that can be repaired, and unusable ones."""

import random

import pytest

from amp.generation.grammar import COPULAS
from amp.generation.replies import (
    MAX_STATE_CHARACTERS,
    MAX_TRIPLETS,
    parse_triplet_line,
    read_states,
    read_triplets,
    triplet_line,
)
from amp.generation.words import words_of
from amp.knowledge.schema import Triplet

CAPTION = "A little girl in a pink dress climbs the stairs while two dogs jump over a fence"
CLIMBS = Triplet("girl", "climbs", "stairs", "action")
LITTLE = Triplet("girl", "is", "little", "attribute")
JUMP = Triplet("dogs", "jump over", "fence", "action")


def test_strict_reply():
    reply = read_triplets("attribute: girl | is | little\naction: girl | climbs | stairs\n", CAPTION)
    assert reply.strict and reply.usable
    assert reply.triplets == (CLIMBS, LITTLE)  # actions come first


def test_none_is_a_strict_reply():
    reply = read_triplets("none", CAPTION)
    assert reply.strict and reply.usable and reply.triplets == ()


@pytest.mark.parametrize(
    "reply",
    [
        "1. (girl, climbs, the stairs)\n2. (girl, is, little)",
        "<girl, climbs, stairs>, <girl, is, little>",
        "Action: Girl | climbs | Stairs\nAttribute: girl | is | little",
        "- action: girl | climbs | stairs\n- attribute: girl | is | little\n",
        "Sure! Here are the triplets:\naction: girl | climbs | stairs\nattribute: girl | is | little",
        "```\naction: girl | climbs | stairs\nattribute: girl | is | little\n```",
        "action: girl | climbs | stairs\naction: girl | climbs | stairs\nattribute: girl | is | little",  # repeated
        "action: girl | climbing | stairs\nattribute: girl | is | little",  # another form of the verb
        "action: girl | climbs | stairs\naction: boy | kicks | ball\nattribute: girl | is | little",  # made up
        "girl | climbs | stairs\ngirl | is | little",
        '[{"subject": "girl", "action": "climbs", "object": "stairs", "kind": "action"}, '
        '{"subject": "girl", "action": "is", "object": "little", "kind": "attribute"}]',
        '[["girl", "climbs", "stairs"], ["girl", "is", "little"]]',
        "girl -> climbs -> stairs\ngirl -> is -> little",
        "**girl** | `climbs` | \"stairs\"\n*girl* | is | 'little'",
    ],
)
def test_repair(reply):
    found = read_triplets(reply, CAPTION)
    assert not found.strict and found.usable
    assert found.triplets == (CLIMBS, LITTLE)


def test_repair_without_object():
    assert read_triplets("(girl, climbs)", CAPTION).triplets == (Triplet("girl", "climbs", "", "action"),)
    assert read_triplets("1) girl | climbs | none", CAPTION).triplets == (Triplet("girl", "climbs", "", "action"),)


def test_repair_of_a_plain_no():
    for reply in ("None.", "No triplets", "[]", "N/A", "(none)"):
        found = read_triplets(reply, CAPTION)
        assert found.usable == (reply != "[]") and found.triplets == () and not found.strict


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "\n\n",
        "I can't do that.",
        "action: boy | kicks | ball",
        "girl | girl | girl | girl | girl",
        "a, b, c",
        "|||",
        "{}{}{",
        "\x00\x01",
        "action: girl | climbs the stairs while two dogs jump over | fence",  # too long for a slot
        "attribute: girl | is | -",
        "<script>alert(1)</script>",
        "girl climbs stairs",
    ],
)
def test_nothing_to_repair(reply):
    found = read_triplets(reply, CAPTION)
    assert found.triplets == () and not found.usable and not found.strict


def test_at_most_six():
    words = [f"thing{i}" for i in range(9)]
    caption = "man holds " + " ".join(words)
    reply = "\n".join(f"action: man | holds | {word}" for word in words)
    found = read_triplets(reply, caption)
    assert len(found.triplets) == MAX_TRIPLETS and not found.strict


def test_whatever_a_model_writes_keeps_to_the_caption():
    """Replies of random pieces that a model may produce, checked against the definition instead of the code."""
    random.seed(1)
    words = ["girl", "climbs", "stairs", "climbing", "boy", "is", "none", "the", "pink", "wearing", "dogs", "😀"]
    pieces = [*words, "action: ", "attribute: ", "1. ", "\u2028", "\x1b[31m", *"|,\n()<>[]{}\"'-* "]
    known, found = set(words_of(CAPTION)), 0
    for _ in range(20_000):
        reply = "".join(random.choice(pieces) for _ in range(random.randint(1, 24)))
        for triplet in read_triplets(reply, CAPTION).triplets:
            found += 1
            assert triplet.kind in ("action", "attribute") and triplet.subject and triplet.action
            assert triplet.object or triplet.kind == "action"
            assert set(triplet.subject.split()) <= known and set(triplet.object.split()) <= known
            assert set(triplet.action.split()) <= known | set(COPULAS)
    assert found > 100


@pytest.mark.parametrize("triplet", [CLIMBS, LITTLE, JUMP, Triplet("dogs", "jump", "", "action")])
def test_lines_round_trip(triplet):
    assert parse_triplet_line(triplet_line(triplet)) == triplet


@pytest.mark.parametrize(
    "line",
    ["", "action: a | b", "action: a | b | c | d", "thing: a | b | c", "action:  a | b | c", "action: - | b | c"],
)
def test_lines_of_another_form(line):
    assert parse_triplet_line(line) is None


ONE, TWO = "The girl lifts her knee.", "Both dogs are in the air."


@pytest.mark.parametrize(
    "reply, sources",
    [
        (f"1. {ONE}\n2. {TWO}", ("strict", "strict")),
        (f"1. {ONE}\n2. {TWO}\n", ("strict", "strict")),
        (f'1. "{ONE}"\n2. {TWO}', ("repaired", "strict")),
        (f"1) {ONE}\n2) {TWO}", ("repaired", "repaired")),
        (f"- 1: {ONE}\n- 2: {TWO}", ("repaired", "repaired")),
        (f"{ONE}\n{TWO}", ("repaired", "repaired")),
        (f"2. {TWO}\n1. {ONE}", ("repaired", "repaired")),
        (f"1. {ONE}\n2. {TWO}\n3. A third that nobody asked for.", ("repaired", "repaired")),
        (f"**1.** {ONE}\n\n**2.** {TWO}", ("repaired", "repaired")),
    ],
)
def test_states(reply, sources):
    assert read_states(reply, 2) == [(ONE, sources[0]), (TWO, sources[1])]


@pytest.mark.parametrize("reply", ["", "1.\n2.", "1. Yes.\n2. No.", "1. 12 34 56\n2. ... ... ...", "\x00"])
def test_no_states(reply):
    assert [text for text, _ in read_states(reply, 2)] == [None, None]


def test_a_missing_state_leaves_the_other():
    assert read_states(f"2. {TWO}", 2) == [(None, "repaired"), (TWO, "repaired")]
    assert read_states(f"1. {ONE}\n2. Yes.", 2) == [(ONE, "strict"), (None, "repaired")]


def test_a_state_that_was_cut_ends_where_a_sentence_does():
    long = "The girl lifts her knee. " + "She goes on and on, " * 10
    ((text, source),) = read_states("1. " + long[:MAX_STATE_CHARACTERS], 1)
    assert (text, source) == ("The girl lifts her knee.", "repaired")
    ((text, source),) = read_states("1. " + "She goes up and up, " * 7 + "and still the staircase hasn", 1)
    assert text.endswith("up and up") and source == "repaired" and len(text) <= MAX_STATE_CHARACTERS
    ((text, source),) = read_states("1. " + "word " * 100, 1)
    assert len(text) <= MAX_STATE_CHARACTERS and set(text.split()) == {"word"}


def test_states_are_printable_lines():
    ((text, source),) = read_states("1. The girl\tlifts\x1b[31m her\u200b knee\u2028now", 1)
    assert source == "repaired" and text.isprintable()
