"""Measures re-ranking: pairs a second against loops without our engine, and peak memory against the gallery's size.

    python tools/measure_rerank.py --model.name ViT-B-16-quickgelu --model.pretrained openai --out results/rerank.json
    python tools/measure_rerank.py --config launchers/configs/flickr8k.yaml --out results/rerank.json

Photos are noise, captions and knowledge are drawn words, candidates are drawn; nothing is read from shards. Visual
prompts and knowledge enter at half of the image blocks. All loops score the same pairs, and their scores are compared.
"""

import contextlib
import json
import multiprocessing
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from amp.config import PromptConfig
from amp.errors import AmpError, exit_on_error
from amp.factory import create_model_and_transforms
from amp.knowledge.batch import KnowledgeBatch
from amp.knowledge.schema import Knowledge, Triplet
from amp.model import ActionAwareCLIP
from amp.retrieval.first_stage import Positives, first_stage
from amp.retrieval.pair_scorer import PairScorer
from amp.retrieval.rerank import score_candidates
from amp.retrieval.results import write_atomically
from amp.train.command import command_line, read_command_line
from amp.train.config import ModelSettings

# The loop that the public calls suggest; the same with texts encoded before; and a query's candidates as one batch.
PER_PAIR, NO_TEXT, PER_QUERY = "a pair a call", "the same, texts encoded", "a query a call, texts encoded"
ENGINE, ENGINE_BF16 = "ours", "ours, bf16"
LOOPS = (PER_PAIR, NO_TEXT, PER_QUERY, ENGINE, ENGINE_BF16)
WORDS = ("dog", "girl", "horse", "boy", "man", "chases", "kicks", "carries", "throws", "watches", "ball", "kite")


@dataclass
class Measurement:
    """What is measured.

    Args:
        images: Images of the gallery that is timed, with a caption each.
        top_k: Candidates a caption.
        pairs_a_batch: Of ours.
        naive_queries: Captions that the slow loops score; ours scores all.
        galleries: Sizes whose memory is measured.
        memory_queries: Captions that are re-ranked there; all are in the first stage.
        device: Where.
        out: JSON file; null only prints.
    """

    images: int = 100
    top_k: int = 20
    pairs_a_batch: int = 128
    naive_queries: int = 3
    galleries: list[int] = field(default_factory=lambda: [1_000, 4_000, 16_000])
    memory_queries: int = 50
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    out: Path | None = None


def build(model: ModelSettings, prompt: PromptConfig, interaction: str, device: torch.device) -> ActionAwareCLIP:
    """A model whose prompts enter at half of its blocks, with random weights in place of trained ones."""
    base, _, _ = create_model_and_transforms(model.name, model.pretrained, precision=model.precision, device=device)
    layer = base.backbone.num_layers // 2
    blocks = prompt.readout_blocks if interaction == "readout" else 0
    torch.manual_seed(0)
    config = replace(prompt, interaction=interaction, interaction_layer=layer, readout_blocks=blocks)
    aware = ActionAwareCLIP(base.backbone.clip, config, base.tokenizer).to(device).eval()
    with torch.no_grad():  # what starts at zero would hide differences
        (aware.readout.out.weight if interaction == "readout" else aware.interaction.gate).normal_(std=0.1)
    return aware


def drawn_captions(count: int, triplets: int) -> tuple[list[str], list[Knowledge]]:
    """Captions of ten words with as many triplets and states as the model reads."""
    random = np.random.default_rng(0)
    texts, knowledge = [], []
    for _ in range(count):
        texts.append(" ".join(random.choice(WORDS, 10)))
        slots = [random.choice(WORDS, 3).tolist() for _ in range(triplets)]
        states = tuple(f"The {subject} {action} with bent knees and raised arms" for subject, action, _ in slots)
        knowledge.append(Knowledge(tuple(Triplet(*slot) for slot in slots), states))
    return texts, knowledge


def pairs_a_second(model: ActionAwareCLIP, m: Measurement) -> tuple[dict[str, float], dict[str, float]]:
    """Pairs a second of each loop, and GFLOP a pair of the slowest and of ours, matrix products counted.

    Raises:
        AmpError: The loops disagree.
    """
    device = model.logit_scale.device
    images = torch.randn(m.images, 3, *model.backbone.visual.image_size)
    captions, items = drawn_captions(m.images, model.config.max_triplets)
    candidates = torch.stack([torch.randperm(m.images)[: m.top_k] for _ in range(m.images)])
    rates, scores = {}, {}

    def encoded_texts() -> tuple[torch.Tensor, KnowledgeBatch]:
        parts = [model.encode_text(model.tokenizer(captions[i : i + 64]).to(device)) for i in range(0, m.images, 64)]
        return torch.cat(parts), model.prepare_knowledge(items)

    def naive(query: int) -> torch.Tensor:
        found = []
        for image in candidates[query].tolist():
            frozen = model.encode_text(model.tokenizer([captions[query]]).to(device))
            knowledge = [items[query]]
            text = model(None, model.prepare_knowledge(knowledge), text=frozen).text
            feature = model.encode_image(images[image : image + 1].to(device), knowledge, text=frozen)
            found.append(F.cosine_similarity(feature.float(), text.float(), dim=-1).cpu())
        return torch.cat(found)

    def conditioned(image: torch.Tensor, query: int) -> torch.Tensor:
        own = slice(query, query + 1)
        prompts = model.encode_knowledge(knowledge[own].to(device), text[own])
        repeated = prompts.take(torch.zeros(len(image), dtype=torch.int64, device=device))
        early = model.encode_early(image.to(device))
        features = model.encode_pairs(early, repeated, torch.arange(len(image), device=device))
        return F.cosine_similarity(features.float(), scorer.scored_text[own].float(), dim=-1).cpu()

    def ours() -> torch.Tensor:
        # Early blocks and texts count: here no run before has stored their output.
        scorer.early = np.concatenate(
            [model.encode_early(x.to(device)).float().cpu().numpy() for x in images.split(32)]
        )
        return rerank_scores(scorer, candidates, m.pairs_a_batch).flatten()

    def timed(name: str, run) -> None:
        _wait(device)
        start = time.perf_counter()
        scores[name] = run()
        _wait(device)
        rates[name] = scores[name].numel() / (time.perf_counter() - start)

    with torch.no_grad():
        naive(0)  # warms up
        timed(PER_PAIR, lambda: torch.cat([naive(q) for q in range(m.naive_queries)]))
        start = time.perf_counter()
        text, knowledge = encoded_texts()
        texts_seconds = time.perf_counter() - start
        scorer = PairScorer(model, np.empty((0,)), knowledge, text, batch_size=m.pairs_a_batch)
        queries = range(m.naive_queries)
        timed(
            NO_TEXT, lambda: torch.cat([conditioned(images[[c]], q) for q in queries for c in candidates[q].tolist()])
        )
        timed(PER_QUERY, lambda: torch.cat([conditioned(images[candidates[q]], q) for q in queries]))
        for name, autocast in ((ENGINE, False), (ENGINE_BF16, True)):
            scorer.autocast = lambda enabled=autocast: torch.autocast(device.type, torch.bfloat16, enabled=enabled)
            timed(name, ours)
            rates[name] = candidates.numel() / (candidates.numel() / rates[name] + texts_seconds)
    for name in LOOPS:
        error = float((scores[name] - scores[ENGINE][: len(scores[name])]).abs().max())
        allowed = 2e-2 if name == ENGINE_BF16 else 1e-5
        if error > allowed:
            raise AmpError(f"scores of {name!r} and {ENGINE!r} differ by {error:.1e}, expected {allowed} at most")
    scorer.autocast = contextlib.nullcontext
    with torch.no_grad():
        work = {PER_PAIR: gflop(lambda: naive(0)) / m.top_k,
                ENGINE: gflop(lambda: (encoded_texts(), ours())) / candidates.numel()}  # fmt: skip
    return rates, work


def gflop(run) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


def rerank_scores(scorer: PairScorer, candidates: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Scores (Q, k) of captions 0 to Q - 1, as `Retrieval` computes them."""
    return score_candidates(
        candidates, lambda q, c: scorer(c, q), batch_size, group_by="candidate", prepare=lambda q, c: scorer.prepare(q),
        block_pairs=scorer.captions_a_block() * candidates.shape[1],
    )  # fmt: skip


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class PeakMemory(threading.Thread):
    """Highest anonymous memory of the process (Linux) while it runs, MB: mapped files, which the system may drop at any
    time, are left out."""

    def __init__(self):
        super().__init__(daemon=True)
        self.start_value, self.peak, self.ended = self.now(), 0.0, threading.Event()
        self.start()

    @staticmethod
    def now() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon"))

    def run(self) -> None:
        while not self.ended.wait(0.005):
            self.peak = max(self.peak, self.now())

    def stop(self) -> float:
        self.ended.set()
        self.join()
        return self.peak - self.start_value


def memory_of_gallery(model: ModelSettings, prompt: PromptConfig, m: Measurement, size: int, queue) -> None:
    """Peak of the first stage of `size` captions among as many images, and of re-ranking some of them."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    aware = build(model, prompt, "aim", torch.device("cpu"))
    images, captions = torch.randn(2, size, aware.backbone.embed_dim)
    knowledge = aware.prepare_knowledge(drawn_captions(m.memory_queries, aware.config.max_triplets)[1])
    shape = (size, 1 + aware.backbone.num_patches, aware.backbone.vision_width)
    with tempfile.TemporaryDirectory() as folder:
        # A file with holes: reading it costs no disk.
        early = np.lib.format.open_memmap(Path(folder) / "early.npy", mode="w+", dtype=np.float16, shape=shape)
        memory = PeakMemory()
        labels = torch.arange(size)
        found = first_stage(captions, images, Positives(labels, labels), m.top_k)
        first = memory.stop()
        memory = PeakMemory()
        with torch.no_grad():
            scorer = PairScorer(aware, early, knowledge, captions[: m.memory_queries])
            rerank_scores(scorer, found.candidates[: m.memory_queries], m.pairs_a_batch)
        queue.put((first, memory.stop()))


def gallery_memory(model: ModelSettings, prompt: PromptConfig, m: Measurement) -> list[dict[str, float]]:
    """A process a size, so that none inherits another's memory."""
    context, rows = multiprocessing.get_context("spawn"), []
    for size in m.galleries:
        queue = context.SimpleQueue()
        process = context.Process(target=memory_of_gallery, args=(model, prompt, m, size, queue))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise AmpError(f"the process of a gallery of {size:,} ended with {process.exitcode}")
        first, rerank = queue.get()
        rows.append({"images": size, "first_stage_MB": round(first, 1), "rerank_MB": round(rerank, 1),
                     "score_matrix_MB": round(4e-6 * size * size, 1)})  # fmt: skip
    return rows


def parser() -> ArgumentParser:
    return command_line("tools/measure_rerank.py", __doc__, Measurement)


def main(arguments: list[str] | None = None) -> None:
    with exit_on_error():
        m, config = read_command_line(parser(), arguments, Measurement)
        model, prompt = config.model, config.prompt
        result = {"model": model.name, "threads": torch.get_num_threads(), "device": m.device, "speed": []}
        table = Table("interaction", *(f"{name}\npairs/s" for name in LOOPS), "ours x", "bf16 x", "FLOP x")
        for interaction in ("aim", "readout"):
            torch.manual_seed(0)
            rates, work = pairs_a_second(build(model, prompt, interaction, torch.device(m.device)), m)
            ratios = [round(rates[name] / rates[PER_PAIR], 1) for name in (ENGINE, ENGINE_BF16)]
            rounded = {name: round(rate, 1) for name, rate in rates.items()}
            result["speed"].append({"interaction": interaction, "pairs_a_second": rounded, "ratio": ratios[0],
                                    "ratio_bf16": ratios[1],
                                    "gflop_a_pair": {name: round(x, 3) for name, x in work.items()}})  # fmt: skip
            by_count = work[PER_PAIR] / work[ENGINE]
            table.add_row(interaction, *(f"{rates[name]:.1f}" for name in LOOPS), *map(str, ratios), f"{by_count:.1f}")
        Console().print(table)
        result["memory"] = gallery_memory(model, prompt, m)
        table = Table("images", "first_stage_MB", "rerank_MB", "score_matrix_MB")
        for row in result["memory"]:
            table.add_row(*(f"{value:,}" for value in row.values()))
        Console().print(table)
        if m.out is not None:
            write_atomically(m.out, f"{json.dumps(result, indent=2)}\n".encode())


if __name__ == "__main__":
    main()
