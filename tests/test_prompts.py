"""Templates of Q1 and Q2: the shipped one is valid, errors are reported, captions become one readable line."""

import pytest
import yaml

from amp.errors import AmpError
from amp.generation.prompts import MAX_CAPTION_WORDS, TEMPLATE, ask_states, ask_triplets, load_template, readable
from amp.generation.score import load_gold
from amp.knowledge.schema import Triplet
from benchmarks.prompts import DEVELOPMENT


def test_the_shipped_prompts():
    template = load_template()
    for prefix in (template.triplets, template.states):
        assert [message.role for message in prefix] == ["system", *["user", "assistant"] * (len(prefix) // 2)]
        assert len(prefix) >= 7
    assert template.name == "default"
    samples = {message.content.splitlines()[0] for part in (template.triplets, template.states) for message in part}
    labelled = {ask_triplets(label.caption) for label in (*load_gold(), *load_gold(DEVELOPMENT))}
    assert not samples & labelled  # figures are those of captions that no prompt shows
    # The samples show the order of the slots, an action without an object, and a worn item as an attribute.
    replies = "\n".join(message.content for message in template.triplets if message.role == "assistant")
    assert "| - " in f"{replies} ".replace("\n", " ") and "| wearing |" in replies


def test_the_hash_is_of_what_the_model_reads(tmp_path):
    text = TEMPLATE.read_text()
    (tmp_path / "mine.yaml").write_text("# a remark\n" + text)
    (tmp_path / "other.yaml").write_text(text.replace("At most six lines.", "No more than six lines."))
    mine, other = (load_template(str(tmp_path / f"{name}.yaml")) for name in ("mine", "other"))
    assert mine.hash() == load_template().hash() != other.hash()
    assert (mine.name, mine.version) == ("mine", 2)


def broken(change) -> str:
    content = yaml.safe_load(TEMPLATE.read_text())
    change(content)
    return yaml.safe_dump(content)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("version"), "key 'version' is missing; expected a whole number"),
        (lambda c: c.pop("states"), "key 'states' is missing; expected an object"),
        (
            lambda c: c["triplets"].update(samples=[]),
            r"'samples' is \[\]; expected a value that isn't empty",
        ),
        (
            lambda c: c["triplets"]["samples"][0]["triplets"].append("action: boy | runs | -"),
            "fail the strict check; expected at most six",
        ),
        (lambda c: c["triplets"]["samples"][1].pop("caption"), r"samples\[1\]: key 'caption' is missing"),
        (lambda c: c["states"]["samples"][0]["states"].pop(), r"states.samples\[0\]: 'states' is .* for 2 triplets"),
        (
            lambda c: c["states"]["samples"][0]["triplets"].append("no triplet"),
            "expected triplets only; correct the line",
        ),
        (lambda c: c["states"]["samples"][2].update(states=["Yes."]), "expected one sentence per triplet"),
    ],
)
def test_what_is_wrong_is_told(tmp_path, change, message):
    (tmp_path / "mine.yaml").write_text(broken(change))
    with pytest.raises(AmpError, match=message):
        load_template(str(tmp_path / "mine.yaml"))


def test_files_that_can_t_be_read(tmp_path):
    with pytest.raises(AmpError, match=r"none\.yaml: no such file; expected a YAML file of prompts; check --template"):
        load_template("none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(AmpError, match="can't be read as YAML"):
        load_template(str(tmp_path / "bad.yaml"))


def test_requests():
    assert ask_triplets(" A  man\nruns ") == "Caption: A man runs"
    triplets = (Triplet("man", "runs", ""), Triplet("man", "is", "old", "attribute"))
    assert ask_states("A man", triplets) == "Caption: A man\n1. action: man | runs | -\n2. attribute: man | is | old"


@pytest.mark.parametrize(
    "text, line",
    [
        ("", ""),
        ("a\tb\r\nc\x00d\x1b[0m", "a b c d [0m"),
        ("a\u2028b\u200bc", "a b c"),
        ("{x} %s <|im_end|>", "{x} %s <|im_end|>"),
        ("Größe 男 😀", "Größe 男 😀"),
        ("\ud800", ""),
    ],
)
def test_readable(text, line):
    assert readable(text) == line


def test_long_captions_are_cut():
    assert len(readable("word " * 500).split()) == MAX_CAPTION_WORDS
