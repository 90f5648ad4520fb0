"""Compares ONNX graphs of an adapter, in fp32 and int8, with PyTorch: recall after re-ranking, and speed.

    python -m benchmarks.onnx --adapter runs/flickr8k/ours/stage2/adapter.safetensors --shards data/flickr8k

Each variant does everything with its own graphs: it encodes the photos and texts of the split `test`, selects the top
20 by its own features, and scores these pairs, one call per query. One thread.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from amp.errors import exit_on_error, require

with exit_on_error():
    import numpy as np
    import torch
    from jsonargparse import auto_cli

    from amp.data.split import ShardSplit
    from amp.data.split_captions import SplitCaptions
    from amp.files import write_atomically
    from amp.knowledge.tensors import TripletTokenizer
    from amp.knowledge.text import tower_texts
    from amp.model.pretrained import from_pretrained
    from amp.publish.graphs import CAPTION_INPUTS, ImageGraph, PairGraph, TextGraph
    from amp.publish.onnx import export_onnx
    from amp.retrieval.first_stage import Positives, first_stage, i2t_positives, t2i_positives
    from amp.retrieval.metrics import recalls
    from amp.retrieval.rerank import rerank
    from benchmarks.machine import processor
    from benchmarks.tables import table
    from benchmarks.timing import in_turns, medians, rounded

    onnxruntime = require("onnxruntime", "this benchmark")

TOP_K, BATCH, TEXT_BATCH = 20, 16, 64
NAMES = ("image", "text", "pair")
Graphs = dict[str, Callable[..., list[np.ndarray]]]
"""The functions `image`, `text` and `pair`, with the arguments of the modules in `amp.publish.graphs`."""


@dataclass
class Data:
    """A split as input of the graphs.

    Attributes:
        pixels: Photos (I, 3, H, W).
        captions: Captions of the split.
        tokens: Token ids of all texts, sorted by length (T, L).
        length: Number of tokens of each text to encode, (T,).
        caption_row: Row of `tokens` of each caption, int64 (C,).
        triplet_tokens, token_mask, mask: See `KnowledgeBatch`.
        state_row: Row of `tokens` of each state, in the order of `mask`.
    """

    pixels: np.ndarray
    captions: SplitCaptions
    tokens: np.ndarray
    length: np.ndarray
    caption_row: np.ndarray
    triplet_tokens: np.ndarray
    token_mask: np.ndarray
    mask: np.ndarray
    state_row: np.ndarray


def main(
    adapter: Path,
    shards: Path,
    base: str | None = None,
    images: int = 0,
    rounds: int = 5,
    out: Path = Path("runs/onnx.json"),
):
    """Measures recall and speed of PyTorch and of ONNX graphs in fp32 and int8.

    Args:
        adapter: Adapter file.
        shards: Folder of shards with a split `test`.
        base: Base model by open_clip's name, or `local-dir:FOLDER`; null uses the one named in the adapter.
        images: Number of photos of the split, from the first on; 0 uses all.
        rounds: Number of timings of each variant.
        out: File of the figures.
    """
    torch.set_num_threads(1)
    model, _, preprocess = from_pretrained(adapter, base)
    split = ShardSplit(shards, "test")
    data = read(model, preprocess, split, first_images(split, images))
    with tempfile.TemporaryDirectory() as folder:
        variants = {"PyTorch": torch_graphs(model)}
        sizes: dict[str, dict[str, float]] = {}
        for name, int8 in (("ONNX", False), ("ONNX, int8", True)):
            exported = export_onnx(model, Path(folder) / name, int8)
            variants[name] = onnx_graphs(exported)
            sizes[name] = {x: rounded(sum(f.stat().st_size for f in exported.glob(f"{x}.*")) / 1e6) for x in NAMES}
        pairs = {name: Pairs(graphs, data) for name, graphs in variants.items()}
        speeds = speed(pairs, data, rounds)
        found: dict = {"processor": processor(), "photos": len(data.pixels), "variants": {}}
        for name, scorer in pairs.items():
            rates = {part: speeds[part][name] for part in NAMES}
            found["variants"][name] = {"MB": sizes.get(name), "per_second": rates, "recall": recall(scorer, data)}
    write_atomically(out, (json.dumps(found, indent=1) + "\n").encode())
    print("\n".join(lines(found)))


def lines(found: dict) -> list[str]:
    """Returns the table of docs/sharing.md."""
    head = ["", "i2t R@1", "t2i R@1", "images/s", "texts/s", "pairs/s", "MB"]
    return table(
        head,
        (
            [
                name,
                *(f"{x['recall'][direction]['1']:.2f}" for direction in ("i2t", "t2i")),
                *(x["per_second"][part]["median"] for part in NAMES),
                x["MB"] and round(sum(x["MB"].values())),
            ]
            for name, x in found["variants"].items()
        ),
    )


def first_images(split: ShardSplit, images: int) -> SplitCaptions:
    """Returns the captions of the first images of a split; 0 means all."""
    captions = SplitCaptions.read(split, ("action", "attribute"))
    if not images:
        return captions
    kept = int((captions.image < images).sum())
    return SplitCaptions(captions.texts[:kept], captions.knowledge[:kept], captions.image[:kept], images)


def read(model, preprocess, split: ShardSplit, captions: SplitCaptions) -> Data:
    """Reads the images of a split, and tokenizes captions and knowledge."""
    config = model.config
    pixels = np.stack([preprocess(split.image(i)).numpy() for i in range(captions.images)])
    states = [text for item in captions.knowledge for text in tower_texts(item, config.max_triplets, config.knowledge)]
    texts = sorted(set(captions.texts + states), key=len)
    row = {text: number for number, text in enumerate(texts)}
    triplets = TripletTokenizer(model.tokenizer, config.max_triplets)(captions.knowledge)
    rows = [np.array([row[text] for text in part], np.int64) for part in (captions.texts, states)]
    tokens = model.tokenizer(texts).numpy()
    length = (tokens != 0).sum(axis=1) if model.backbone.cuts_padding else np.full(len(tokens), tokens.shape[1])
    return Data(pixels, captions, tokens, length, rows[0], *(x.numpy() for x in triplets), rows[1])


def torch_graphs(model) -> Graphs:
    """Returns the modules that are exported, run by PyTorch."""

    def run(module, *arrays: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            found = module(*map(torch.from_numpy, arrays))
        return [x.numpy() for x in ([found] if torch.is_tensor(found) else found)]

    return {
        name: partial(run, kind(model).eval())
        for name, kind in zip(NAMES, (ImageGraph, TextGraph, PairGraph), strict=True)
    }


def onnx_graphs(folder: Path) -> Graphs:
    """Returns exported graphs, run by onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1

    def run(session, *arrays: np.ndarray) -> list[np.ndarray]:
        return session.run(None, {x.name: array for x, array in zip(session.get_inputs(), arrays, strict=True)})

    return {
        name: partial(run, onnxruntime.InferenceSession(folder / f"{name}.onnx", options, ["CPUExecutionProvider"]))
        for name in NAMES
    }


def encode_texts(graphs: Graphs, tokens: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Features (T, d) of texts, without the padding after the longest text of a batch."""
    batches = [slice(n, n + TEXT_BATCH) for n in range(0, len(tokens), TEXT_BATCH)]
    return np.concatenate([graphs["text"](tokens[rows, : length[rows].max()])[0] for rows in batches])


def encode_images(graphs: Graphs, pixels: np.ndarray) -> list[np.ndarray]:
    """The outputs of `ImageGraph` for all images."""
    batches = [graphs["image"](pixels[n : n + BATCH]) for n in range(0, len(pixels), BATCH)]
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]


class Pairs:
    """Scores pairs of a split with its encoded images and texts."""

    def __init__(self, graphs: Graphs, data: Data):
        self.graphs = graphs
        self.base, *self.parts = encode_images(graphs, data.pixels)
        features = encode_texts(graphs, data.tokens, data.length)
        self.text = features[data.caption_row]
        states = np.zeros((*data.mask.shape, features.shape[1]), np.float32)
        if len(data.state_row):
            states[data.mask] = features[data.state_row]
        values = (data.triplet_tokens, data.token_mask, states, data.mask, self.text)
        self.captions = dict(zip(CAPTION_INPUTS, values, strict=True))

    def __call__(self, images: np.ndarray, captions: np.ndarray) -> np.ndarray:
        """Scores (P,) of one image with P captions, or of P images with one caption; int64 (1,) and (P,)."""
        given = (*(x[captions] for x in self.captions.values()), *(x[images] for x in self.parts))
        pairs = max(len(images), len(captions))
        index = [np.arange(pairs) % len(rows) for rows in (images, captions)]
        return self.graphs["pair"](*given[: len(self.captions)], *index, *given[len(self.captions) :])[0]


def recall(pairs: Pairs, data: Data) -> dict:
    """Recall of both directions after re-ranking, in percent."""
    owner = data.captions.image
    base, text = (torch.from_numpy(x) for x in (pairs.base, pairs.text))

    def measured(query, gallery, positives: Positives, score) -> dict[str, float]:
        first = first_stage(query, gallery, positives, TOP_K)
        scores = [score(np.array([q]), c) for q, c in enumerate(first.candidates.numpy())]
        ranks = rerank(first, torch.from_numpy(np.stack(scores)), positives.of(first.candidates))
        return {str(k): value for k, value in recalls(ranks).items()}

    i2t, t2i = (find(owner, data.captions.images) for find in (i2t_positives, t2i_positives))
    return {
        "i2t": measured(base, text, i2t, pairs),
        "t2i": measured(text, base, t2i, lambda query, images: pairs(images, query)),
    }


def speed(variants: dict[str, Pairs], data: Data, rounds: int) -> dict:
    """Images, texts and pairs per second of all variants, which take turns. A call scores `TOP_K` images."""
    images, rows = np.arange(min(TOP_K, len(data.pixels))), data.caption_row[:256]
    pixels, texts = data.pixels[: 2 * BATCH], (data.tokens[rows], data.length[rows])

    def rank(pairs: Pairs) -> list[np.ndarray]:
        return [scores for caption in range(len(rows)) for scores in pairs(images, np.array([caption]))]

    found = {
        "image": {name: lambda x=x: len(encode_images(x.graphs, pixels)[0]) for name, x in variants.items()},
        "text": {name: lambda x=x: len(encode_texts(x.graphs, *texts)) for name, x in variants.items()},
        "pair": {name: lambda x=x: len(rank(x)) for name, x in variants.items()},
    }
    return {part: medians(in_turns(ways, rounds)) for part, ways in found.items()}


if __name__ == "__main__":
    with exit_on_error():
        auto_cli(main, as_positional=False)
