"""Search in a folder of photos, compared with a naive loop: one query, one photo and one forward pass at a time."""

import errno
import json
import os
import shutil
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.drawn_data import draw
from support.equations.search import search_photos
from support.evaluation import make_far_model
from support.scripted_model import scripted_model

import amp
from amp.commands import search as command
from amp.errors import AmpError
from amp.files import open_log
from amp.model.adapter import save_adapter
from amp.report.contact_sheet import draw_contact_sheet
from amp.report.drawing import save_picture
from amp.search import update as updating
from amp.search.index import PhotoIndex
from amp.search.retriever import Found, Hit
from amp.search.update import Update
from amp.terminal import PlainConsole

PHOTOS = 14
KNOWLEDGE = amp.Knowledge((amp.Triplet("dog", "chases", "ball"),), ("The dog runs with its legs stretched out",))
LONG = amp.Knowledge(KNOWLEDGE.triplets, (KNOWLEDGE.states[0] + " over the lawn" * 20,))
QUERY = "A red dog chases a ball"


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    (root / "below").mkdir(parents=True)
    for number in range(PHOTOS):
        folder = root / "below" if number % 3 == 0 else root
        draw(number).save(folder / f"photo {number:02d}.png")
    (root / ".hidden.png").write_bytes(b"")
    (root / "notes.txt").write_text("no photo")
    return root


def by_hand(model, preprocess, root, top_k, fusion_weight=0.0):
    return search_photos(model, preprocess, sorted(root.rglob("photo *.png")), QUERY, KNOWLEDGE, top_k, fusion_weight)


@pytest.mark.parametrize(
    ("prompt", "fusion_weight"),
    [({}, 2.0), ({"knowledge": "none"}, 0.0), ({"interaction": "readout", "enrich": True}, 0.0)],
    ids=["aim", "control", "readout"],
)
@pytest.mark.parametrize(("states", "tolerance"), [(None, 1e-5), ("fp16", 2e-4), ("int8", 4e-3)])
def test_a_search_equals_the_naive_loop(clip_folder, photos, tmp_path, prompt, fusion_weight, states, tolerance):
    model, preprocess = make_far_model(clip_folder, **prompt)
    if prompt.get("interaction") == "readout":
        model.interaction.readout.out.weight.data.normal_(std=0.3)
    search = amp.Retriever(
        amp.Reranker(model, preprocess, batch_size=4), tmp_path / "index", top_k=6, fusion_weight=fusion_weight
    )
    update = search.update(photos, workers=0, states=states)
    assert update == Update(PHOTOS, PHOTOS, removed=0, skipped={}, hidden=1, others=1)
    found = search.search(QUERY, count=9, knowledge=KNOWLEDGE)
    expected = by_hand(model, preprocess, photos, 6, fusion_weight)[:9]
    seen, naive = ({path: scores for path, *scores in rows} for rows in (map(astuple, found.hits), expected))
    assert list(seen) == list(naive) or states == "int8"
    for path, (score, base) in naive.items():
        assert seen[path][:2] == [pytest.approx(score, abs=tolerance), pytest.approx(base, abs=1e-5)], path
    assert sorted(h.base_rank for h in found.hits[:6]) == list(range(6))
    assert [h.base_rank for h in found.hits[6:]] == [6, 7, 8]


def test_the_generator_gives_the_querys_knowledge(clip_folder, photos, tmp_path):
    model, preprocess = make_far_model(clip_folder)
    asked = []

    def generator(captions):
        asked.extend(captions)
        return [KNOWLEDGE] * len(captions)

    search = amp.Retriever(amp.Reranker(model, preprocess, knowledge=generator), tmp_path / "index", top_k=5)
    search.update(photos, workers=0)
    found, given = search.search(QUERY), search.search(QUERY, knowledge=KNOWLEDGE)
    assert asked == [QUERY] and found.knowledge == KNOWLEDGE and found.hits == given.hits
    none = amp.Retriever(amp.Reranker(model, preprocess), tmp_path / "index", top_k=5).search(QUERY)
    assert none.knowledge == amp.Knowledge() and [h.score for h in none.hits] != [h.score for h in found.hits]


def test_an_update_encodes_what_changed(clip_folder, photos, tmp_path):
    model, preprocess = make_far_model(clip_folder)
    search = amp.Retriever(amp.Reranker(model, preprocess), tmp_path / "index")
    search.update(photos, workers=0)
    before = dict(zip(search.index.names, search.index.features.copy(), strict=True))
    (photos / "photo 01.png").unlink()
    draw(50).save(photos / "photo 02.png")
    os.utime(photos / "photo 02.png", ns=(1, 1))
    draw(51).save(photos / "new.jpg")
    (photos / "cut.jpg").write_bytes((photos / "new.jpg").read_bytes()[:200])
    (photos / "text.png").write_text("no image")
    update = search.update(photos, workers=0)
    assert (update.photos, update.encoded, update.removed) == (PHOTOS, 2, 1)
    listed = [line.split("\t")[0] for line in (tmp_path / "index" / "skipped.txt").read_text().splitlines()]
    assert set(update.skipped) == {"cut.jpg", "text.png"} == set(listed)
    after = dict(zip(search.index.names, search.index.features, strict=True))
    assert set(after) == set(before) - {"photo 01.png"} | {"new.jpg"}
    for name in set(after) & set(before):
        assert np.array_equal(after[name], before[name]) == (name != "photo 02.png")
    assert len(list((tmp_path / "index").glob("features-*.npy"))) == 1
    again = search.update(photos, workers=0)
    assert (again.photos, again.encoded) == (PHOTOS, 0)


def test_photos_lie_as_their_camera_noted(clip_folder, photos, tmp_path):
    model, preprocess = make_far_model(clip_folder)
    image = draw(5)
    exif = Image.Exif()
    exif[0x0112] = 6  # must be rotated by 90 degrees
    image.transpose(Image.Transpose.ROTATE_90).save(photos / "turned.png", exif=exif)
    image.save(photos / "upright.png")
    search = amp.Retriever(amp.Reranker(model, preprocess), tmp_path / "index")
    search.update(photos, workers=0)
    rows = [search.index.features[search.index.names.index(name)] for name in ("turned.png", "upright.png")]
    assert np.array_equal(*rows)


@pytest.mark.parametrize("top_k", [0, 3, PHOTOS])
def test_photos_that_are_gone_are_no_hits_at_any_rank(clip_folder, photos, tmp_path, top_k):
    model, preprocess = make_far_model(clip_folder)
    search = amp.Retriever(amp.Reranker(model, preprocess), tmp_path / "index", top_k=top_k)
    search.update(photos, workers=0)
    order = [path for path, *_ in by_hand(model, preprocess, photos, top_k=0)]
    gone = [order[0], order[5]]
    for path in gone:
        path.unlink()
    left = [path for path in order if path not in gone]
    found = search.search(QUERY, count=8, knowledge=KNOWLEDGE)
    by_clip = sorted(found.hits, key=lambda hit: hit.base_rank)
    assert [hit.base_rank for hit in by_clip] == list(range(8)) or top_k == PHOTOS
    assert len(found.hits) == 8 and {hit.path for hit in found.hits} <= set(left)
    if top_k < 8:  # other photos replaced them
        assert [hit.path for hit in by_clip] == left[:8]
    assert found.skipped == dict.fromkeys(gone, "gone since it was indexed")
    for path in left:
        path.unlink()
    with pytest.raises(AmpError, match=f"{photos}: holds none of the {PHOTOS} photos of the index .* add --photos"):
        search.search(QUERY, knowledge=KNOWLEDGE)


def test_an_update_that_was_killed_goes_on(clip_folder, photos, tmp_path, monkeypatch):
    """Copies the index folder during the update, as `kill -9` would leave it after 8 photos."""
    monkeypatch.setattr(updating, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(updating, "SAVE_SHARE", 0.0)
    model, preprocess = make_far_model(clip_folder)
    killed = tmp_path / "killed"

    def stop(done, total):
        if done == 12:
            (tmp_path / "index" / ".features-0.npy.tmp").write_bytes(b"half a file")
            shutil.copytree(tmp_path / "index", killed)

    whole = amp.Retriever(amp.Reranker(model, preprocess, batch_size=4), tmp_path / "index")
    whole.update(photos, workers=0, progress=stop)
    search = amp.Retriever(amp.Reranker(model, preprocess, batch_size=4), killed)
    assert (len(search.index), search.index.pending) == (8, PHOTOS - 8)
    assert len(search.search(QUERY, count=50).hits) == 8
    update = search.update(photos, workers=0)
    assert (update.photos, update.encoded, search.index.pending) == (PHOTOS, PHOTOS - 8, 0)
    assert search.index.names == whole.index.names
    np.testing.assert_allclose(search.index.features, whole.index.features, atol=1e-6)
    assert not list(killed.glob(".*.tmp"))


def test_an_interrupted_update_keeps_all_it_has_encoded(clip_folder, photos, tmp_path):
    model, preprocess = make_far_model(clip_folder)
    search = amp.Retriever(amp.Reranker(model, preprocess, batch_size=5), tmp_path / "index")

    def stop(done, total):
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search.update(photos, workers=0, progress=stop)
    assert search.update(photos, workers=0).encoded == PHOTOS - 10


def test_one_process_updates_an_index_and_others_search_it(clip_folder, photos, tmp_path):
    model, preprocess = make_far_model(clip_folder)
    search = amp.Retriever(amp.Reranker(model, preprocess), tmp_path / "index")
    search.update(photos, workers=0)
    draw(50).save(photos / "new.png")
    seen = []

    def meanwhile(done, total):
        with pytest.raises(AmpError, match="another process is updating this index; wait"):
            search.update(photos, workers=0)
        seen.append(
            len(amp.Retriever(amp.Reranker(model, preprocess), tmp_path / "index").search(QUERY, count=50).hits)
        )

    search.update(photos, workers=0, progress=meanwhile)
    assert seen == [PHOTOS]


@pytest.mark.parametrize("move", ["copied", "renamed", "into a folder above", "with the index"])
def test_photos_that_were_moved_are_not_encoded_again(clip_folder, photos, tmp_path, move):
    model, preprocess = make_far_model(clip_folder)
    index = tmp_path / "index"
    amp.Retriever(amp.Reranker(model, preprocess), index).update(photos, workers=0)
    before = amp.Retriever(amp.Reranker(model, preprocess), index).search(QUERY, count=PHOTOS)
    root = tmp_path / "moved" / "photos"
    if move == "copied":
        shutil.copytree(photos, root, copy_function=shutil.copyfile)  # with new modification times
        shutil.rmtree(photos)
    elif move == "renamed":
        root = photos
        (photos / "below").rename(photos / "other")
        (photos / "photo 01.png").rename(photos / "Ünï.png")
    elif move == "with the index":
        root.parent.mkdir()
        photos.rename(root)
        index = index.rename(tmp_path / "moved" / "index")
        assert len(amp.Retriever(amp.Reranker(model, preprocess), index).search(QUERY, count=PHOTOS).hits) == PHOTOS
    else:
        root = root.parent
        root.mkdir()
        photos.rename(root / "photos")
    search = amp.Retriever(amp.Reranker(model, preprocess), index)
    update = search.update(root, workers=0)
    assert (update.photos, update.encoded, update.removed) == (PHOTOS, 0, 0)
    after = search.search(QUERY, count=PHOTOS)
    assert [hit.score for hit in after.hits] == [hit.score for hit in before.hits]
    assert search.update(root, workers=0).encoded == 0


def test_a_changed_photo_is_encoded_though_another_has_its_name_and_time(clip_folder, photos, tmp_path):
    model, preprocess = make_far_model(clip_folder)
    search = amp.Retriever(amp.Reranker(model, preprocess), tmp_path / "index")
    search.update(photos, workers=0)
    old, new = photos / "photo 01.png", photos / "photo 02.png"
    old.unlink()
    new.rename(old)  # keeps its size and modification time
    update = search.update(photos, workers=0)
    assert (update.photos, update.encoded, update.removed) == (PHOTOS - 1, 0, 1)
    row = search.index.features[search.index.names.index("photo 01.png")]
    with torch.no_grad():
        expected = model.encode_image(preprocess(Image.open(old).convert("RGB"))[None])[0]
    np.testing.assert_allclose(row / np.linalg.norm(row), expected / expected.norm(), atol=1e-5)


def test_an_index_of_version_1_keeps_the_features_of_its_jpegs(clip_folder, photos, tmp_path):
    model, preprocess = make_far_model(clip_folder)
    draw(60).save(photos / "a.jpg")
    search = amp.Retriever(amp.Reranker(model, preprocess), tmp_path / "index")
    search.update(photos, workers=0)
    path = tmp_path / "index" / "index.json"
    content = json.loads(path.read_text())
    content |= {"version": 1, "skipped": {}, "photos": [entry[:3] for entry in content["photos"]]}
    del content["beside"], content["pending"]
    path.write_text(json.dumps(content))
    search = amp.Retriever(amp.Reranker(model, preprocess), tmp_path / "index")
    assert len(search.search(QUERY, count=50).hits) == PHOTOS + 1
    update = search.update(photos, workers=0, states=None)
    assert update.encoded == PHOTOS  # the PNG files, some of which version 1 decoded wrongly
    assert json.loads(path.read_text())["version"] == 2
    path.write_text(json.dumps(content | {"version": 3}))
    with pytest.raises(AmpError, match=r"photo index' 3, expected .* 1 to 2; update open-clip-amp"):
        PhotoIndex(tmp_path / "index")


# -- the walk through the folder --------------------------------------------------------------------------------------


def test_what_a_walk_leaves_out_is_listed_and_counted(clip_folder, photos, tmp_path):
    model, preprocess = make_far_model(clip_folder)
    (photos / "phone.heic").write_bytes(b"x")
    (photos / "scan.JP2").write_bytes(b"x")
    (photos / ".thumbnails").mkdir()
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    draw(70).save(tmp_path / "elsewhere" / "deep" / "linked.png")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "elsewhere")
    (photos / "a link").symlink_to(tmp_path / "elsewhere")
    (photos / "again").symlink_to(tmp_path / "elsewhere" / "deep")
    (photos / "up").symlink_to(tmp_path)
    (photos / "disk").symlink_to(tmp_path / "not attached")
    update = amp.Retriever(amp.Reranker(model, preprocess), tmp_path / "index").update(photos, workers=0)
    assert (update.photos, update.hidden, update.others) == (PHOTOS + 1, 2, 1)
    assert "a link/deep/linked.png" in PhotoIndex(tmp_path / "index").names
    twice = "a folder that was already read under another name"
    assert update.skipped.pop("phone.heic", "pillow-heif") and "JPEG 2000" in update.skipped.pop("scan.JP2")
    assert update.skipped == {
        "again": twice,
        "a link/back": twice,
        "up": "a link to a folder that contains this one",
        "disk": "a link whose target is missing",
    }


@pytest.mark.parametrize("closed", ["below", "."])
def test_photos_of_a_folder_that_cant_be_opened_stay_in_the_index(clip_folder, photos, tmp_path, monkeypatch, closed):
    """Tests may run as root, who ignores permissions, so the call that opens a folder is replaced."""
    model, preprocess = make_far_model(clip_folder)
    search = amp.Retriever(amp.Reranker(model, preprocess), tmp_path / "index")
    search.update(photos, workers=0)
    names, scandir = set(search.index.names), os.scandir

    def refuse(path="."):
        if Path(path) == photos / closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    (photos / "photo 01.png").unlink()
    monkeypatch.setattr(os, "scandir", refuse)
    if closed == ".":
        with pytest.raises(AmpError, match=r"can't be opened \(Permission denied\)"):
            search.update(photos, workers=0)
        assert set(search.index.names) == names
        return
    update = search.update(photos, workers=0)
    assert update.skipped == {"below": "a folder that can't be opened (Permission denied)"}
    assert (update.encoded, update.removed) == (0, 1)
    assert set(search.index.names) == names - {"photo 01.png"}


def test_refusals(clip_folder, photos, tmp_path):
    model, preprocess = make_far_model(clip_folder)
    index = tmp_path / "index"
    with pytest.raises(AmpError, match="top_k is -1"):
        amp.Retriever(amp.Reranker(model, preprocess), index, top_k=-1)
    with pytest.raises(AmpError, match="batch_size is 0"):
        amp.Reranker(model, preprocess, batch_size=0)
    search = amp.Retriever(amp.Reranker(model, preprocess), index)
    with pytest.raises(AmpError, match=r"index.json: can't be read .*, expected an index; make it with amp search"):
        search.search(QUERY)
    (tmp_path / "empty").mkdir()
    for folder, message in (
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path / "empty", "no photo that can be read"),
    ):
        with pytest.raises(AmpError, match=message):
            search.update(folder, workers=0)
    assert not index.exists()
    search.update(photos, workers=0)
    with pytest.raises(AmpError, match="the query is empty"):
        search.search("  ")
    with pytest.raises(AmpError, match="count is 0"):
        search.search(QUERY, count=0)
    (tmp_path / "empty" / "photo 01.png").write_bytes(b"another file of the same name")
    with pytest.raises(AmpError, match=f"only 0 of the {PHOTOS} indexed photos of {photos} are in {tmp_path}/empty"):
        search.update(tmp_path / "empty", workers=0)
    proj = model.backbone.clip.visual.proj + 1
    model.load_state_dict({"backbone.clip.visual.proj": proj}, strict=False)
    with pytest.raises(AmpError, match="was made with another model or transform"):
        search.update(photos, workers=0)
    with pytest.raises(AmpError, match="was made by a model with weights"):
        amp.Retriever(amp.Reranker(model, preprocess), index).search(QUERY)
    content = json.loads((index / "index.json").read_text())
    for change in ({"photos": content["photos"][:-1]}, {"features": 3}, {"version": 9}):
        (index / "index.json").write_text(json.dumps(content | change))
        with pytest.raises(AmpError, match=r"index\.json"):
            PhotoIndex(index)


@pytest.mark.parametrize("kind", ["a file of features is gone", "cut short", "another user's", "not an index"])
def test_a_broken_index_says_what_can_be_done_and_it_helps(clip_folder, photos, tmp_path, monkeypatch, kind):
    """The index is in the photos' folder, so the message must not suggest removing that folder."""
    model, preprocess = make_far_model(clip_folder)
    search = amp.Retriever(amp.Reranker(model, preprocess), photos)
    search.update(photos, workers=0)
    (features,), file = photos.glob("features-*.npy"), photos / "index.json"
    if kind == "a file of features is gone":
        features.unlink()
        message = rf"index\.json: damaged \(.*{features.name}: No such file or directory\); remove this file, then make"
    elif kind == "cut short":
        os.truncate(features, 200)
        message = r"index\.json: damaged \(.*\); remove this file, then make"
    elif kind == "not an index":
        file.write_text('{"weight_map": {}}')
        message = "index.json: format None None, expected .*; give another folder with --index"
    else:

        def refuse(path, *arguments, **options):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(np, "load", refuse)
        message = rf"{features.name}: can't be read \(Permission denied\), .*; make it readable, or give another folder"
    for call in (lambda: search.search(QUERY), lambda: search.update(photos, workers=0)):
        search._index = None
        with pytest.raises(AmpError, match=message):
            call()
    if "remove" in message:
        file.unlink()
        assert search.update(photos, workers=0).photos == PHOTOS


def test_a_photo_of_another_content_is_no_hit(clip_folder, photos, tmp_path):
    model, preprocess = make_far_model(clip_folder)
    search = amp.Retriever(amp.Reranker(model, preprocess), tmp_path / "index", top_k=3)
    search.update(photos, workers=0)
    touched, larger, as_large = sorted(photos.glob("photo *.png"))[:3]
    os.utime(touched, ns=(0, 0))
    larger.write_bytes(larger.read_bytes() + b"0")
    as_large.write_bytes(as_large.read_bytes()[:-1] + b"0")
    os.utime(as_large, ns=(0, 0))
    found = search.search(QUERY, count=PHOTOS, knowledge=KNOWLEDGE)
    assert len(found.hits) == PHOTOS - 2 and touched in {hit.path for hit in found.hits}
    assert found.skipped == dict.fromkeys([larger, as_large], "changed since it was indexed; --photos encodes it again")


def test_a_name_that_no_file_can_have_is_skipped(clip_folder, photos, tmp_path):
    model, preprocess = make_far_model(clip_folder)
    search = amp.Retriever(amp.Reranker(model, preprocess), tmp_path / "index", top_k=3)
    search.update(photos, workers=0)
    content = json.loads((tmp_path / "index" / "index.json").read_text())
    content["photos"][0][0] = "a\0b.png"
    (tmp_path / "index" / "index.json").write_text(json.dumps(content))
    search._index = None
    found = search.search(QUERY, count=PHOTOS, knowledge=KNOWLEDGE)
    assert len(found.hits) == PHOTOS - 1
    assert [reason[:14] for reason in found.skipped.values()] == ["can't be read "]  # Python's message varies


def test_photos_that_cant_be_looked_at_stay_in_the_index(clip_folder, photos, tmp_path, monkeypatch):
    """Such as in a folder that can be listed but not entered, or on a network disk with a temporary failure."""
    model, preprocess = make_far_model(clip_folder)
    search = amp.Retriever(amp.Reranker(model, preprocess), tmp_path / "index")
    search.update(photos, workers=0)
    names, path_stat = set(search.index.names), Path.stat

    def refuse(path, **options):
        if path.parent == photos / "below":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return path_stat(path, **options)

    (photos / "photo 01.png").unlink()
    monkeypatch.setattr(Path, "stat", refuse)
    update = search.update(photos, workers=0)
    assert (update.photos, update.encoded, update.removed) == (PHOTOS - 1, 0, 1)
    assert set(update.skipped.values()) == {"can't be read (Input/output error)"}
    assert set(search.index.names) == names - {"photo 01.png"}


def test_features_that_are_not_finite_are_refused(clip_folder, photos, tmp_path):
    model, preprocess = make_far_model(clip_folder)
    search = amp.Retriever(amp.Reranker(model, preprocess), tmp_path / "index")
    search.update(photos, workers=0)
    (file,) = (tmp_path / "index").glob("features-*.npy")
    features = np.load(file)
    features[2, 0] = np.nan
    np.save(file, features)
    with pytest.raises(AmpError, match="1 scores are not finite"):
        amp.Retriever(amp.Reranker(model, preprocess), tmp_path / "index").search(QUERY)


def test_a_search_writes_nothing_into_an_index_that_is_read_only(clip_folder, photos, tmp_path, monkeypatch, capsys):
    """With rules and an adapter. Tests may run as root, so the calls that write are replaced."""
    pytest.importorskip("spacy", reason='needs spaCy: pip install "open-clip-amp[generate]"')
    model, preprocess = make_far_model(clip_folder)
    save_adapter(tmp_path / "adapter.safetensors", model)
    index = tmp_path / "index"
    amp.Retriever(amp.Reranker(model, preprocess), index).update(photos, workers=0)
    before = {path: path.stat().st_mtime_ns for path in (index, *index.iterdir())}

    def read_only(function):
        def call(path, *arguments, **options):
            if Path(path).is_relative_to(index):
                raise OSError(errno.EROFS, "Read-only file system", str(path))
            return function(path, *arguments, **options)

        return call

    monkeypatch.setattr(os, "mkdir", read_only(os.mkdir))
    monkeypatch.setattr("amp.generation.cache.open_log", read_only(open_log))
    monkeypatch.setattr("amp.locks.open_log", read_only(open_log))
    options = ["--index", str(index), "--adapter", str(tmp_path / "adapter.safetensors"), "--workers", "0"]
    command.main([*options, "--count", "3", "A dog chases a red ball"])
    assert "<dog, chases, ball>" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (index, *index.iterdir())}
    with pytest.raises(SystemExit):
        command.main([*options, "--photos", str(photos)])
    assert f"{index}: can't be written (Read-only file system), expected a writable folder" in capsys.readouterr().err


def test_the_command_finds_with_rules_and_draws(clip_folder, photos, tmp_path, capsys):
    pytest.importorskip("spacy", reason='needs spaCy: pip install "open-clip-amp[generate]"')
    model, _ = make_far_model(clip_folder)
    save_adapter(tmp_path / "adapter.safetensors", model)
    options = ["--index", str(tmp_path / "index"), "--adapter", str(tmp_path / "adapter.safetensors"), "--workers", "0"]
    with pytest.MonkeyPatch.context() as without:
        without.setattr("amp.generation.query.KnowledgeGenerator", None)  # indexing needs no generator
        command.main([*options, "--photos", str(photos)])
    told = capsys.readouterr().err
    assert f"{PHOTOS} photos in {tmp_path / 'index'}: {PHOTOS} encoded, 0 kept, 0 removed" in told
    assert "left out: 1 hidden files and folders, 1 files that are not photos" in told
    command.main([*options, "--sheet", str(tmp_path / "found.png"), "--count", "7", "A dog chases a red ball"])
    out = capsys.readouterr().out
    assert "<dog, chases, ball>" in out and "CLIP's rank" in out
    assert len([line for line in out.splitlines() if line.endswith(".png") and str(photos) in line]) == 7
    with Image.open(tmp_path / "found.png") as sheet:
        assert sheet.format == "PNG" and len(sheet.convert("RGB").getcolors(1 << 24)) > 100
    assert not (tmp_path / "index" / "replies").exists()  # rules keep no replies
    # Without an adapter only the base model is used.
    command.main(["--index", str(tmp_path / "index"), "--model", clip_folder, "--count", "3", QUERY])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) >= 3 and lines[0].split()[:1] == ["1"]


def test_rules_answer_a_search_if_the_language_model_is_slow(clip_folder, photos, tmp_path, capsys):
    for package in ("spacy", "openai"):
        pytest.importorskip(package, reason=f'needs {package}: pip install "open-clip-amp[generate]"')
    model, _ = make_far_model(clip_folder)
    save_adapter(tmp_path / "adapter.safetensors", model)
    options = ["--index", str(tmp_path / "index"), "--adapter", str(tmp_path / "adapter.safetensors"), "--workers", "0"]
    options += ["--photos", str(photos), "--knowledge", "openai", "--knowledge_timeout", "0.2"]
    with scripted_model() as language_model:
        language_model.delay = 1.0
        options += ["--engine_options", f"{{model: scripted, base_url: {language_model.url}}}"]
        command.main([*options, "A dog chases a red ball"])
    told = capsys.readouterr()
    assert "<dog, chases, ball>" in told.out
    assert "rules answer in place of the model: no answer within 0.2 s" in told.err


@pytest.mark.parametrize(("suffix", "kind"), [("png", "PNG"), ("JPG", "JPEG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_lines_are_not_wrapped_and_the_suffix_decides_the_sheets_format(photos, tmp_path, capsys, suffix, kind):
    path = photos / "photo 01.png"
    gone = {photos / f"photo {number}.png": "gone since it was indexed" for number in range(20, 27)}
    found = Found(QUERY, LONG, [Hit(path, 0.5, 0.4, 2)], gone)
    sheet = tmp_path / f"found.{suffix}"
    command.show(PlainConsole(), found, str(sheet))
    listed = ", ".join(str(path) for path in list(gone)[:5])
    assert capsys.readouterr().out.splitlines() == [
        f"<dog, chases, ball>  {LONG.states[0]}",
        "rank  score  CLIP's rank and score  photo",
        f"   1  0.500            3      0.400  {path}",
        f"skipped 7, gone since it was indexed: {listed}, ...",
        f"{sheet} written",
    ]
    with Image.open(sheet) as image:
        assert image.format == kind


@pytest.mark.parametrize(
    ("suffix", "most", "step"),
    [("webp", "16,383", r"\.png"), ("jpg", "65,500", r"\.png"), ("png", "65,535", "fewer photos")],
)
def test_a_sheet_that_its_format_cant_hold_is_refused(tmp_path, suffix, most, step):
    picture = Image.new("RGB", (1, 70_000))
    with pytest.raises(AmpError, match=rf"the picture has 1 x 70,000 pixels, expected at most {most} .*{step}"):
        save_picture(tmp_path / f"found.{suffix}", picture)
    assert list(tmp_path.iterdir()) == []
    hits = [Hit(tmp_path / "x.png", 0.5, 0.4, 0)] * 1200
    if suffix == "png":
        with pytest.raises(AmpError, match="expected at most 65,535"):
            draw_contact_sheet(tmp_path / "found.png", Found(QUERY, amp.Knowledge(), hits, {}))


def test_a_sheet_says_which_photos_it_could_not_draw(photos, tmp_path, capsys):
    """Without an adapter photos are first decoded when they are drawn."""
    hits = [Hit(photos / f"photo {number:02d}.png", 0.5, 0.4, number) for number in (1, 2)]
    hits[1].path.write_bytes(b"no photo any more")
    draw_contact_sheet(tmp_path / "found.png", Found(QUERY, amp.Knowledge(), hits, {}))
    assert capsys.readouterr().err == f"1 of the photos found can't be read for the picture: {hits[1].path}\n"


def test_a_sheet_replaces_no_photo_and_a_long_query_is_mentioned(clip_folder, photos, tmp_path, capsys):
    options = ["--index", str(tmp_path / "index"), "--model", clip_folder, "--workers", "0", "--count", "1"]
    command.main([*options, "--photos", str(photos), QUERY])
    assert "tokens" not in capsys.readouterr().err
    photo = photos / "photo 01.png"
    before = photo.read_bytes()
    with pytest.raises(SystemExit):
        command.main([*options, "--sheet", str(photo), QUERY])
    assert f"{photo}: is a photo of the index {tmp_path / 'index'}, expected a new file" in capsys.readouterr().err
    assert photo.read_bytes() == before
    command.main([*options, "--sheet", str(photos / "found.png"), QUERY + " and a dog" * 50])
    assert "the query is longer than the 77 tokens that the model reads" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a dog"], "index is empty"),
        (["--index", "x", "a dog"], "adapter and model are both missing"),
        (["--index", "x", "--model", "ViT-B-32", "a dog"], "pretrained is missing, expected the weights of ViT-B-32"),
        (["--index", "x", "--model", "ViT-B-23", "a dog"], "model 'ViT-B-23' is unknown to open_clip"),
        (["--index", "x", "--model", "local-dir:/none", "a dog"], "open_clip saved; correct the model's name"),
        (["--index", "x", "--sheet", "y.doc", "a dog"], "y.doc: the suffix is '.doc', expected one of .png, .jpg"),
    ],
)
def test_the_command_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err
