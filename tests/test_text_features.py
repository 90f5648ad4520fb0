"""The store of text features: features are read back equal and stored once per text, regardless of the process."""

import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from support.models import make_clip

from amp.data.text_features import TextFeatureStore, cut_texts, encode_missing, text_keys
from amp.errors import AmpError
from amp.knowledge.text import surely_cut
from amp.model.towers import make_backbone
from amp.model.towers.base import Backbone

TEXTS = ["a dog", "a dog runs", "", "two cats, asleep", "un chien naïf 🐕", "a dog "]


def features_of(texts, dim=6):
    """A feature that depends only on the text, so that swapped rows are noticed."""
    return np.stack([np.random.default_rng(int(key) % 2**32).normal(size=dim) for key in text_keys(texts)]).astype("f4")


@pytest.fixture
def store(tmp_path):
    return TextFeatureStore(tmp_path, "0123456789abcdef0123", dim=6)


@pytest.fixture(scope="module")
def backbone():
    return make_backbone(make_clip())


def test_features_come_back_in_the_order_asked_for(store):
    store.add(TEXTS, features_of(TEXTS))
    asked = [TEXTS[i] for i in (3, 0, 0, 5, 4, 2, 1)]
    found = store.lookup(asked)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, features_of(asked))
    assert store.lookup([]).shape == (0, 6)


def test_segments_of_several_calls_and_runs_are_one_store(store, tmp_path):
    store.add(TEXTS[:2], features_of(TEXTS[:2]))
    store.add(TEXTS[2:], features_of(TEXTS[2:]))
    later = TextFeatureStore(tmp_path, "0123456789abcdef0123", dim=6)
    assert len(store) == len(later) == len(TEXTS)
    np.testing.assert_array_equal(later.lookup(TEXTS[::-1]), features_of(TEXTS[::-1]))


def test_another_process_is_seen_after_a_refresh(store, tmp_path):
    TextFeatureStore(tmp_path, "0123456789abcdef0123", dim=6).add(TEXTS, features_of(TEXTS))
    assert store.missing(TEXTS[:1]) == TEXTS[:1]
    store.refresh()
    assert store.missing(TEXTS) == [] and len(store) == len(TEXTS)


def test_missing_names_each_text_once_shortest_first(store):
    store.add(["a dog"], features_of(["a dog"]))
    assert store.missing(["long text", "b", "a dog", "c", "b", "long text"]) == ["b", "c", "long text"]
    assert store.missing(text for text in ("a dog",)) == []  # accepts any iterable


def test_a_text_without_feature_is_named(store):
    store.add(["a dog"], features_of(["a dog"]))
    with pytest.raises(AmpError, match=r"no feature for 'a cat'.*encode"):
        store.lookup(["a dog", "a cat"])
    with pytest.raises(AmpError, match="no feature for 'a dog'"):
        TextFeatureStore(store.folder.parent / "elsewhere", "ab", dim=6).lookup(["a dog"])


def test_a_text_given_twice_is_refused(store):
    with pytest.raises(AmpError, match="given twice"):
        store.add(["a dog", "a dog"], features_of(["a dog", "a dog"]))
    assert len(store) == 0 and not list(store.folder.glob("segment-*"))


def test_float16_takes_half_the_space_and_keeps_three_digits(tmp_path):
    texts = [f"text {i}" for i in range(500)]
    whole, half = (TextFeatureStore(tmp_path, "ab", dim=6, dtype=dtype) for dtype in ("float32", "float16"))
    for store in (whole, half):
        store.add(texts, features_of(texts))
    assert whole.folder != half.folder
    found = half.lookup(texts)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, features_of(texts), rtol=1e-3, atol=1e-6)
    sizes = [next(s.folder.glob("segment-*/features.npy")).stat().st_size for s in (whole, half)]
    assert sizes[0] - sizes[1] == 500 * 6 * 2


def test_a_store_of_other_weights_is_another_folder(store, tmp_path):
    store.add(TEXTS, features_of(TEXTS))
    assert len(TextFeatureStore(tmp_path, "fedcba9876543210fedc", dim=6)) == 0


def test_workers_get_the_folder_not_the_content(store):
    texts = [f"text {i}" for i in range(500)]
    store.add(texts, features_of(texts))
    content = pickle.dumps(store)
    assert len(content) < 1000
    np.testing.assert_array_equal(pickle.loads(content).lookup(texts[::7]), features_of(texts[::7]))


def test_a_segment_of_another_width_is_refused_by_name(store, tmp_path):
    store.add(TEXTS, features_of(TEXTS))
    with pytest.raises(AmpError, match=r"segment-.*\(6, 6\); expected \(6, 7\).*remove"):
        TextFeatureStore(tmp_path, "0123456789abcdef0123", dim=7)


@pytest.mark.parametrize(("file", "damage"), [("keys.npy", "gone"), ("features.npy", "cut")])
def test_a_damaged_segment_is_refused_by_name(store, tmp_path, file, damage):
    store.add(TEXTS, features_of(TEXTS))
    path = next(store.folder.glob("segment-*")) / file
    path.write_bytes(path.read_bytes()[:-8]) if damage == "cut" else path.unlink()
    with pytest.raises(AmpError, match=r"segment-.*remove the folder"):
        TextFeatureStore(tmp_path, "0123456789abcdef0123", dim=6)


def test_an_interrupted_add_leaves_nothing_that_counts(store, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        store.add(TEXTS, features_of(TEXTS))
    monkeypatch.undo()
    assert list(store.folder.iterdir()) == []
    again = TextFeatureStore(tmp_path, "0123456789abcdef0123", dim=6)
    assert len(again) == 0 and again.missing(TEXTS[:1]) == TEXTS[:1]


def _add_many(root: Path, texts: list[str], start):
    store = TextFeatureStore(root, "ab", dim=6)
    start.wait()
    for low in range(0, len(texts), 5):
        store.add(texts[low : low + 5], features_of(texts[low : low + 5]))


def test_two_processes_add_at_once(tmp_path):
    texts = [f"text {i}" for i in range(200)]
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)
    # Both processes add the first half, in the same segments; the other texts belong to one process each.
    shares = [texts[:100] + own for own in (texts[100:150], texts[150:])]
    processes = [context.Process(target=_add_many, args=(tmp_path, share, start)) for share in shares]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    store = TextFeatureStore(tmp_path, "ab", dim=6)
    assert len(store) == len(texts)
    np.testing.assert_array_equal(store.lookup(texts), features_of(texts))
    assert {path.name.split("-")[0] for path in store.folder.iterdir()} == {"segment"}  # no temporary folder is left


@torch.no_grad()
def test_stored_features_are_open_clips(store, tmp_path, backbone, tokenizer):
    texts = ["a dog", "A man in a red shirt throws a ball to a small dog.", "word " * 500, "", *TEXTS]
    store = TextFeatureStore(tmp_path, backbone.weights_hash("text"), backbone.embed_dim)
    encode_missing(store, texts, backbone, tokenizer, batch_size=3)
    for text in texts:  # one at a time, padded to the full context
        expected = backbone.clip.encode_text(tokenizer([text])).numpy()
        length = np.linalg.norm(expected)
        np.testing.assert_allclose(store.lookup([text]) / length, expected / length, rtol=0, atol=1e-6)


def test_each_text_is_encoded_once(tmp_path, backbone, tokenizer, monkeypatch):
    encoded = []

    def count(ids):
        encoded.append(len(ids))
        return Backbone.encode_text(backbone, ids)

    store = TextFeatureStore(tmp_path, "ab", backbone.embed_dim)
    monkeypatch.setattr(backbone, "encode_text", count)
    encode_missing(store, ["a", "b", "a", "c", "b"], backbone, tokenizer, batch_size=2)
    assert sum(encoded) == 3 and len(store) == 3
    encode_missing(store, ["c", "d", "d", "a"], backbone, tokenizer, batch_size=2)
    assert sum(encoded) == 4
    encode_missing(store, ["a", "d"], backbone, tokenizer, batch_size=2)
    assert sum(encoded) == 4 and len(store) == 4


def test_ranks_share_the_work_and_report_it(tmp_path, backbone, tokenizer):
    texts = [f"text number {i}" for i in range(11)]
    stores = [TextFeatureStore(tmp_path, "ab", backbone.embed_dim) for _ in range(3)]
    progress = []
    for rank, store in enumerate(stores):  # each was opened before any texts were added
        encode_missing(store, texts, backbone, tokenizer, 2, rank, 3, lambda *done: progress.append(done), segment=3)
    assert [len(store.missing(texts)) for store in stores] == [7, 3, 0]  # of the ranks that ran later
    stores[0].refresh()
    assert stores[0].missing(texts) == [] and len(stores[0]) == 11
    assert [done for done in progress if done[0] == done[1]] == [(4, 4), (4, 4), (3, 3)]


def test_cut_texts_are_those_that_have_too_many_tokens():
    """With CLIP's tokenizer. The estimate from words, which needs no tokenizer, is never higher."""
    tokenizer = open_clip.SimpleTokenizer()
    words = ["dog", "don't", "1984", "...", "straße", "a_b", "&amp;", "o'clock", "½", "DON'T", "犬", "skateboarder's"]
    texts = ["", "dog " * 74, "dog " * 75, "dog " * 76, "犬" * 60]
    texts += [" ".join(words[(i * j) % len(words)] for j in range(20 + i)) for i in range(40)]
    long = [len(tokenizer.encode(text)) + 2 > 77 for text in texts]
    assert cut_texts(texts, tokenizer, 77) == sum(long) and [cut_texts([text], tokenizer, 77) for text in texts] == long
    by_words = [surely_cut(text) for text in texts]
    assert long[1:5] == [False, False, True, True] and by_words[1:5] == [False, False, True, False]
    assert all(exact for exact, found in zip(long, by_words, strict=True) if found) and sum(by_words) > 5


def test_a_tokenizer_whose_cuts_cannot_be_seen_is_refused():
    def fills(texts, context_length):  # end token in the last position, for any text
        rows = torch.zeros(len(texts), context_length, dtype=torch.long)
        rows[:, -1] = 1
        return rows

    with pytest.raises(AmpError, match="can't be counted"):
        cut_texts(["a"], fills, 8)
