"""Statistics of a version of knowledge, calculated by hand, and the report's command."""

import json
from functools import partial

import pytest
from support.drawn_data import draw_dataset
from support.repository import SHARED, run_here

from amp.data.conversion.make import make_shards
from amp.errors import AmpError
from amp.generation.describe import agreement, describe, load_entries
from amp.terminal import PlainConsole

TWO = [
    {
        "sentid": 1,
        "caption": "A man runs to a big dog",
        "triplets": [
            {"subject": "man", "action": "runs to", "object": "dog", "kind": "action"},
            {"subject": "dog", "action": "is", "object": "big", "kind": "attribute"},
        ],
        "states": ["He leans forward.", "It is of great size."],
        "sources": [{"triplet": "strict", "state": "strict"}, {"triplet": "strict", "state": "rules"}],
    },
    {"sentid": 2, "caption": "A red car", "triplets": [], "states": [], "empty": "nothing found in the caption"},
]
OTHER = [
    {
        "sentid": 1,
        "triplets": [
            {"subject": "man", "action": "running to", "object": "dogs", "kind": "action"},
            {"subject": "man", "action": "sees", "object": "dog", "kind": "action"},
        ],
        "states": ["He leans forward.", "It is of great size."],
    },
    {"sentid": 2, "triplets": [], "states": []},
    {"sentid": 3, "triplets": [], "states": []},
]


def write(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path


def test_figures_by_hand(tmp_path):
    entries = load_entries(write(tmp_path / "a.jsonl", TWO))
    figures = describe(list(entries.values()), str.split)
    # "Fine-grained state description of action triplet <man, runs to, dog> is He leans forward.": 14 words, BOS, EOS
    assert figures == {
        "captions": 2,
        "captions with an action": 0.5,
        "captions with a triplet": 0.5,
        "triplets": 2,
        "action triplets": 1,
        "triplets per caption": 1.0,
        "captions by number of triplets": {"0": 1, "2": 1},
        "distinct actions": 1,
        "distinct states": 2,
        "words per state": 4.0,
        "tokens per state prompt, median": 16.5,
        "tokens per state prompt, maximum": 17,
        "state prompts cut at 77 tokens": 0.0,
        "slots longer than 5 tokens": 0.0,
        "most frequent actions": {"runs to": 1},
        "triplets by source": {"strict": 2},
        "states by source": {"strict": 1, "rules": 1},
        "reasons for no triplet": {"nothing found in the caption": 1},
    }


def test_cut_prompts_and_long_slots(tmp_path):
    entries = load_entries(write(tmp_path / "a.jsonl", TWO))
    figures = describe(list(entries.values()), lambda text: range(6 * len(text.split())))
    assert figures["state prompts cut at 77 tokens"] == 1.0  # 14 words of 6 tokens
    assert figures["slots longer than 5 tokens"] == 1.0


def test_agreement_by_hand(tmp_path):
    first, second = (load_entries(write(tmp_path / f"{n}.jsonl", r)) for n, r in (("a", TWO), ("b", OTHER)))
    figures = agreement(first, second)
    # caption 1: "runs to" is in both, "is big" in one, "sees" in the other: 1 of 3; caption 2: nothing in both
    assert figures["captions in both"] == 2
    assert figures["mean overlap of triplets per caption"] == pytest.approx((1 / 3 + 1) / 2)
    assert figures["captions with the same triplets"] == 0.5
    assert figures["captions with the same states"] == 1.0
    assert figures["actions only in the first"] == {"is": 1} and figures["actions only in the second"] == {"sees": 1}
    with pytest.raises(AmpError, match="no caption in common"):
        agreement(first, load_entries(write(tmp_path / "c.jsonl", [{**OTHER[2], "sentid": 9}])))


def test_shards_are_described_as_their_file(tmp_path):
    dataset = draw_dataset(tmp_path / "drawn")
    make_shards(**dataset, out=str(tmp_path / "shards"), workers=1, console=PlainConsole(quiet=True))
    from_file, from_shards = load_entries(tmp_path / "drawn" / "knowledge.jsonl"), load_entries(tmp_path / "shards")
    assert {name: entry.knowledge for name, entry in from_file.items()} == {
        n: e.knowledge for n, e in from_shards.items()
    }


def test_the_folder_of_generated_knowledge_is_described_as_its_file(tmp_path):
    file = write(tmp_path / "knowledge.jsonl", TWO)
    assert load_entries(tmp_path) == load_entries(file)


run = partial(run_here, "tools/knowledge_report.py")


def test_command_line(tmp_path):
    first, second = write(tmp_path / "a.jsonl", TWO), write(tmp_path / "b.jsonl", OTHER)
    process = run("--knowledge", first, "--against", second, "--out", tmp_path / "report.md", "--sample", "2")
    assert process.returncode == 0, process.stderr
    report = (tmp_path / "report.md").read_text()
    assert "| captions in both | 2 |" in report and "**A man runs to a big dog**" in report
    assert "(2) action: man \\| sees \\| dog" in report and "nothing found in the caption" in report
    assert run("--knowledge", first, "--out", tmp_path / "report.json").returncode == 0
    assert json.loads((tmp_path / "report.json").read_text())["versions"][str(first)]["captions"] == 2
    for arguments, message in (
        (["--knowledge", tmp_path / "none.jsonl"], "none.jsonl: can't be read"),
        (["--knowledge", first, "--out", "report.txt"], "expected a name that ends in .md or .json"),
        (["--knowledge", write(tmp_path / "empty.jsonl", [])], "has no records"),
        (["--knowledge", first, "--sample", "-1"], "sample is -1; expected 0 or more"),
    ):
        process = run(*arguments)
        assert process.returncode == 2 and message in process.stderr
    process = run(
        "--knowledge", tmp_path / "none.jsonl", "--against", tmp_path / "empty.jsonl", "--out", first / "x.md"
    )
    for words in ("3 errors: ", "none.jsonl: can't be read", "has no records", "x.md: can't be written"):
        assert process.returncode == 2 and words in process.stderr


def test_forty_thousand_captions():
    path = SHARED / "data" / "flickr8k" / "knowledge.jsonl"
    if not path.exists():
        pytest.skip("needs ../shared/data/flickr8k/knowledge.jsonl")
    figures = describe(list(load_entries(path).values()), str.split)
    provenance = json.loads((path.parent / "knowledge_provenance.json").read_text())
    assert figures["captions"] == provenance["captions"] and figures["triplets"] == provenance["triplets_total"]
    assert figures["action triplets"] == provenance["action_triplets"]
    assert figures["captions by number of triplets"] == provenance["triplets_per_caption_hist"]
