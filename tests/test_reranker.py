"""The re-ranker, compared with a naive loop: one forward pass per pair."""

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from support.drawn_data import draw
from support.equations.search import base_score, pair_score, pooled_scores
from support.evaluation import World, make_far_model
from support.models import publish_random_adapter
from support.repository import python_of

import amp
from amp.errors import AmpError
from amp.search.image_states import HEADER_BYTES, ImageStates

QUERY, OTHER = "A red dog chases a ball", "a bird"
KNOWN = {
    QUERY: amp.Knowledge((amp.Triplet("dog", "chases", "ball"),), ("The dog runs with its legs stretched out",)),
    OTHER: amp.Knowledge(),
}
PHOTOS = 7
PROMPTS = {
    "aim": {"enrich": True},
    "concatenation": {"interaction": "cat"},
    "readout": {"interaction": "readout", "enrich": True},
    "control": {"knowledge": "none"},
}


def make_reranker(clip_folder: str, kind: str = "readout", **settings) -> amp.Reranker:
    model, preprocess = make_far_model(clip_folder, **PROMPTS[kind])
    if kind == "readout":
        model.interaction.readout.out.weight.data.normal_(std=0.3)
    return amp.Reranker(model, preprocess, lambda texts: [KNOWN[text] for text in texts], batch_size=3, **settings)


@pytest.fixture
def reranker(clip_folder) -> amp.Reranker:
    return make_reranker(clip_folder)


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    return [draw(number) for number in range(PHOTOS)]


def by_hand(reranker: amp.Reranker, photos, query: str = QUERY) -> dict[int, float]:
    images = [reranker.preprocess(photo) for photo in photos]
    return {n: pair_score(reranker.model, image, query, KNOWN[query]) for n, image in enumerate(images)}


def scores(ranking) -> dict[int, float]:
    return {entry["corpus_id"]: entry["score"] for entry in ranking}


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_ranking_equals_the_naive_loop(clip_folder, photos, kind):
    reranker = make_reranker(clip_folder, kind)
    expected = by_hand(reranker, photos)
    ranking = reranker.rank(QUERY, photos)
    assert scores(ranking) == pytest.approx(expected, abs=1e-5)
    assert [entry["corpus_id"] for entry in ranking] == sorted(expected, key=lambda n: -expected[n])
    states = reranker.encode_images(photos)
    assert scores(reranker.rank(QUERY, states)) == pytest.approx(expected, abs=1e-5)
    for packed, tolerance in (("fp16", 5e-4), ("int8", 1e-2)):
        assert scores(reranker.rank(QUERY, reranker.pack(states, packed))) == pytest.approx(expected, abs=tolerance)


def test_each_form_of_an_image_gives_the_same_score(reranker, photos, tmp_path):
    photo, buffer = photos[0], io.BytesIO()
    photo.save(buffer, "PNG")
    photo.save(tmp_path / "a.png")
    pixels = np.asarray(photo)
    turned = photo.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # must be rotated by 90 degrees
    forms = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        buffer.getvalue(),
        photo,
        photo.convert("RGBA"),
        turned,
        pixels,
        torch.from_numpy(pixels.copy()).permute(2, 0, 1),
        reranker.preprocess(photo),
    ]
    expected = by_hand(reranker, [photo])[0]
    assert list(scores(reranker.rank(QUERY, forms)).values()) == pytest.approx([expected] * len(forms), abs=1e-5)


def test_candidates_that_cannot_be_read_are_reported(reranker, photos, tmp_path):
    (packed,) = reranker.pack(reranker.encode_images(photos[:1]))
    bad = {
        0: (tmp_path / "gone.jpg", "No such file"),
        2: (b"no image", "8 bytes, not an image"),
        4: (np.zeros((4, 4), np.uint8), r"ndarray uint8 \(4, 4\), expected a path, the bytes"),
        5: (torch.zeros(3, 5, 5), r"\(3, 5, 5\), expected a preprocessed image \(3, 32, 32\)"),
        6: (packed[:-1], "expected .* of a packed image state"),
        7: (None, "NoneType, expected a path"),
    }
    candidates = [bad[n][0] if n in bad else photos[n] for n in range(9) if n in bad or n < PHOTOS]
    good = [n for n in range(len(candidates)) if n not in bad]
    ranking = reranker.rank(QUERY, candidates)
    assert set(scores(ranking)) == set(good) and ranking.skipped.keys() == bad.keys()
    for number, (_, reason) in bad.items():
        assert re.search(reason, ranking.skipped[number])
    with pytest.warns(UserWarning, match="6 images have no score; the first one: can't be read"):
        predicted = reranker.predict([(QUERY, candidate) for candidate in candidates])
    assert np.flatnonzero(~np.isnan(predicted)).tolist() == good
    assert reranker.rank(QUERY, [b""]) == [] and reranker.rank(QUERY, []) == []
    with pytest.raises(AmpError, match="image 2 of 4: 8 bytes, not an image"):
        reranker.encode_images([photos[0], photos[1], b"no image", photos[2]])


def test_many_queries_and_the_best_results(reranker, photos):
    both = reranker.rank([QUERY, OTHER], photos)
    for query, ranking in zip((QUERY, OTHER), both, strict=True):
        assert scores(ranking) == pytest.approx(by_hand(reranker, photos, query), abs=1e-5)
    given = reranker.rank([QUERY, OTHER], photos, knowledge=[KNOWN[OTHER], KNOWN[OTHER]])
    assert scores(given[1]) == pytest.approx(scores(both[1]), abs=1e-6) != scores(given[0])
    blank = reranker.rank(QUERY, photos, knowledge=amp.Knowledge())
    assert scores(blank) == pytest.approx(scores(given[0]), abs=1e-6)
    best = reranker.rank(QUERY, photos, top_k=2, return_documents=True)
    assert [entry["image"] for entry in best] == [photos[entry["corpus_id"]] for entry in both[0][:2]]


def test_the_first_stage_is_fused(reranker, photos):
    base = {n: base_score(reranker.model, reranker.preprocess(p), QUERY) for n, p in enumerate(photos)}
    fused = {n: score + 2 * base[n] for n, score in by_hand(reranker, photos).items()}
    assert scores(reranker.rank(QUERY, photos, fusion_weight=2)) == pytest.approx(fused, abs=1e-5)
    other = {n: score - n for n, score in by_hand(reranker, photos).items()}
    ranking = reranker.rank(QUERY, photos, fusion_weight=-1, first_scores=range(PHOTOS))
    assert scores(ranking) == pytest.approx(other, abs=1e-5)
    with pytest.raises(AmpError, match="first_scores has 3 numbers, expected 1 x 7"):
        reranker.rank(QUERY, photos, first_scores=[1, 2, 3])


def test_pairs_are_scored_in_their_order(reranker, photos, monkeypatch):
    pairs = [(QUERY, photos[3]), (OTHER, photos[1]), (QUERY, photos[1]), (QUERY, photos[3])]
    encoded = []
    encode = reranker.encode_pixels
    monkeypatch.setattr(reranker, "encode_pixels", lambda pixels: encoded.extend(pixels) or encode(pixels))
    predicted = reranker.predict(pairs)
    expected = [by_hand(reranker, [photo], query)[0] for query, photo in pairs]
    assert predicted.dtype == np.float32 and predicted.tolist() == pytest.approx(expected, abs=1e-5)
    assert len(encoded) == 2
    knowledge = [KNOWN[QUERY], KNOWN[OTHER], amp.Knowledge(), KNOWN[QUERY]]
    given = reranker.predict(pairs, knowledge=knowledge)
    assert given[[0, 1, 3]].tolist() == pytest.approx(expected[:2] + expected[3:], abs=1e-5)
    assert abs(given[2] - expected[2]) > 1e-3
    assert reranker.predict([]).shape == (0,)


@pytest.mark.parametrize("prompt", [{}, {"interaction": "readout"}], ids=["aim", "readout"])
def test_texts_are_ranked_for_an_image(clip_folder, shards, cache_folder, prompt):
    world = World(clip_folder, shards, cache_folder, **prompt)
    reranker = amp.Reranker(world.model, world.preprocess)
    texts, knowledge, numbers = world.captions.texts[:6], world.captions.knowledge[:6], list(range(6))
    for pooled in (False, True):
        ranking = reranker.rank_texts(world.split.image(1), texts, knowledge=knowledge, pooled=pooled)
        pairs = zip(texts, knowledge, strict=True)
        single = [pair_score(world.model, world.images[1], text, item) for text, item in pairs]
        expected = pooled_scores(world, 1, numbers) if pooled else single
        assert scores(ranking) == pytest.approx(dict(enumerate(expected)), abs=1e-5)
    best = reranker.rank_texts(world.split.image(1), texts, 2, knowledge, return_documents=True)
    assert [entry["text"] for entry in best] == [texts[entry["corpus_id"]] for entry in best] and len(best) == 2


def test_scores_are_those_of_the_evaluation(clip_folder, shards, cache_folder):
    world = World(clip_folder, shards, cache_folder, interaction="readout", enrich=True)
    found = world.retrieval(top_k=4).rank(world.model).t2i
    reranker = amp.Reranker(world.model, world.preprocess)
    for query in range(5):
        candidates = found.first.candidates[query].tolist()
        images = [world.split.image(n) for n in candidates]
        ranking = reranker.rank(world.captions.texts[query], images, knowledge=world.captions.knowledge[query])
        assert [scores(ranking)[n] for n in range(4)] == pytest.approx(found.scores[query].tolist(), abs=1e-5)


def test_states_are_packed(clip_folder, reranker, photos):
    states = reranker.encode_images(photos)
    numbers = sum(part[0].numel() for part in (states.base, *states.parts))
    tokens = sum(part[0].numel() for part in states.parts[1:])
    scales = sum(part[0].numel() // part.shape[-1] for part in states.parts[1:])
    sizes = {"fp16": 2 * numbers, "int8": 2 * (numbers - tokens) + tokens + 2 * scales}
    for kind, size in sizes.items():
        rows = reranker.pack(states, kind)
        assert {len(row) for row in rows} == {HEADER_BYTES + size} == {reranker.packer.row_bytes[kind]}
        unpacked = reranker.unpack(rows)
        for part, seen in zip((states.base, *states.parts), (unpacked.base, *unpacked.parts), strict=True):
            step = part.abs().max() / 127 if kind == "int8" and part.ndim > 2 else part.abs().max() / 1024
            assert torch.allclose(part, seen, rtol=0, atol=0.51 * float(step)) and seen.dtype == part.dtype
    mixed = reranker.unpack([*reranker.pack(states[:1], "fp16"), *reranker.pack(states[1:2], "int8")])
    assert len(mixed) == 2 and torch.equal(mixed.base, reranker.unpack(rows[:2]).base)
    other = make_reranker(clip_folder, "control")
    with pytest.raises(
        AmpError, match=f"has the key {reranker.packer.key}, expected {other.packer.key}: it was packed"
    ):
        other.rank(QUERY, rows)
    for damaged in (rows[0][:-2], b"\0" * len(rows[0]), b""):
        with pytest.raises(AmpError, match="pack the images again"):
            reranker.unpack([rows[1], damaged])
    large = ImageStates(states.base * 1e9, states.parts)
    with pytest.raises(AmpError, match="expected at most 65504"):
        reranker.pack(large, "fp16")
    with pytest.raises(AmpError, match="state type is 'int4', expected one of fp16, int8"):
        reranker.pack(states, "int4")


def test_refusals(reranker, photos):
    for call, message in (
        (lambda: reranker.rank(" ", photos), "a text is empty"),
        (lambda: reranker.rank([QUERY, OTHER], photos, knowledge=KNOWN[QUERY]), "knowledge of 1 texts for 2 texts"),
        (lambda: reranker.predict([(QUERY, photos[0])], knowledge=[]), "knowledge of 0 texts for 1 pairs"),
        (lambda: reranker.encode_images([]), "there are 0 images"),
    ):
        with pytest.raises(AmpError, match=message):
            call()
    reranker.model.interaction.readout.out.weight.data.fill_(torch.nan)
    with pytest.raises(AmpError, match="7 of 7 values are NaN or infinite"):
        reranker.rank(QUERY, photos)


def test_an_adapter_is_loaded_with_its_generator(clip_folder, photos, tmp_path):
    model, _ = make_far_model(clip_folder)
    amp.save_adapter(tmp_path / "adapter.safetensors", model)
    reranker = amp.Reranker.from_pretrained(tmp_path / "adapter.safetensors", knowledge="none")
    assert reranker.knowledge_of([QUERY]) == [amp.Knowledge()]
    reranker = amp.Reranker.from_pretrained(tmp_path / "adapter.safetensors")
    (knowledge,) = reranker.knowledge_of(["A dog chases a ball."])
    assert [(t.subject, t.object) for t in knowledge.triplets] == [("dog", "ball")]
    assert scores(reranker.rank("A dog chases a ball.", photos)) == pytest.approx(
        scores(reranker.rank("A dog chases a ball.", photos, knowledge=knowledge))
    )


PAGE = "docs/reranker.md"


def test_the_code_of_the_page_runs(clip_folder, photos, tmp_path, monkeypatch, capsys):
    publish_random_adapter(clip_folder, tmp_path / "runs/demo/action-aware/stage2")
    folder = tmp_path / "data/demo/scenes/images"
    folder.mkdir(parents=True)
    for number in range(20):
        draw(number).save(folder / f"test_{number:05d}.jpg")
    monkeypatch.chdir(tmp_path)
    ranking, states = python_of(PAGE)
    ran = {}
    exec(compile(ranking.replace("stage2/adapter.safetensors", "stage2"), PAGE, "exec"), ran)
    exec(compile(states, PAGE, "exec"), ran)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [int(number) for number, *_ in printed] == [entry["corpus_id"] for entry in ran["ranking"]][:5]
    assert ran["scores"].shape == (2,) and len(ran["texts"]) == 3 and ran["vectors"].shape[0] == 20
