"""States of photos in an index: searches from them equal searches that decode the photos."""

import json

import numpy as np
import pytest
from support.drawn_data import draw
from support.evaluation import make_far_model

import amp
from amp.errors import AmpError
from amp.search.index import PhotoIndex

QUERY = "A red dog chases a ball"
KNOWLEDGE = amp.Knowledge((amp.Triplet("dog", "chases", "ball"),), ("The dog runs with its legs stretched out",))
PHOTOS = 8


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(PHOTOS):
        draw(number).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture(scope="module")
def reranker(clip_folder):
    return amp.Reranker(*make_far_model(clip_folder))


@pytest.fixture
def search(reranker, photos, tmp_path):
    search = amp.Retriever(reranker, tmp_path / "index", top_k=5)
    search.update(photos, workers=0, states="fp16")
    return search


def hits(search) -> dict:
    return {hit.path.name: hit.score for hit in search.search(QUERY, knowledge=KNOWLEDGE).hits}


def states_of(search) -> np.ndarray:
    index = PhotoIndex(search.folder)
    return np.stack([index.state(n, search.reranker.packer.key) for n in range(len(index))])


def test_a_search_decodes_only_photos_without_a_state(search, monkeypatch):
    expected = hits(search)
    opened = []
    image = PhotoIndex.image
    monkeypatch.setattr(PhotoIndex, "image", lambda index, n: opened.append(index.names[n]) or image(index, n))
    assert hits(search) == expected and opened == []
    path = search.folder / "index.json"
    content = json.loads(path.read_text())
    first = search.search(QUERY, knowledge=KNOWLEDGE).hits[0].path.name
    content["state_rows"][[name for name, *_ in content["photos"]].index(first)] = -1
    path.write_text(json.dumps(content))
    again = amp.Retriever(search.reranker, search.folder, top_k=5)
    assert hits(again) == pytest.approx(expected, abs=1e-3) and opened == [first]


def test_new_photos_are_appended(search, photos):
    before, (path,) = states_of(search), search.folder.glob("states-*.bin")
    with path.open("ab") as file:
        file.write(b"\1" * 5000)  # left by an update that was killed
    draw(30).save(photos / "9.png")
    (photos / "copy.png").write_bytes((photos / "0.png").read_bytes())
    assert search.update(photos, workers=0, states="fp16").encoded == 1
    assert list(search.folder.glob("states-*.bin")) == [path]
    after = states_of(search)
    assert path.stat().st_size == (PHOTOS + 1) * after.shape[1]
    assert np.array_equal(after[:PHOTOS], before) and np.array_equal(after[-1], before[0])
    fresh = search.reranker.packer.pack(search.reranker.encode_images([photos / "9.png"]), "fp16")
    assert np.array_equal(after[PHOTOS], fresh[0])


def test_states_of_removed_photos_are_dropped_when_most_are(search, photos):
    before, (path,) = states_of(search), search.folder.glob("states-*.bin")
    for number in range(3):
        (photos / f"{number}.png").unlink()
    search.update(photos, workers=0, states="fp16")
    assert list(search.folder.glob("states-*.bin")) == [path] and np.array_equal(states_of(search), before[3:])
    for number in range(3, 6):
        (photos / f"{number}.png").unlink()
    search.update(photos, workers=0, states="fp16")
    (compacted,) = search.folder.glob("states-*.bin")
    assert compacted != path and compacted.stat().st_size == 2 * before.shape[1]
    assert np.array_equal(states_of(search), before[6:])


def test_states_of_another_adapter_are_not_used_but_replaced(search, clip_folder, photos):
    model, preprocess = make_far_model(clip_folder, num_prompts=1)
    other = amp.Retriever(amp.Reranker(model, preprocess), search.folder, top_k=5)
    assert search.stores_states and not other.stores_states
    decoded = hits(other)
    assert other.update(photos, workers=0, states="int8").encoded == PHOTOS
    assert other.stores_states and hits(other) == pytest.approx(decoded, abs=1e-2)
    assert len(list(search.folder.glob("states-*.bin"))) == 1
    assert other.update(photos, workers=0, states=None).encoded == 0
    assert not other.stores_states and not list(search.folder.glob("states-*.bin")) and hits(other) == decoded


def test_a_damaged_file_of_states_is_refused(search):
    (path,) = search.folder.glob("states-*.bin")
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(AmpError, match=r"index.json: damaged \(mmap length is greater than file size\)"):
        PhotoIndex(search.folder)
    path.write_bytes(content)
    index = search.folder / "index.json"
    index.write_text(index.read_text().replace('"rows": 8', '"rows": 7'))
    with pytest.raises(AmpError, match="state_rows exceeds 7, the number of states"):
        PhotoIndex(search.folder)
    path.unlink()
    with pytest.raises(AmpError, match=r"damaged .*states-"):
        PhotoIndex(search.folder)


def test_a_photo_with_a_damaged_state_is_skipped(search):
    expected = hits(search)
    first = next(iter(expected))
    row = search.index.names.index(first)
    (path,) = search.folder.glob("states-*.bin")
    with path.open("r+b") as file:
        file.seek(row * search.index.states.row_bytes)
        file.write(b"\0" * 8)
    found = amp.Retriever(search.reranker, search.folder, top_k=5).search(QUERY, knowledge=KNOWLEDGE)
    assert {path.name: reason for path, reason in found.skipped.items()} == {first: "not a packed image state"}
    seen = [hit.path.name for hit in found.hits if hit.base_rank < 4]
    assert seen == [name for name in expected if name in seen] and first not in seen
