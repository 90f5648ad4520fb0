"""A published adapter as a CrossEncoder of sentence-transformers gives the scores of `amp.Reranker`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.drawn_data import draw
from support.models import publish_random_adapter
from support.repository import python_of

import amp

CAPTIONS = ["A dog chases a ball", "A red girl on a green field throws a kite", "Two horses jump"]


@pytest.fixture(scope="module")
def folder(clip_folder, tmp_path_factory):
    return publish_random_adapter(clip_folder, tmp_path_factory.mktemp("published") / "model")


def load(folder, **options):
    from sentence_transformers import CrossEncoder  # takes seconds

    return CrossEncoder(str(folder), device="cpu", trust_remote_code=True, local_files_only=True, **options)


@pytest.fixture(scope="module")
def encoder(folder):
    return load(folder)


@pytest.fixture(scope="module")
def reranker(folder):
    return amp.Reranker.from_pretrained(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("photos")
    for number in range(7):
        draw(number).save(root / f"{number}.jpg")
    return [str(root / f"{number}.jpg") for number in range(7)]


def no_knowledge(pairs) -> list[amp.Knowledge]:
    return [amp.Knowledge()] * len(pairs)


def test_scores_are_those_of_the_reranker(encoder, reranker, photos):
    pairs = [(caption, photo) for photo in photos for caption in CAPTIONS]
    expected = reranker.predict(pairs)
    assert expected.std() > 0.01 and np.ptp(reranker.predict(pairs, no_knowledge(pairs)) - expected) > 1e-3
    opened = [(caption, Image.open(photo)) for caption, photo in pairs]
    for given in (
        pairs,
        opened,
        [pair[::-1] for pair in pairs],
        [pair[::-1] for pair in opened],
        [({"text": caption}, {"image": image}) for caption, image in opened],
        [(caption, np.array(image.convert("RGB"))) for caption, image in opened],
    ):
        np.testing.assert_allclose(encoder.predict(given, batch_size=4), expected, atol=1e-5)
    packed = [(caption, reranker.pack(reranker.encode_images([photo]))[0]) for caption, photo in pairs[:4]]
    np.testing.assert_allclose(encoder.predict(packed), reranker.predict(packed), atol=1e-5)
    assert encoder.predict(pairs[0]) == pytest.approx(expected[0], abs=1e-5)
    assert encoder.predict(pairs, convert_to_tensor=True).shape == (len(pairs),)
    assert len(encoder.predict([])) == 0


def test_ranks_images_for_a_caption_and_captions_for_an_image(encoder, reranker, photos):
    found = encoder.rank(CAPTIONS[0], [Image.open(photo) for photo in photos], top_k=3)
    expected = reranker.rank(CAPTIONS[0], photos, top_k=3)
    assert [hit["corpus_id"] for hit in found] == [hit["corpus_id"] for hit in expected]
    assert [hit["score"] for hit in found] == pytest.approx([hit["score"] for hit in expected], abs=1e-5)
    found = encoder.rank(photos[1], CAPTIONS, return_documents=True)
    scores = reranker.predict([(caption, photos[1]) for caption in CAPTIONS])
    assert [hit["text"] for hit in found] == [CAPTIONS[number] for number in np.argsort(-scores)]


def test_an_unreadable_image_ranks_last(encoder, photos, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG and nothing")
    with pytest.warns(UserWarning, match="1 images have no score"):
        found = encoder.rank(CAPTIONS[0], [photos[0], str(tmp_path / "broken.png"), photos[1]])
    assert found[-1] == {"corpus_id": 1, "score": -np.inf} and found[0]["score"] > found[1]["score"] > -1


def test_model_kwargs_are_settings_of_the_reranker(folder, reranker, photos):
    pairs = [(caption, photos[0]) for caption in CAPTIONS]
    plain = load(folder, model_kwargs={"knowledge": "none"})
    np.testing.assert_allclose(plain.predict(pairs), reranker.predict(pairs, no_knowledge(pairs)), atol=1e-5)
    with pytest.raises(amp.AmpError, match=r"model_kwargs has torch_dtype, expected only base, .*precision"):
        load(folder, model_kwargs={"torch_dtype": "float16"})


def test_a_prompt_goes_in_front_of_the_caption(encoder, reranker, photos):
    expected = reranker.predict([(f"A photo. {CAPTIONS[0]}", photos[0])])
    np.testing.assert_allclose(encoder.predict([(CAPTIONS[0], photos[0])], prompt="A photo. "), expected, atol=1e-5)


def test_the_documented_code_runs(folder, encoder, photos, tmp_path, monkeypatch):
    """The page loads the folder with trust, and then only the adapter. Without either, the class is not imported."""
    from sentence_transformers import CrossEncoder

    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine").symlink_to(folder)
    shutil.copytree(Path(photos[0]).parent, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with_trust, own = ({}, {})
    for code, ran in zip(python_of("docs/sharing.md", "sentence-transformers"), (with_trust, own), strict=True):
        exec(compile(code, "docs/sharing.md", "exec"), ran)
    pairs = [("a dog jumps over a fence", photo) for photo in with_trust["photos"]]
    np.testing.assert_array_equal(with_trust["scores"], encoder.predict(pairs))
    np.testing.assert_array_equal(own["model"].predict(pairs), encoder.predict(pairs))
    assert with_trust["ranking"][0] == {
        "corpus_id": np.argmax(with_trust["scores"]),
        "score": max(with_trust["scores"]),
    }
    assert [hit["corpus_id"] for hit in with_trust["best"]] in ([0, 1], [1, 0])
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        CrossEncoder("models/mine")


def test_a_repository_in_the_hub_cache_loads_offline(folder, encoder, photos, tmp_path):
    repository = tmp_path / "models--org--dogs"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
    cached = load("org/dogs", cache_folder=str(tmp_path))
    assert cached.predict((CAPTIONS[0], photos[0])) == encoder.predict((CAPTIONS[0], photos[0]))


def test_saving_again_keeps_scores_and_model_card(folder, encoder, photos, tmp_path):
    encoder.save_pretrained(str(tmp_path / "again"))
    again = load(tmp_path / "again")
    assert again.predict((CAPTIONS[0], photos[0])) == encoder.predict((CAPTIONS[0], photos[0]))
    for name in ("adapter.safetensors", "config.json", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    written, published = (json.loads((x / "modules.json").read_text()) for x in (tmp_path / "again", folder))
    assert written == published


def test_pairs_without_a_caption_or_an_adapter_are_refused(encoder, photos, folder, tmp_path):
    for pair in ((Image.open(photos[0]), photos[1]), ("a dog", {"text": "a dog", "image": photos[0]})):
        with pytest.raises(amp.AmpError, match="expected a caption"):
            encoder.predict([pair])
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "adapter.safetensors").unlink()
    with pytest.raises(amp.AmpError, match=r"model: no adapter\.safetensors, expected a folder written by amp publish"):
        load(tmp_path / "model")
