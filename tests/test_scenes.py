"""The drawn scenes: determinism, captions that match the picture, knowledge, twins, files, the micro CLIP."""

import hashlib
import json
import sys
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from support.repository import ROOT

from amp.errors import AmpError

TOOLS = ROOT / "tools" / "scenes"
sys.path.insert(0, str(TOOLS))

import make_scenes  # noqa: E402
import micro_clip_data  # noqa: E402
import pretrain_micro_clip  # noqa: E402
import scene_language  # noqa: E402
import scenes  # noqa: E402
from scene_actions import PAIR, SOLO  # noqa: E402

MICRO_CLIP = TOOLS / "micro-clip"
PAIR_SCENES = [s for s in (scenes.make_scene(3, "train", i) for i in range(120)) if len(s.actions) == 1]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A small data set on disk: 8 training, 4 validation and 16 test images."""
    out = tmp_path_factory.mktemp("scenes")
    make_scenes.make_scenes(out=out, train=8, val=4, test=16)
    return out


@pytest.fixture(scope="module")
def micro_clip():
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{MICRO_CLIP}")
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{MICRO_CLIP}")


def digest(picture: Image.Image) -> str:
    return hashlib.sha256(picture.tobytes()).hexdigest()


def test_a_scene_depends_on_seed_split_and_index_alone():
    wanted = [(0, "test", 5), (0, "test", 6), (0, "train", 5), (1, "test", 5)]
    first = {key: scenes.make_scene(*key) for key in wanted}
    again = {key: scenes.make_scene(*key) for key in reversed(wanted)}
    assert first == again
    assert len({(s.actors, s.actions, s.place) for s in first.values()}) == len(wanted)
    for key in wanted:
        assert digest(scenes.draw(first[key])) == digest(scenes.draw(again[key]))
        assert scenes.captions(first[key]) == scenes.captions(again[key])
    assert len({digest(scenes.draw(s)) for s in first.values()}) == len(wanted)


def test_scenes_stay_what_they_were():
    """Committed weights and published figures are for exactly these scenes, on every Python version."""
    scene = scenes.make_scene(0, "test", 0)
    assert (scene.actors, scene.actions, scene.place) == (
        (scenes.Actor("dog", "yellow", "small"), scenes.Actor("wizard", "white", "big")),
        ("push",),
        "beach",
    )
    assert scenes.captions(scene)[0].text == "The yellow dog pushes the cart of a wizard in white."


def test_every_action_is_drawn_inside_the_picture_and_shows_both_actors():
    actors = scenes.Actor("frog", "red", "big"), scenes.Actor("robot", "purple", "big")
    for action, trial in product((*PAIR, *SOLO), range(3)):
        actions = (action,) if action in PAIR else (action, "wave" if action != "wave" else "sit")
        name = f"{action} {trial}"
        picture = np.asarray(scenes.draw(scenes.Scene(actors, actions, "room", name), 100)).astype(int)
        for colour in ((214, 40, 44), (132, 62, 172)):
            near = np.abs(picture - colour).sum(-1) < 40
            assert near.sum() > 60, f"{name}: an actor of colour {colour} is hardly visible"
            assert near[:, 0].sum() + near[:, -1].sum() + near[0].sum() < 8, f"{name}: an actor leaves the picture"


def test_roles_are_drawn_not_positions():
    """Mirroring is random, so the actor of an action is on the left about as often as on the right."""
    red, purple = scenes.Actor("frog", "red", "big"), scenes.Actor("robot", "purple", "big")
    left = 0
    for trial in range(60):
        picture = np.asarray(scenes.draw(scenes.Scene((red, purple), ("kick",), "room", str(trial)), 72)).astype(int)
        columns = [np.nonzero(np.abs(picture - c).sum(-1) < 40)[1].mean() for c in ((214, 40, 44), (132, 62, 172))]
        left += columns[0] < columns[1]
    assert 15 <= left <= 45


def test_twins_swap_exactly_roles_or_action():
    seen = {"roles": 0, "action": 0}
    for index in range(400):
        twin = scenes.make_scene(7, "val", index)
        if twin.twin is None:
            assert twin.change == ""
            continue
        seen[twin.change] += 1
        original = scenes.make_scene(7, "val", twin.twin)
        assert twin.place == original.place
        if twin.change == "roles":
            assert twin.actors == original.actors[::-1] and twin.actions == original.actions
            assert twin.actions[0] not in scenes.SYMMETRIC
        else:
            assert twin.actors == original.actors and twin.actions != original.actions
            assert len(twin.actions) == len(original.actions)
    assert seen == {"roles": 50, "action": 50}


def test_active_and_passive_captions_name_the_same_roles():
    """Checked by word order: the actor is first in the active caption, and second in the passive one."""
    assert len({scene.actions for scene in PAIR_SCENES}) == len(PAIR)
    for scene in PAIR_SCENES:
        active, passive = scenes.captions(scene, 2)
        a, b = (actor.kind for actor in scene.actors)
        words = active.text.lower().rstrip(".").split()
        assert words.index(a) < words.index(b), scene
        words = passive.text.lower().rstrip(".").split()
        assert words.index(b) < words.index(a), scene
        for said in (active, passive):
            (triplet,) = [t for t in said.triplets if t["kind"] == "action"]
            assert (triplet["subject"], triplet["object"]) == (a, b), scene
            assert triplet["action"] in [verb.doing for verb in scene_language.VERBS[scene.actions[0]]], scene


def test_knowledge_says_what_the_caption_says_and_no_more():
    kinds = set()
    for index in range(200):
        scene = scenes.make_scene(5, "train", index)
        for said in scenes.captions(scene, 4):
            words = said.text.lower().rstrip(".").split()
            assert 1 <= len(said.triplets) == len(said.states) <= 6
            mentioned = {w for w in words if w in (*scenes.COLOURS, *scenes.HEIGHT)}
            known = {t["object"] for t in said.triplets if t["kind"] == "attribute"}
            assert known == mentioned, said.text
            for triplet, state in zip(said.triplets, said.states, strict=True):
                kinds.add(triplet["kind"])
                assert triplet["subject"] in words and triplet["subject"] in state
                assert triplet["action"]
    assert kinds == {"action", "attribute"}


def test_every_action_has_words_and_looks():
    assert set(scene_language.VERBS) == set(PAIR) and set(scene_language.SOLO_VERBS) == set(SOLO)
    assert set(scene_language.STATES) == {*PAIR, *SOLO}
    for action in PAIR:
        assert all("{s}" in state and "{o}" in state for state in scene_language.STATES[action])


def test_files_follow_the_karpathy_format(written):
    data = json.loads((written / "dataset.json").read_text())
    lines = [json.loads(line) for line in (written / "knowledge.jsonl").read_text().splitlines()]
    assert [image["split"] for image in data["images"]] == ["train"] * 8 + ["val"] * 4 + ["test"] * 16
    sentences = [sentence for image in data["images"] for sentence in image["sentences"]]
    assert [s["sentid"] for s in sentences] == list(range(3 * 28)) == [line["sentid"] for line in lines]
    for image in data["images"]:
        with Image.open(written / "images" / image["filename"]) as picture:
            assert picture.size == (144, 144) and picture.mode == "RGB"
        assert image["sentids"] == [s["sentid"] for s in image["sentences"]]
        assert {lines[k]["image"] for k in image["sentids"]} == {image["filename"]}
        if "twin" in image:
            twin = next(other for other in data["images"] if other["filename"] == image["twin"])
            assert twin["split"] == image["split"] and image["change"] in ("roles", "action")
    assert sorted(p.name for p in (written / "images").iterdir()) == sorted(i["filename"] for i in data["images"])
    assert all(len(line["triplets"]) == len(line["states"]) for line in lines)
    provenance = json.loads((written / "knowledge_provenance.json").read_text())
    assert provenance["captions"] == len(lines) and provenance["images"] == {"train": 8, "val": 4, "test": 16}


def test_knowledge_passes_the_package_s_format_check(written):
    schema = pytest.importorskip("amp.knowledge.schema", reason="the knowledge schema isn't there yet")
    for line in (written / "knowledge.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert len(schema.parse_knowledge(record, "knowledge.jsonl").triplets) == len(record["triplets"])


def test_a_larger_split_keeps_the_smaller_one(written, tmp_path):
    make_scenes.make_scenes(out=tmp_path, train=0, val=2, test=20)
    assert not list(tmp_path.glob("images/train*"))
    for name in ("test_00003.jpg", "val_00001.jpg"):
        assert (tmp_path / "images" / name).read_bytes() == (written / "images" / name).read_bytes()


def test_contact_sheet_and_bad_arguments(tmp_path):
    make_scenes.make_scenes(sheet=tmp_path / "sheet.png", sheet_scenes=5)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 4 * 200 and sheet.height > 2 * 200
    with pytest.raises(AmpError, match="nothing to do"):
        make_scenes.make_scenes()
    with pytest.raises(AmpError, match="--test is -1, expected 0 or more"):
        make_scenes.make_scenes(out=tmp_path, test=-1)


def test_pretraining_texts_mix_alt_texts_captions_and_states():
    scene = next(s for s in PAIR_SCENES if s.actions == ("chase",))
    plain = micro_clip_data.texts(scene, 40, caption_share=0.0, state_share=0.0)
    assert not any("chas" in text or "running" in text for text in plain)
    assert all(scene.actors[0].kind in text and scene.actors[1].kind in text for text in plain)
    order = [text.index(scene.actors[0].kind) < text.index(scene.actors[1].kind) for text in plain]
    assert any(order) and not all(order)
    full = micro_clip_data.texts(scene, 40, caption_share=1.0, state_share=0.0)
    assert all(any(word in text for word in ("chas", "run", "pursue")) for text in full)


def test_micro_clip_is_small_and_has_three_widths(micro_clip):
    model, preprocess, tokenizer = micro_clip
    weights = MICRO_CLIP / "open_clip_model.safetensors"
    figures = json.loads((MICRO_CLIP / "figures.json").read_text())
    assert weights.stat().st_size == figures["bytes"] < 9.5e6
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == figures["sha256"]
    widths = (model.visual.conv1.out_channels, model.token_embedding.embedding_dim, model.text_projection.shape[1])
    assert len(set(widths)) == 3
    assert all(torch.isfinite(p).all() for p in model.parameters())
    picture = scenes.draw(scenes.make_scene(0, "test", 0))
    assert preprocess(picture).shape == (3, 72, 72)
    expected = micro_clip_data.normalise(micro_clip_data.render([scenes.make_scene(0, "test", 0)]))[0]
    torch.testing.assert_close(preprocess(picture), expected, atol=0.02, rtol=0)
    assert tokenizer(["a red cat"]).shape == (1, 77)


def test_micro_clip_finds_objects_and_leaves_room(micro_clip):
    """The committed weights give the committed figures, computed here with open_clip's transform and plain ranks."""
    model, preprocess, tokenizer = micro_clip
    figures = json.loads((MICRO_CLIP / "figures.json").read_text())["demo_test"]
    world = [scenes.make_scene(0, "test", i) for i in range(figures["images"])]
    with torch.no_grad():
        images = model.encode_image(torch.stack([preprocess(scenes.draw(s)) for s in world]), normalize=True)
        groups = [model.encode_text(tokenizer([c.text for c in scenes.captions(s)]), normalize=True) for s in world]
    ranks = [(images @ t).argsort(descending=True).tolist().index(i) for i, group in enumerate(groups) for t in group]
    for k in (1, 5, 10, 20):
        measured = 100 * sum(rank < k for rank in ranks) / len(ranks)
        assert measured == pytest.approx(figures["t2i"][f"R@{k}"], abs=0.5)
    assert 15 < figures["t2i"]["R@1"] < 55 and figures["t2i"]["R@20"] > 80
    assert figures["twin_accuracy_roles"] < 65


def test_pretraining_refuses_the_demo_s_own_scenes(tmp_path):
    with pytest.raises(ValueError, match="scenes seen here"):
        pretrain_micro_clip.pretrain(tmp_path, seed=0, demo_seed=0)
