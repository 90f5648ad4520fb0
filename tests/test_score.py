"""The score of knowledge: matching by hand, a brute-force maximum, and the labelled captions themselves."""

import itertools
import json
import random
from functools import partial

import numpy as np
import pytest
from support.repository import ROOT, run_here

from amp.errors import AmpError
from amp.generation.grammar import COPULAS
from amp.generation.score import GoldCaption, good_states, load_gold, score_triplets
from amp.generation.words import words_of
from amp.knowledge.schema import Knowledge, Triplet


def triplet(text: str) -> Triplet:
    kind, subject, action, object_ = text.split("|")
    return Triplet(subject, action, object_, {"a": "action", "t": "attribute"}[kind])


def knowledge(*texts: str) -> Knowledge:
    return Knowledge(tuple(map(triplet, texts)), tuple("A state that is long enough." for _ in texts))


def gold(*texts: str, optional: tuple[str, ...] = ()) -> GoldCaption:
    return GoldCaption("a caption", tuple(map(triplet, texts)), tuple(map(triplet, optional)))


@pytest.mark.parametrize(
    "found, label, lenient, exact",
    [
        ("a|man|jumps over|fence", "a|man|jumping over|fence", True, True),
        ("a|the man|jumps over|a fence", "a|man|jumping over|fence", True, True),
        ("a|man|jumps|fence", "a|man|jumps over|fence", True, False),
        ("a|old man|jumps over|wooden fence", "a|man|jumps over|fence", True, False),
        ("a|man|jumps over|fences", "a|man|jumps over|fence", True, True),
        ("a|man|thrown|ball", "a|man|throws|ball", True, True),
        ("a|man|jumps|", "a|man|jumps over|fence", False, False),
        ("a|man|jumps|", "a|man|jumping|", True, True),
        ("a|fence|jumps over|man", "a|man|jumps over|fence", False, False),
        ("a|man|climbs over|fence", "a|man|jumps over|fence", False, False),
        ("t|dogs|is|brown", "t|dogs|are|brown", True, True),
        ("t|bathroom|with|sink", "t|bathroom|has|sink", True, False),
        ("t|tennis ball|is|green", "t|ball|is|green", True, False),
    ],
)
def test_matching_by_hand(found, label, lenient, exact):
    for level, expected in (("lenient", lenient), ("exact", exact)):
        score = score_triplets([knowledge(found)], [gold(label)], level)
        assert (score.hits, score.mistakes, score.misses) == ((1, 0, 0) if expected else (0, 1, 1)), level


def test_figures_by_hand():
    found = [knowledge("a|man|runs|", "a|man|holds|ball", "t|man|is|old"), knowledge("a|dog|sits|")]
    labels = [gold("a|man|runs|", "a|man|throws|ball"), gold("a|dog|sits|", "t|dog|is|brown", "t|dog|is|big")]
    score = score_triplets(found, labels)
    assert (score.hits, score.mistakes, score.misses) == (2, 2, 3)
    assert (score.precision, score.recall) == (2 / 4, 2 / 5)
    assert score.f1 == pytest.approx(2 * 0.5 * 0.4 / 0.9)
    action = score_triplets(found, labels, kind="action")
    assert (action.hits, action.mistakes, action.misses) == (2, 1, 1)
    attribute = score_triplets(found, labels, kind="attribute")
    assert (attribute.hits, attribute.mistakes, attribute.misses) == (0, 1, 2)


def test_exchanged_roles_are_counted():
    found = [knowledge("a|ball|throws|man", "a|man|eats|ball", "a|runs|man|", "a|dog|sees|dog")]
    score = score_triplets(found, [gold("a|man|throws|ball", "a|dog|sees|dog", optional=("a|ball|eats|man",))])
    assert (score.hits, score.mistakes, score.misses, score.swapped) == (1, 3, 1, 1)


def test_optional_labels_are_neither_hits_nor_mistakes():
    label = gold("a|man|runs|", optional=("a|man|runs in|park", "t|men|are|two"))
    with_it = score_triplets([knowledge("a|man|runs|", "a|man|runs in|park")], [label])
    assert (with_it.hits, with_it.mistakes, with_it.misses) == (1, 0, 0)
    without = score_triplets([knowledge("a|man|runs|")], [label])
    assert (without.hits, without.mistakes, without.misses) == (1, 0, 0)


def test_a_label_takes_one_triplet():
    score = score_triplets([knowledge("a|man|runs in|park", "a|man|runs to|park")], [gold("a|man|runs in|park")])
    assert (score.hits, score.mistakes) == (1, 1)


def test_matching_is_maximal():
    """Compared with all possible assignments of small random sets."""
    random.seed(2)
    slots = (("man", "dog"), ("runs in", "runs to", "sits in"), ("park", "old park"))
    every = [Triplet(*choice, "action") for choice in itertools.product(*slots)]

    def equal(a, b):  # lenient equality, written out for these words
        return a.subject == b.subject and a.action.split()[0] == b.action.split()[0]

    for _ in range(200):
        found = random.sample(every, random.randint(0, 4))
        wanted = random.sample(every, random.randint(1, 4))
        padded = [*found, *[None] * len(wanted)]
        best = max(
            sum(other is not None and equal(other, label) for other, label in zip(order, wanted, strict=True))
            for order in itertools.permutations(padded, len(wanted))
        )
        state = tuple("A state that is long enough." for _ in found)
        score = score_triplets([Knowledge(tuple(found), state)], [GoldCaption("", tuple(wanted), ())])
        assert score.hits == best


def test_interval_holds_the_figure_and_narrows():
    few = [knowledge("a|man|runs|"), knowledge("a|dog|runs|")] * 5
    labels = [gold("a|man|runs|")] * 10
    narrow = score_triplets(few * 20, labels * 20)
    wide = score_triplets(few, labels)
    assert wide.f1 == narrow.f1 == 0.5
    assert wide.interval[0] < narrow.interval[0] < 0.5 < narrow.interval[1] < wide.interval[1]
    assert np.diff(wide.interval) > 2 * np.diff(narrow.interval)


@pytest.mark.parametrize(
    "state, good",
    [
        ("The girl lifts one knee high and grips the rail.", True),
        ("Knees bent and arms wide above the stairs.", True),
        ("The girl climbs stairs.", False),  # adds nothing
        ("Knees bent, arms wide, eyes closed.", False),  # names nobody
        ("Girl lifts up.", False),  # too short
        ("The girl lifts " + "one knee high and " * 10, False),
        ("The girl lifts\none knee high and grips.", False),
    ],
)
def test_states(state, good):
    found = Knowledge((Triplet("girl", "climbs", "stairs"),), (state,))
    assert good_states(found, "A girl climbs the stairs") == [good]


def test_labelled_captions():
    labels = load_gold()
    assert len(labels) >= 200 and len({label.caption for label in labels}) == len(labels)
    assert sum(len(label.triplets) for label in labels) >= 400
    for label in labels:
        known = set(words_of(label.caption)) | set(COPULAS)
        for one in (*label.triplets, *label.optional):
            assert set(f"{one.subject} {one.action} {one.object}".split()) <= known, (label.caption, one)
        assert len(set(label.triplets + label.optional)) == len(label.triplets + label.optional)
        perfect = Knowledge(label.triplets, tuple("A state that is long enough." for _ in label.triplets))
        for level in ("lenient", "exact"):
            score = score_triplets([perfect], [label], level)
            assert (score.hits, score.mistakes, score.misses) == (len(label.triplets), 0, 0)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"- caption: a dog\n", "entry 0 is .*expected a list of entries with 'caption'"),
        (b"caption: a dog\ntriplets: []\n", None),
        (b"- a dog\n", "entry 0 is 'a dog'"),
        (b"- {caption: a dog, triplets: [dog]}\n", "triplets of 'a dog'"),
        (b"[", "can't be read as YAML"),
        (b"\xff", "can't be read as YAML"),
    ],
)
def test_labels_in_another_form_are_refused(content, said, tmp_path):
    (tmp_path / "labels.yaml").write_bytes(content)
    with pytest.raises(AmpError, match=said):
        load_gold(tmp_path / "labels.yaml")


def test_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = partial(run_here, "tools/score_knowledge.py")
    assert run("--write_captions", "gold.csv").returncode == 0
    assert len((tmp_path / "gold.csv").read_text().splitlines()) == len(load_gold()) + 1
    lines = []
    for number, label in enumerate(load_gold()):
        kept = label.triplets[:1]  # the first triplet of each caption
        triplets = [{"subject": t.subject, "action": t.action, "object": t.object, "kind": t.kind} for t in kept]
        states = ["It is seen well."] * len(kept)
        lines.append(json.dumps({"sentid": number, "caption": label.caption, "triplets": triplets, "states": states}))
    (tmp_path / "one.jsonl").write_text("\n".join(lines) + "\n")
    process = run("--knowledge", "one.jsonl", "--out", "scores.json", "--worst", "2")
    assert process.returncode == 0 and "labelled:" in process.stdout, process.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())["all lenient"]
    assert scores["precision"] == 1.0 and 0 < scores["recall"] < 1
    process = run("--knowledge", f"{ROOT}/results/gold_second_labels.yaml", "--out", "agreement.json")
    agreement = json.loads((tmp_path / "agreement.json").read_text())
    assert process.returncode == 0 and "states" not in process.stdout and "states" not in agreement, process.stderr
    assert 0.9 < agreement["all exact"]["f1"] < agreement["all lenient"]["f1"] < 1
    (tmp_path / "part.jsonl").write_text("\n".join(lines[3:]) + "\n")
    process = run("--knowledge", "part.jsonl")
    assert process.returncode == 2 and "part.jsonl: no record for 3 of" in process.stderr
    process = run("--knowledge", "part.jsonl", "--out", "gold.csv/scores.json")  # reported before the file is read
    assert process.returncode == 2 and "scores.json: can't be written" in process.stderr
    assert run().returncode == 2


def test_own_labels(tmp_path):
    labels = "- {caption: A dog runs ., triplets: ['action: dog | runs | -']}\n"
    (tmp_path / "own.yaml").write_text(labels)
    run = partial(run_here, "tools/score_knowledge.py", "--labels", str(tmp_path / "own.yaml"))
    assert run("--write_captions", str(tmp_path / "own.csv")).returncode == 0
    assert (tmp_path / "own.csv").read_text().splitlines()[1:] == ["gold-000.jpg,A dog runs .,test"]
    process = run("--knowledge", str(tmp_path / "own.yaml"))
    assert process.returncode == 0 and "1.000" in process.stdout, process.stderr
