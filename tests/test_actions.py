"""Action benchmarks: accuracy by verb, swapped roles and actions, and the files of SugarCrepe and ARO."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.drawn_data import draw
from support.equations.search import base_score, pair_score

import amp
from amp.commands.choose import main
from amp.data.images.file import open_photo
from amp.data.split_captions import SplitCaptions
from amp.errors import AmpError
from amp.evaluate.choice import Choice, Choices, choose
from amp.evaluate.choice_files import load_choices
from amp.evaluate.per_query import QueryResults
from amp.evaluate.swaps import swapped_actions, swapped_roles
from amp.evaluate.verbs import VerbCount, by_verb, save_verbs, verb_of, verbs_of
from amp.generation.states import state_of
from amp.model.adapter import save_adapter
from amp.retrieval.figures import BASE, RowKey


def knowledge(*triplets):
    triplets = tuple(amp.Triplet(*t) for t in triplets)
    return amp.Knowledge(triplets, tuple(state_of(t) for t in triplets))


# -- verbs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "verb"),
    [
        ("runs", "run"),
        ("is running through", "run"),
        ("climbing up", "climb"),
        ("rode", "ride"),
        ("is", None),
        ("are being carried by", "carry"),
        ("Throws", "throw"),
    ],
)
def test_the_verb_of_an_action(action, verb):
    assert verb_of(action) == verb


def test_a_caption_counts_once_a_verb_and_attributes_never():
    item = knowledge(
        ("dog", "runs", ""), ("man", "running", ""), ("man", "throws", "ball"), ("man", "wears", "hat", "attribute")
    )
    assert verbs_of(item) == ["run", "throw"]


def test_counts_by_hand(tmp_path):
    items = [
        knowledge(("a", "runs", "")),
        knowledge(("a", "runs", ""), ("a", "throws", "b")),
        knowledge(),
        knowledge(("a", "throws", "b")),
        knowledge(("a", "runs", "")),
    ]

    def results(ranks):
        queries, empty = np.array([0, 1, 3, 4]), np.zeros((4, 1))
        return QueryResults(queries, queries, empty, empty, empty, np.zeros(4), np.array(ranks))

    ours = RowKey("ours", "pairwise")
    table = {(BASE, "t2i"): results([0, 3, 0, 2]), (ours, "t2i"): results([0, 0, 1, 0])}
    counts = by_verb(table, ours, items)
    assert counts == [VerbCount("run", 3, 1, 3, 2, 0), VerbCount("throw", 2, 1, 1, 1, 1)]
    rows = list(csv.DictReader(save_verbs(tmp_path / "v.csv", {ours: counts}).open()))
    assert rows[0] == {
        "method": "ours (pairwise)",
        "verb": "run",
        "queries": "3",
        "base_R@1": "33.3",
        "R@1": "100.0",
        "fixed": "2",
        "broken": "0",
    }


# -- swaps ----------------------------------------------------------------------------------------------------------


def captions(*items):
    texts, found = zip(*items, strict=True)
    return SplitCaptions(list(texts), list(found), torch.arange(len(texts)), len(texts))


def test_roles_are_exchanged_in_text_and_triplets():
    (choice,) = swapped_roles(
        captions(
            ("A brown dog chases the cat .", knowledge(("dog", "chases", "cat"), ("dog", "is", "brown", "attribute"))),
        )
    )
    assert choice.captions == ("A brown dog chases the cat .", "A brown cat chases the dog .")
    assert choice.group == "chase" and choice.image == "0"
    right, wrong = choice.knowledge
    assert [t.subject for t in right.triplets] == ["dog", "dog"]
    assert [(t.subject, t.action, t.object, t.kind) for t in wrong.triplets] == [
        ("cat", "chases", "dog", "action"),
        ("cat", "is", "brown", "attribute"),
    ]
    assert wrong.states == tuple(state_of(t) for t in wrong.triplets)


def test_roles_that_cannot_be_exchanged_are_left_out():
    assert not swapped_roles(
        captions(
            ("A dog chases a dog", knowledge(("dog", "chases", "dog"))),
            ("A dog chases a cat near a cat", knowledge(("dog", "chases", "cat"))),  # ambiguous: two cats
            ("A dog runs", knowledge(("dog", "runs", ""))),
            ("A catfish chases a dog", knowledge(("dog", "chases", "cat"))),  # "cat" is not a word of the caption
            ("A dog wears a hat", knowledge(("dog", "wears", "hat", "attribute"))),
            ("A cat is in the dog bed", knowledge(("bed", "holds", "dog bed"))),  # overlapping names
        )
    )


def test_a_sentence_keeps_its_capital():
    (choice,) = swapped_roles(captions(("Dogs chase a cat", knowledge(("dogs", "chase", "cat")))))
    assert choice.captions[1] == "Cat chase a dogs"


def test_actions_are_replaced_by_others_of_their_kind():
    split = captions(
        ("A dog chases a cat", knowledge(("dog", "chases", "cat"))),
        ("A girl throws a ball", knowledge(("girl", "throws", "ball"))),
        ("A boy runs", knowledge(("boy", "runs", ""))),
        ("A man is jumping", knowledge(("man", "jumping", ""))),
        ("A cat is a pet", knowledge(("cat", "is", "pet"))),  # no verb: neither replaced nor a replacement
    )
    choices = {choice.image: choice for choice in swapped_actions(split)}
    assert set(choices) == {"0", "1"}  # the other verbs have another ending or no object
    assert choices["0"].captions[1] == "A dog throws a cat" and choices["1"].captions[1] == "A girl chases a ball"
    assert choices["0"].group == "chase" and choices["0"].knowledge[1].triplets[0].action == "throws"
    assert swapped_actions(split) == swapped_actions(split)


# -- files ----------------------------------------------------------------------------------------------------------


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def test_both_formats_are_read(tmp_path):
    crepe = write(tmp_path / "swap_obj.json", {"0": {"filename": "a.jpg", "caption": "x y", "negative_caption": "y x"}})
    assert load_choices(crepe) == ([Choice("a.jpg", ("x y", "y x"))], {})
    relation = {
        "image_path": "b.jpg",
        "bbox_x": 3,
        "bbox_y": 4,
        "bbox_w": 20,
        "bbox_h": 10,
        "relation_name": "riding",
        "true_caption": "a man riding a horse",
        "false_caption": "a horse riding a man",
    }
    attribution = {"image_path": "c.jpg", "attributes": ["red", "small"], "true_caption": "t", "false_caption": "f"}
    order = {"image_path": "d.jpg", "caption_options": ["right", "wrong", "worse"]}
    path = write(tmp_path / "aro.json", [relation, attribution, order])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as Windows writes it
    assert load_choices(path)[0] == [
        Choice("b.jpg", ("a man riding a horse", "a horse riding a man"), "riding", (3, 4, 23, 14)),
        Choice("c.jpg", ("t", "f"), "red_small"),
        Choice("d.jpg", ("right", "wrong", "worse")),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected an object or a list with entries"),
        ('"x"', "contains str"),
        ("{}", "contains dict"),
        ("filepath\ttitle\tneg_caption", "not JSON"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "test.json").write_text(text)
    with pytest.raises(AmpError, match=r"test\.json") as error:
        load_choices(tmp_path / "test.json")
    assert message in str(error.value)


CREPE = {"filename": "a.jpg", "caption": "a dog", "negative_caption": "a cat"}
ARO = {"image_path": "a.jpg", "true_caption": "a dog", "false_caption": "a cat"}
BOX = {"bbox_x": 0, "bbox_y": 0, "bbox_w": 4, "bbox_h": 5}


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (3, "is int, expected an object"),
        ({"filename": "a", "caption": "b"}, "key 'negative_caption' is missing; keys seen: 'filename, caption'"),
        ({"image_path": "a"}, "key 'true_caption' is missing"),
        (CREPE | {"negative_caption": ""}, "negative_caption is '', expected a text"),  # as in NegCLIP's file
        (CREPE | {"negative_caption": float("nan")}, "negative_caption is nan"),  # as pandas writes an empty cell
        (CREPE | {"negative_caption": ["a cat"]}, "negative_caption is ['a cat']"),
        (CREPE | {"caption": None}, "caption is None"),
        (CREPE | {"filename": 17}, "filename is 17, expected a text"),
        (CREPE | {"filename": "b.jpg"}, "no photo b.jpg in"),
        (CREPE | {"filename": f"{'é' * 200}.jpg"}, "no photo é"),  # longer than a file name may be
        (CREPE | {"filename": "../a.jpg"}, "expected a path inside the images folder"),
        (CREPE | {"negative_caption": "A  dog"}, "a wrong caption is the right one: 'a dog'"),
        ({"image_path": "a.jpg", "caption_options": ["x"]}, "caption_options is ['x'], expected a list of at least 2"),
        ({"image_path": "a.jpg", "caption_options": "xyz"}, "caption_options is 'xyz'"),
        ({"image_path": "a.jpg", "caption_options": ["x", ""]}, "caption_options[1] is ''"),
        ({"image_path": "a.jpg", "caption_options": ["x", "y", "x"]}, "a wrong caption is the right one"),
        (ARO | BOX | {"bbox_w": 0}, "the box is 0 x 5 pixels"),
        (ARO | BOX | {"bbox_w": float("inf")}, "infinity"),
        (ARO | {"relation_name": ["on"]}, "relation_name is ['on']"),
    ],
)
def test_a_bad_entry_is_skipped_with_its_reason(tmp_path, entry, reason):
    (tmp_path / "a.jpg").touch()
    found, skipped = load_choices(write(tmp_path / "x.json", [CREPE, entry, ARO]), tmp_path)
    assert found == [Choice("a.jpg", ("a dog", "a cat"))] * 2
    assert list(skipped) == ["entry 1"] and reason in skipped["entry 1"]


def test_a_photo_is_there_in_either_spelling_of_its_letters(tmp_path):
    (tmp_path / "cafe\u0301.jpg").touch()  # as macOS spells it
    assert load_choices(write(tmp_path / "x.json", [CREPE | {"filename": "caf\u00e9.jpg"}]), tmp_path)[1] == {}


# -- choosing -------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    for number in range(7):
        draw(number).save(tmp_path / f"{number}.png")
    return tmp_path


WORDS = ("dog", "girl", "horse", "chases", "kicks", "ball")


def drawn_choices(count=7, options=3):
    random = np.random.default_rng(0)
    return [
        Choice(
            f"{i}.png",
            tuple(" ".join(random.permutation(WORDS)) for _ in range(options)),
            f"g{i % 2}",
            (2, 3, 30, 28) if i % 3 == 0 else None,
            tuple(knowledge((*random.permutation(WORDS)[:3],)) for _ in range(options)),
        )
        for i in range(count)
    ]


def test_choices_equal_the_naive_loop(world, photos):
    drawn = drawn_choices()
    choices = [x for choice in drawn for x in (choice, replace(choice, captions=choice.captions[::-1]))]
    opened = []

    def open_image(name):
        opened.append(name)
        return open_photo(photos / name)

    found = choose(choices, {"ours": world.model}, world.preprocess, open_image, batch_size=4)
    assert opened == [choice.image for choice in drawn]  # once for both choices
    assert list(found) == ["base CLIP", "ours"]
    for row, choice in enumerate(choices):
        image = open_photo(photos / choice.image)
        image = world.preprocess(image.crop(choice.box) if choice.box else image)
        for column, (caption, item) in enumerate(zip(choice.captions, choice.knowledge, strict=True)):
            base, new = base_score(world.model, image, caption), pair_score(world.model, image, caption, item)
            assert found["base CLIP"].scores[row][column] == pytest.approx(base, abs=1e-5)
            assert found["ours"].scores[row][column] == pytest.approx(new, abs=1e-5)
    assert found["ours"].groups == [choice.group for choice in choices]


def test_a_tie_is_wrong_and_groups_are_averaged():
    found = Choices([[2.0, 1.0], [1.0, 1.0], [0.0, 1.0], [3.0, 2.0, 1.0], [1.0, 0.0, 2.0]], list("aabbb"), {})
    assert found.right == [True, False, False, True, False]
    assert found.accuracy == 40 and found.by_group() == {"a": (2, 1), "b": (3, 1)}
    assert found.group_mean == pytest.approx(100 * (1 / 2 + 1 / 3) / 2)


def test_photos_that_cant_be_read_are_skipped_up_to_a_share(world, photos):
    choices = drawn_choices()
    (photos / "2.png").unlink()
    (photos / "4.png").write_text("no image")
    choices[0] = replace(choices[0], box=(500, 0, 520, 20))
    asked = []

    def run(max_skipped, folder=photos):
        def open_image(name):
            asked.append(name)
            return open_photo(folder / name)

        return choose(choices, {"ours": world.model}, world.preprocess, open_image, max_skipped=max_skipped)["ours"]

    found = run(3 / 7)
    assert len(found.scores) == 4 and set(found.skipped) == {"0.png", "2.png", "4.png"}
    assert "the box (500, 0, 520, 20) is outside the photo" in found.skipped["0.png"]
    asked.clear()
    with pytest.raises(AmpError, match=r"photos: 2 of 7 entries \(28\.57%\) .*--max_skipped_entries 0\.29$"):
        run(1 / 7)
    assert asked == ["0.png", "1.png", "2.png"]  # the limit is exceeded, so no more are read
    with pytest.raises(AmpError, match="none of 7 choices has a photo that can be read"):
        run(1.0, photos / "no")


def test_a_full_gpu_is_one_error_that_says_what_helps(world, photos, monkeypatch):
    def scores(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("amp.evaluate.choice._scores", scores)
    with pytest.raises(AmpError, match="out of memory with --choices_a_batch 4; give a smaller number"):
        choose(drawn_choices(), {"ours": world.model}, world.preprocess, lambda n: open_photo(photos / n), None, 4)


def test_the_generator_is_asked_where_a_file_brings_no_knowledge(world, photos):
    choices = [Choice("1.png", ("dog kicks ball", "ball kicks dog")), drawn_choices()[0]]
    asked = []

    def generate(texts):
        asked.extend(texts)
        return [knowledge(("dog", "kicks", "ball"))] * len(texts)

    def scores(generate):
        found = choose(choices, {"ours": world.model}, world.preprocess, lambda n: open_photo(photos / n), generate)
        return found["ours"].scores

    with_it, without = scores(generate), scores(None)
    assert asked == ["dog kicks ball", "ball kicks dog"]
    assert with_it[0] != without[0] and with_it[1] == pytest.approx(without[1], abs=1e-6)


@pytest.fixture
def choosing(world, clip_folder, shards, photos, tmp_path):
    """Runs the command with an adapter; returns the CSV rows of complete tests."""
    save_adapter(tmp_path / "adapter.safetensors", world.model)

    def run(tests, *more):
        main(
            [
                *("--shards", str(shards), "--adapters", f"ours={tmp_path}/adapter.safetensors"),
                *("--tests", json.dumps(list(map(str, tests))), "--images", str(photos), "--knowledge", "none"),
                *("--out", str(tmp_path / "choices.csv"), *more),
            ]
        )

    return run


def entries(numbers, negative="A ball chases a dog"):
    return {
        f"{i}": {"filename": f"{i}.png", "caption": "A dog chases a ball", "negative_caption": negative}
        for i in numbers
    }


def saved(tmp_path):
    rows = csv.DictReader((tmp_path / "choices.csv").open())
    return {(row["test"], row["method"]): row for row in rows if row["group"] == "all"}


def test_the_command_runs_all_kinds_and_one_bad_test_does_not_cost_the_rest(choosing, photos, tmp_path, capsys):
    (photos / "6.png").write_text("no image")
    good = write(tmp_path / "swap_obj.json", entries(range(6)) | {"9": {**entries([5])["5"], "negative_caption": ""}})
    spoilt = write(tmp_path / "spoilt.json", entries([5, 6]))
    with pytest.raises(SystemExit) as error:
        choosing(["swapped-roles", spoilt, "swapped-actions", good], "--max_skipped_entries", "0.2")
    whole = saved(tmp_path)
    assert error.value.code == 2 and len(whole) == 6 and whole["swap_obj", "ours"]["choices"] == "6"
    assert int(whole["swapped-roles", "ours"]["choices"]) > 3
    captured = capsys.readouterr()
    assert "swap_obj" in captured.out and "spoilt" not in captured.out
    assert "swap_obj: 1 entries skipped" in captured.err and "choices.csv contains 3 of 4 tests" in captured.err
    assert "test spoilt: photos: 1 of 2 entries (50.00%) can't be used" in captured.err.splitlines()[-1]
    listed = list(csv.DictReader((tmp_path / "choices.skipped.csv").open()))
    assert listed == [{"test": "swap_obj", "skipped": "entry 9", "reason": "negative_caption is '', expected a text"}]


def test_a_test_is_saved_when_it_is_done(choosing, tmp_path, capsys, monkeypatch):
    done = []

    def fails_later(choices, *arguments):
        if done:
            assert len(saved(tmp_path)) == 1  # the first test is saved before the second ends
            raise RuntimeError("the machine is on fire")
        done.append(choices)
        return {"base CLIP": Choices([[1.0, 0.0]] * len(choices), ["g"] * len(choices), {})}

    monkeypatch.setattr("amp.evaluate.choice_run.choose", fails_later)
    with pytest.raises(RuntimeError, match="fire"):
        choosing(["swapped-roles", "swapped-actions"])
    assert set(saved(tmp_path)) == {("swapped-roles", "base CLIP")}
    captured = capsys.readouterr()
    assert "swapped" in captured.out and "choices.csv contains 1 of 2 tests" in captured.err


def test_everything_given_is_checked_before_a_model_is_loaded(choosing, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("amp.evaluate.choice_run.load_base", None)
    files = [
        write(tmp_path / "empty.json", entries(range(3)) | {"3": CREPE | {"negative_caption": " "}}),
        write(tmp_path / "elsewhere.json", entries(range(100, 103))),
        tmp_path / "none.json",
    ]
    with pytest.raises(SystemExit):
        choosing(
            [*files, "swapped-roles"],
            "--adapters",
            "a=no/a",
            "b=no/b",
            "--out",
            f"{photos}/0.png/out.csv",
            "--choices_a_batch",
            "0",
            "--shards",
            "no/shards",
        )
    said = capsys.readouterr().err
    for words in (
        "error: 8 errors: ",
        "adapter 'a=no/a'",
        "adapter 'b=no/b'",
        "choices_a_batch is 0",
        "no/shards",
        "empty.json: 1 of 4 entries (25.00%) can't be used, above --max_skipped_entries 0.01; first:",
        "negative_caption is ' ', expected a text; correct the input, or allow it with --max_skipped_entries",
        "elsewhere.json: 3 of 3 entries (100.00%) can't be used",
        "no photo 100.png in",
        "none.json: can't be read",
        "out.csv: can't be written",
    ):
        assert words in said


def test_names_are_used_once(choosing, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    same = [write(folder / "x.json", entries([1])) for folder in (tmp_path, tmp_path / "other")]
    file = tmp_path / "adapter.safetensors"
    for tests, more, message in (
        (same, [], "tests has more than one named 'x'"),
        ([], [], "tests is empty"),
        (["foils"], [], r"has no foils, expected shards with some; run amp generate_knowledge --foils true"),
        (["swapped-roles"], ["--adapters", "[]"], "adapters is empty"),
        (["swapped-roles"], ["--adapters", f"a={file}", f"a={file}"], "adapters has two named 'a'"),
        (["swapped-roles"], ["--adapters", f"base CLIP={file}"], "the name is 'base CLIP'"),
        (["swapped-roles"], ["--max_skipped_entries", "5"], "max_skipped_entries is 5.0, expected a fraction"),
        (same[:1], ["--images", "null"], "images is None, expected the folder"),
    ):
        with pytest.raises(SystemExit):
            choosing(tests, *more)
        assert message in capsys.readouterr().err
