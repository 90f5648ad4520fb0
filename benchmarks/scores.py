"""Scores of the same pairs by every way to score them, compared with `Reranker.predict`.

    python -m benchmarks.scores --adapter runs/flickr8k/ours/stage2/adapter.safetensors --shards data/flickr8k \
        --out results/scores.json

All ways use knowledge by rules. The pairs are all pairs of the first images of the split `test` and their first
captions.
"""

import base64
import json
import tempfile
from pathlib import Path

from amp.errors import exit_on_error, require

with exit_on_error():
    import numpy as np
    import torch
    from jsonargparse import auto_cli

    import amp
    from amp.data.frozen_features import FrozenFeatures
    from amp.data.prepare import knowledge_collator
    from amp.data.split import ShardSplit
    from amp.data.split_captions import SplitCaptions
    from amp.data.text_features import encode_missing
    from amp.files import write_atomically
    from amp.retrieval.settings import RetrievalSettings
    from amp.retrieval.split_search import SplitSearch
    from benchmarks.onnx import Pairs, onnx_graphs, read
    from benchmarks.serve import Server, free_port

    sentence_transformers = require("sentence_transformers", "this benchmark")


def main(adapter: Path, shards: Path, images: int = 8, out: Path = Path("runs/scores.json")) -> None:
    """Scores all pairs of some images and their captions in every way.

    Args:
        adapter: Adapter file with its base model.
        shards: Folder of shards with a split `test`.
        images: Number of images.
        out: File of the figures.
    """
    torch.set_num_threads(1)
    reranker, split = amp.Reranker.from_pretrained(adapter), ShardSplit(shards, "test")
    texts = [split.captions(split.record(number), ("action", "attribute"))[0][0] for number in range(images)]
    chosen = SplitCaptions(texts, reranker.knowledge_of(texts), torch.arange(images), images)
    photos = [split.decoded(number, bytes) for number in range(images)]
    pairs = [(text, photo) for text in texts for photo in photos]
    expected = reranker.predict(pairs).reshape(images, images)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        amp.save_pretrained(folder / "model", adapter)
        cross_encoder = sentence_transformers.CrossEncoder(str(folder / "model"), trust_remote_code=True)
        ways = {
            "rank": ranked(reranker, texts, photos),
            "rank, states in fp16": ranked(reranker, texts, reranker.pack(reranker.encode_images(photos), "fp16")),
            "rank, states in int8": ranked(reranker, texts, reranker.pack(reranker.encode_images(photos), "int8")),
            "amp evaluate": evaluated(reranker, split, chosen, folder / "texts"),
            "CrossEncoder": cross_encoder.predict(pairs).reshape(images, images),
            "POST /v1/rerank": served(adapter, texts, photos),
            **{name: exported(reranker, split, chosen, folder / name, name) for name in ("ONNX", "ONNX, int8")},
        }
    differences = {name: float(np.abs(scores - expected).max()) for name, scores in ways.items()}
    found = {"pairs": expected.size, "spread": float(np.ptp(expected)), "greatest_difference": differences}
    write_atomically(out, (json.dumps(found, indent=1) + "\n").encode())
    print(json.dumps(found, indent=1))


def in_order(entries, number: str, score: str) -> list[float]:
    """Scores in the order of the candidates."""
    return [entry[score] for entry in sorted(entries, key=lambda entry: entry[number])]


def ranked(reranker: amp.Reranker, texts: list[str], images: list[bytes]) -> np.ndarray:
    return np.array([in_order(ranking, "corpus_id", "score") for ranking in reranker.rank(texts, images)])


@torch.no_grad()
def evaluated(reranker: amp.Reranker, split: ShardSplit, captions: SplitCaptions, cache: Path) -> np.ndarray:
    """Scores by the search of `amp evaluate`, from stored text features and early tokens."""
    model = reranker.model
    pixels = torch.stack([reranker.preprocess(split.image(number)) for number in range(captions.images)])
    seen = model(pixels)
    collate = knowledge_collator(model, str(cache), "float32")
    knowledge_texts = captions.all_texts(model.config.max_triplets, model.config.knowledge)
    encode_missing(collate.store, knowledge_texts, model.backbone, model.tokenizer)
    frozen = FrozenFeatures(seen.early.numpy(), seen.base.numpy())
    search = SplitSearch.stored(captions, frozen, collate, RetrievalSettings(), torch.device("cpu"))
    image_of = torch.arange(captions.images)
    scorer = search.scorer(model)
    return np.stack([scorer(image_of, torch.full_like(image_of, text)) for text in range(len(captions.texts))])


def served(adapter: Path, texts: list[str], photos: list[bytes]) -> np.ndarray:
    """Scores by `amp serve`."""
    documents = [f"data:image/jpeg;base64,{base64.b64encode(photo).decode()}" for photo in photos]
    server = Server(["--adapter", str(adapter)], free_port())
    try:
        server.wait()
        answers = [server.post("/v1/rerank", {"query": text, "documents": documents}) for text in texts]
    finally:
        server.kill()
    return np.array([in_order(answer["results"], "index", "relevance_score") for answer in answers])


def exported(reranker: amp.Reranker, split: ShardSplit, captions: SplitCaptions, folder: Path, name: str) -> np.ndarray:
    """Scores by ONNX graphs."""
    graphs = onnx_graphs(amp.export_onnx(reranker.model, folder, int8="int8" in name))
    score = Pairs(graphs, read(reranker.model, reranker.preprocess, split, captions))
    image_of = np.arange(captions.images)
    return np.stack([score(image_of, np.array([text])) for text in range(len(captions.texts))])


if __name__ == "__main__":
    with exit_on_error():
        auto_cli(main, as_positional=False)
