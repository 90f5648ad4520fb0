"""mteb evaluates the frozen CLIP and then the re-ranker on its candidates, without a network."""

import json
import sys

import numpy as np
import pytest
import torch
from support.models import publish_random_adapter
from support.repository import ROOT, python_of

import amp

sys.path.insert(0, str(ROOT / "tools" / "scenes"))

import make_scenes

MICRO_CLIP = f"local-dir:{ROOT / 'tools' / 'scenes' / 'micro-clip'}"
PHOTOS, TOP, QUERIES = 24, 20, 8


def local_task(folder):
    """A text-to-image task of mteb, with the drawn scenes of a folder as its data."""
    import mteb
    from datasets import Dataset, Image
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    images = json.loads((folder / "dataset.json").read_text())["images"]

    class DrawnScenes(AbsTaskRetrieval):
        metadata = mteb.TaskMetadata(
            name="DrawnScenesT2IRetrieval",
            description="Finds the drawn scene of a caption.",
            reference=None,
            dataset={"path": str(folder), "revision": "1"},
            type="Any2AnyRetrieval",
            category="t2i",
            modalities=["text", "image"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="hit_rate_at_1",
        )

        def load_data(self, **settings):
            names = [image["filename"] for image in images]
            corpus = Dataset.from_dict({"id": names, "image": [str(folder / "images" / name) for name in names]})
            texts = {f"q{n}": image["sentences"][0]["raw"] for n, image in enumerate(images[:QUERIES])}
            self.dataset = {
                "default": {
                    "test": {
                        "corpus": corpus.cast_column("image", Image()),
                        "queries": Dataset.from_dict({"id": list(texts), "text": list(texts.values())}),
                        "relevant_docs": {query: {names[n]: 1} for n, query in enumerate(texts)},
                        "top_ranked": None,
                    }
                }
            }
            self.data_loaded = True

    return DrawnScenes()


@pytest.mark.system
def test_the_documented_two_stages_rank_like_the_reranker(tmp_path, monkeypatch):
    make_scenes.make_scenes(out=tmp_path / "scenes", train=0, val=0, test=PHOTOS)
    publish_random_adapter(MICRO_CLIP, tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("mteb.get_task", lambda name: local_task(tmp_path / "scenes"))
    (code,) = python_of("docs/sharing.md", "mteb")
    ran = {}
    exec(compile(code, "docs/sharing.md", "exec"), ran)

    clip, _, preprocess = amp.from_pretrained("models/mine")
    reranker = amp.Reranker.from_pretrained("models/mine")
    data = ran["task"].dataset["default"]["test"]
    photos = [tmp_path / "scenes" / "images" / name for name in data["corpus"]["id"]]
    with torch.no_grad():
        images = clip.encode_image(torch.stack([preprocess(amp.open_photo(photo)) for photo in photos]), normalize=True)
        texts = clip.encode_text(clip.tokenizer(data["queries"]["text"]), normalize=True)
    first = (texts @ images.T).argsort(descending=True)[:, :TOP]
    hits = []
    for number, (text, candidates) in enumerate(zip(data["queries"]["text"], first.tolist(), strict=True)):
        scores = reranker.predict([(text, photos[n]) for n in candidates])
        hits.append(candidates[int(np.argmax(scores))] == number)
    base, second = (r.task_results[0].scores["test"][0]["hit_rate_at_1"] for r in (ran["first"], ran["second"]))
    assert base == pytest.approx(np.mean([row[0] == n for n, row in enumerate(first.tolist())]), abs=1e-4)
    assert second == pytest.approx(np.mean(hits), abs=1e-4) and second != base
