"""Search in a folder of photos: latency, size of the index, memory, and what packing the image states costs.

    python -m benchmarks.search --adapter runs/flickr8k/ours/stage2/adapter.safetensors \\
        --photos ../shared/data/flickr8k/images --shards data/flickr8k --out results/search.json

Queries are captions of the test split. A query's time includes its text encoding and its knowledge by rules. The large
index repeats the rows of the real one in sparse, hard-linked form, so only memory and time are realistic, not results.
"""

import contextlib
import json
import random
import tempfile
import time
from pathlib import Path

from amp.errors import exit_on_error

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
    from amp.retrieval.scorer import PairScorer
    from amp.retrieval.settings import RetrievalSettings
    from amp.retrieval.split_search import SplitSearch
    from amp.search.image_states import ImageStates
    from benchmarks.memory import resident_mb

CANDIDATES = (20, 50, 100)


def main(
    adapter: Path,
    photos: Path,
    shards: Path,
    queries: int = 200,
    large: int = 1_000_000,
    threads: int = 1,
    index: Path = Path("runs/search-index"),
    out: Path = Path("runs/search.json"),
) -> None:
    """Measures searches.

    Args:
        adapter: Adapter with its base model.
        photos: Folder of photos to index.
        shards: Shards whose test split has the queries.
        queries: Number of queries.
        large: Number of photos of the simulated large index.
        threads: Threads of PyTorch.
        index: Folder of the index; one that exists is used again, and its time is not measured.
        out: File of the figures.
    """
    torch.set_num_threads(threads)
    reranker = amp.Reranker.from_pretrained(adapter)
    split = ShardSplit(shards, "test")
    captions = SplitCaptions.read(split, ["action", "attribute"])
    texts = random.Random(0).sample(captions.texts, queries)
    search = amp.Retriever(reranker, index)
    found: dict = {"threads": threads, "index": indexed(search, photos)}
    found["bytes_per_state"] = {kind: reranker.packer.row_bytes[kind] for kind in ("int8", "fp16")}
    found["latency"] = {str(count): latency(search, texts, count) for count in CANDIDATES}
    found["decoding"] = decoding(reranker, index, texts[:20])
    found["large"] = repeated(reranker, index, large, texts)
    found["recall"] = recalls(reranker, split, captions, index / "texts")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, (json.dumps(found, indent=1) + "\n").encode())
    print(json.dumps(found, indent=1))


def indexed(search: amp.Retriever, photos: Path) -> dict:
    """Makes an index, with one process. Returns its time and size."""
    new, begin = not (search.folder / "index.json").exists(), time.perf_counter()
    if new:
        search.update(photos, workers=0)
    seconds = time.perf_counter() - begin
    size = sum(path.stat().st_size for path in search.folder.iterdir() if path.is_file())
    count = len(search.index)
    return {"photos": count, "seconds": seconds if new else None, "bytes_per_photo": size / count}


def latency(search: amp.Retriever, texts: list[str], top_k: int) -> dict:
    """Milliseconds of one query at a time, over all queries. Results of the first one are not counted."""
    search.top_k = top_k
    search.search(texts[0])
    seconds = []
    for text in texts:
        begin = time.perf_counter()
        search.search(text)
        seconds.append(time.perf_counter() - begin)
    return spread(seconds)


def spread(seconds: list[float]) -> dict:
    return {"median_ms": 1e3 * float(np.median(seconds)), "p95_ms": 1e3 * float(np.percentile(seconds, 95))}


def decoding(reranker: amp.Reranker, folder: Path, texts: list[str]) -> dict:
    """Milliseconds of a query whose 20 photos are decoded and encoded, as without states."""
    search = amp.Retriever(reranker, folder, top_k=20)
    search.index.states = None
    return latency(search, texts, 20)


def repeated(reranker: amp.Reranker, folder: Path, photos: int, texts: list[str]) -> dict:
    """Searches an index of many photos, whose names are links to real ones and whose rows repeat the real ones."""
    content = json.loads((folder / "index.json").read_text())
    real, count = content["photos"], len(content["photos"])
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        here = Path(temporary)
        for number in range(-(-photos // count)):
            (here / f"{number}").symlink_to(content["root"])
        names = [[f"{n // count}/{real[n % count][0]}", *real[n % count][1:]] for n in range(photos)]
        rows = (content["state_rows"] * (-(-photos // count)))[:photos]
        features = np.load(folder / content["features"])
        content |= {"root": temporary, "photos": names, "state_rows": rows, "features": "many.npy"}
        del content["beside"]
        many = np.lib.format.open_memmap(here / "many.npy", "w+", np.float32, (photos, features.shape[1]))
        for low in range(0, photos, count):
            many[low : low + count] = features[: photos - low]
        many.flush()
        del many
        (here / content["states"]["file"]).hardlink_to(folder / content["states"]["file"])
        (here / "index.json").write_text(json.dumps(content))
        del names, rows, content, real, features
        before, begin = resident_mb(), time.perf_counter()
        search = amp.Retriever(reranker, here)
        opened = len(search.index), time.perf_counter() - begin
        timing = latency(search, texts, 20)
        return {"photos": opened[0], "open_seconds": opened[1], "memory_mb": resident_mb() - before, "latency": timing}


class FromStates(SplitSearch):
    """The search of `amp evaluate`, with stored states of the images in place of their early tokens."""

    states: ImageStates

    def scorer(self, model, autocast=contextlib.nullcontext) -> PairScorer:
        assert self.knowledge is not None
        return PairScorer(model, self.states.parts, self.knowledge, self.text, autocast, self.settings.batch_size)


def recalls(reranker: amp.Reranker, split: ShardSplit, captions: SplitCaptions, cache: Path) -> dict:
    """Recalls (percent) of the test split, re-ranked from states that are exact, fp16 and int8."""
    collate = knowledge_collator(reranker.model, str(cache), "float32")
    texts = captions.all_texts(reranker.model.config.max_triplets, reranker.model.config.knowledge)
    encode_missing(collate.store, texts, reranker.model.backbone, reranker.model.tokenizer)
    exact = reranker.encode_images([split.image(number) for number in range(len(split))])
    frozen = FrozenFeatures(None, exact.base.float().numpy())
    search = FromStates.stored(captions, frozen, collate, RetrievalSettings(skip_decided=True), torch.device("cpu"))
    found = {}
    for kind in ("exact", "fp16", "int8"):
        search.states = exact if kind == "exact" else reranker.unpack(reranker.pack(exact, kind))
        ranked = search.rank(reranker.model)
        directions = {"t2i": ranked.t2i, **{f"i2t {mode}": ranking for mode, ranking in ranked.i2t.items()}}
        found[kind] = {name: ranking.result.recall for name, ranking in directions.items()}
    return found


if __name__ == "__main__":
    with exit_on_error():
        auto_cli(main, as_positional=False)
