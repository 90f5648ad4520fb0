"""The schema of action knowledge: valid input, invalid input, and error messages."""

import pytest

from amp.errors import AmpError
from amp.knowledge.schema import Knowledge, Triplet, parse_knowledge


def record(**changes):
    triplet = {"subject": "girl", "action": "climbing", "object": "stairs", "kind": "action"}
    attribute = {"subject": "girl", "action": "is", "object": "small", "kind": "attribute"}
    return {"triplets": [triplet, attribute], "states": ["She lifts a knee", "She is short"], **changes}


def triplet(**changes):
    value = {"subject": "man", "action": "jumps", "object": "", "kind": "action", **changes}
    return {"triplets": [{key: v for key, v in value.items() if v is not None}], "states": ["He is in the air"]}


def test_parse_gives_the_record_back():
    knowledge = parse_knowledge(record(), "here")
    assert knowledge == Knowledge(
        (Triplet("girl", "climbing", "stairs"), Triplet("girl", "is", "small", "attribute")),
        ("She lifts a knee", "She is short"),
    )
    assert knowledge.to_dict() == record()
    assert parse_knowledge(knowledge.to_dict(), "again") == knowledge


def test_other_keys_of_the_record_are_the_callers():
    assert parse_knowledge(record(sentid=3, image="a.jpg"), "here") == parse_knowledge(record(), "here")


def test_no_triplet_at_all_is_knowledge_too():
    assert parse_knowledge({"triplets": [], "states": []}, "here") == Knowledge()


def test_an_intransitive_action_has_an_empty_object_and_kind_defaults_to_action():
    assert parse_knowledge(triplet(kind=None), "here").triplets == (Triplet("man", "jumps", "", "action"),)


def test_white_space_around_texts_is_dropped():
    assert parse_knowledge(triplet(subject=" man\n", object=" \t"), "here").triplets[0] == Triplet("man", "jumps", "")


def test_only_drops_triplets_with_their_states():
    knowledge = parse_knowledge(record(), "here")
    assert knowledge.only(["attribute"]) == Knowledge((knowledge.triplets[1],), ("She is short",))
    assert knowledge.only({"action"}).states == ("She lifts a knee",)
    assert knowledge.only(("action", "attribute")) == knowledge
    assert knowledge.only(()) == Knowledge()


@pytest.mark.parametrize("kinds", ["action", ["actions"], [""]])
def test_only_refuses_a_kind_that_does_not_exist(kinds):
    with pytest.raises(AmpError, match="action, attribute"):
        parse_knowledge(record(), "here").only(kinds)


def test_knowledge_needs_a_state_a_triplet():
    with pytest.raises(AmpError, match="1 triplets, 0 states"):
        Knowledge((Triplet("a", "b", "c"),), ())


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (["triplets"], "expected an object"),
        ({"states": []}, "key 'triplets' is missing"),
        ({"triplets": []}, "key 'states' is missing"),
        ({"triplet": [], "states": []}, "keys seen: 'triplet, states'"),
        (record(triplets=None), "'triplets' is None; expected a list"),
        (record(states="She runs"), "'states' is 'She runs'; expected a list"),
        (record(states=["one"]), "'triplets' has 2 entries and 'states' has 1"),
        (record(states=["one", 2]), r"states\[1\] is 2; expected a string"),
        (record(states=["one", " "]), r"states\[1\] is empty"),
        (record(triplets=[["a", "b", "c"]] * 2), r"triplets\[0\]: \['a', 'b', 'c'\]; expected an object"),
        (triplet(subject=None), r"triplets\[0\]: key 'subject' is missing"),
        (triplet(object=None), r"triplets\[0\]: key 'object' is missing"),
        (triplet(subject="  "), r"triplets\[0\]: 'subject' is empty"),
        (triplet(action=""), r"triplets\[0\]: 'action' is empty"),
        (triplet(object=4), r"triplets\[0\]: 'object' is 4; expected a string"),
        (triplet(kind="verb"), "'kind' is 'verb'; expected one of action, attribute"),
        (triplet(kind=["action"]), "expected one of action, attribute"),
        (triplet(knd="attribute"), "unknown key 'knd'"),
        (triplet(object="\ud800"), "not valid Unicode"),
    ],
)
def test_malformed_records_are_named(bad, words):
    with pytest.raises(AmpError, match=words) as error:
        parse_knowledge(bad, "knowledge.jsonl line 7")
    message = str(error.value)
    assert message.startswith("knowledge.jsonl line 7: ")
    assert "expected" in message or "Unicode" in message or "empty" in message
    assert "\n" not in message
    assert "correct that record" in message


def test_the_error_is_one_that_a_user_can_mend():
    assert issubclass(AmpError, AmpError)
    assert issubclass(AmpError, ValueError)
