"""The code of docs/vector_database.md, as printed, ranks like the re-ranker on the photos themselves."""

import pytest
import torch
from support.drawn_data import draw
from support.models import publish_random_adapter
from support.repository import python_of

import amp

PAGE = "docs/vector_database.md"
PHOTOS, CANDIDATES = 105, 100


def test_the_page_ranks_stored_states_after_the_photos_are_gone(clip_folder, tmp_path, monkeypatch, capsys):
    publish_random_adapter(clip_folder, tmp_path / "models" / "mine")
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    images = [draw(number) for number in range(PHOTOS)]
    for number, image in enumerate(images):
        image.save(f"photos/{number:03d}.png")
    adding, searching = python_of(PAGE)
    ran = {}
    exec(compile(adding, PAGE, "exec"), ran)
    (tmp_path / "photos").rename(tmp_path / "gone")
    exec(compile(searching, PAGE, "exec"), ran)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]

    reranker, query = ran["reranker"], ran["query"]
    pixels = torch.stack([reranker.preprocess(image) for image in images])
    with torch.no_grad():
        first = reranker.model.encode_image(pixels, normalize=True)
        first = first @ reranker.model.encode_text(reranker.model.tokenizer([query]), normalize=True)[0]
    candidates = first.topk(CANDIDATES).indices.tolist()
    assert [row["path"] for row in ran["found"]] == [f"photos/{number:03d}.png" for number in candidates]
    scores = reranker.predict([(query, images[number]) for number in candidates])
    assert scores.max() - scores.min() > 0.1
    assert len(printed) == 5
    for (score, path), best in zip(printed, sorted(scores, reverse=True), strict=False):
        number = int(path.removeprefix("photos/").removesuffix(".png"))
        assert float(score) == pytest.approx(scores[candidates.index(number)], abs=0.01)
        assert float(score) == pytest.approx(best, abs=0.01)


def test_states_of_another_adapter_are_refused(clip_folder, tmp_path):
    """As when an index is searched with an adapter that was trained again."""
    folders = [publish_random_adapter(clip_folder, tmp_path / str(seed), seed) for seed in (2, 3)]
    rerankers = [amp.Reranker.from_pretrained(folder) for folder in folders]
    blobs = rerankers[0].pack(rerankers[0].encode_images([draw(0)]), "int8")
    with pytest.raises(amp.AmpError, match="adapter"):
        rerankers[1].rank("a dog jumps", blobs)
