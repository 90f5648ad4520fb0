"""Re-ranking: pairs a second against loops without our engine, and peak memory against the gallery's size.

Photos are noise, captions and knowledge are drawn words, candidates are drawn; nothing is read from shards. Visual
prompts and knowledge enter at half of the image blocks. All loops score the same pairs, and their scores are compared.
"""

import contextlib
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from amp.errors import AmpError
from amp.knowledge.batch import KnowledgeBatch
from amp.model import ActionAwareCLIP
from amp.retrieval.first_stage import Positives, first_stage
from amp.retrieval.pair_scorer import PairScorer
from amp.retrieval.rerank import score_candidates
from benchmarks.machine import multiplies_bf16
from benchmarks.memory import peak_mb
from benchmarks.models import base_model, build, drawn_captions
from benchmarks.naive import NaiveAIM
from benchmarks.settings import Settings
from benchmarks.step import gflop
from benchmarks.timing import rounded, synchronize

# The equations as they read; the loop that our public calls suggest; the same with texts encoded before; and a query's
# candidates as one batch.
EQUATIONS, PER_PAIR = "the equations, a pair at a time", "our calls, a pair at a time"
NO_TEXT, PER_QUERY = "the same, texts encoded", "a query at a time, texts encoded"
ENGINE, ENGINE_BF16 = "ours", "ours, bf16"
MEMORY_QUERIES = 20  # that are re-ranked where memory is measured; all are in the first stage


def run(settings: Settings) -> dict:
    """Speed of both interactions, and memory of galleries."""
    base = base_model(settings)
    layer, speed = base.backbone.num_layers // 2, {}
    for interaction in ("aim", "readout"):
        model = build(base, layer, interaction=interaction).eval()
        rates, work = pairs_a_second(model, settings)
        slow = EQUATIONS if interaction == "aim" else PER_PAIR
        speed[interaction] = {
            "pairs_a_second": {name: rounded(x) for name, x in rates.items()},
            "gflop_a_pair": {name: rounded(x) for name, x in work.items()},
            "ratio": {f"ours / {name}": rounded(rates[ENGINE] / x) for name, x in rates.items() if name != ENGINE},
            "ratio_by_work": rounded(work[slow] / work[ENGINE]),
        }  # fmt: skip
    return {"layer": layer, "blocks": base.backbone.num_layers, "speed": speed, "memory": gallery_memory(settings)}


def pairs_a_second(model: ActionAwareCLIP, settings: Settings) -> tuple[dict[str, float], dict[str, float]]:
    """Pairs a second of each loop, and GFLOP a pair of the slowest and of ours, matrix products counted.

    Raises:
        AmpError: The loops disagree.
    """
    device = model.logit_scale.device
    images = torch.randn(settings.rerank_images, 3, *model.backbone.visual.image_size)
    equations = None if model.has_readout else NaiveAIM(model)
    captions, items = drawn_captions(settings.rerank_images, model.config.max_triplets)
    candidates = torch.stack(
        [torch.randperm(settings.rerank_images)[: settings.top_k] for _ in range(settings.rerank_images)]
    )
    rates, scores = {}, {}

    def encoded_texts() -> tuple[torch.Tensor, KnowledgeBatch]:
        parts = [
            model.encode_text(model.tokenizer(captions[i : i + 64]).to(device))
            for i in range(0, settings.rerank_images, 64)
        ]
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

    def by_equations(query: int) -> torch.Tensor:
        found = [equations.similarity(images[c].to(device), captions[query], items[query])
                 for c in candidates[query].tolist()]  # fmt: skip
        return torch.stack(found).cpu()

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
        return rerank_scores(scorer, candidates, settings.pairs_a_batch).flatten()

    def timed(name: str, run) -> None:
        synchronize(device)
        start = time.perf_counter()
        scores[name] = run()
        synchronize(device)
        rates[name] = scores[name].numel() / (time.perf_counter() - start)

    with torch.no_grad():
        naive(0)  # warms up
        if equations is not None:
            by_equations(0)
            timed(EQUATIONS, lambda: torch.cat([by_equations(q) for q in range(settings.naive_queries)]))
        timed(PER_PAIR, lambda: torch.cat([naive(q) for q in range(settings.naive_queries)]))
        start = time.perf_counter()
        text, knowledge = encoded_texts()
        texts_seconds = time.perf_counter() - start
        scorer = PairScorer(model, np.empty((0,)), knowledge, text, batch_size=settings.pairs_a_batch)
        queries = range(settings.naive_queries)
        timed(
            NO_TEXT, lambda: torch.cat([conditioned(images[[c]], q) for q in queries for c in candidates[q].tolist()])
        )
        timed(PER_QUERY, lambda: torch.cat([conditioned(images[candidates[q]], q) for q in queries]))
        ways = {ENGINE: False}
        if multiplies_bf16(device):
            ways[ENGINE_BF16] = True
        for name, autocast in ways.items():
            scorer.autocast = lambda enabled=autocast: torch.autocast(device.type, torch.bfloat16, enabled=enabled)
            timed(name, ours)
            rates[name] = candidates.numel() / (candidates.numel() / rates[name] + texts_seconds)
    for name in scores:
        error = float((scores[name] - scores[ENGINE][: len(scores[name])]).abs().max())
        allowed = 2e-2 if name == ENGINE_BF16 else 1e-5
        if error > allowed:
            raise AmpError(f"scores of {name!r} and {ENGINE!r} differ by {error:.1e}, expected {allowed} at most")
    scorer.autocast = contextlib.nullcontext
    with torch.no_grad():
        work = {PER_PAIR: gflop(lambda: naive(0)) / settings.top_k,
                **({EQUATIONS: gflop(lambda: by_equations(0)) / settings.top_k} if equations is not None else {}),
                ENGINE: gflop(lambda: (encoded_texts(), ours())) / candidates.numel()}  # fmt: skip
    return rates, work


def rerank_scores(scorer: PairScorer, candidates: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Scores (Q, k) of captions 0 to Q - 1, as `Retrieval` computes them."""
    return score_candidates(
        candidates, lambda q, c: scorer(c, q), batch_size, group_by="candidate", prepare=lambda q, c: scorer.prepare(q),
        block_pairs=scorer.captions_a_block() * candidates.shape[1],
    )  # fmt: skip


def memory_of_gallery(settings: Settings, size: int, queue) -> None:
    """Peak of the first stage of `size` captions among as many images, and of re-ranking some of them."""
    torch.set_num_threads(1)
    base = base_model(settings)
    model = build(base, base.backbone.num_layers // 2).eval()
    torch.manual_seed(0)
    images, captions = torch.randn(2, size, model.backbone.embed_dim)
    queries = min(size, MEMORY_QUERIES)
    knowledge = model.prepare_knowledge(drawn_captions(queries, model.config.max_triplets)[1])
    shape = (size, 1 + model.backbone.num_patches, model.backbone.vision_width)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        # A file with holes: reading it costs no disk.
        early = np.lib.format.open_memmap(Path(folder) / "early.npy", mode="w+", dtype=np.float16, shape=shape)
        labels = torch.arange(size)
        found, first = peak_mb(lambda: first_stage(captions, images, Positives(labels, labels), settings.top_k))
        device = model.logit_scale.device
        scorer = PairScorer(model, early, knowledge, captions[:queries].to(device))
        candidates = found.candidates[:queries]
        _, rerank = peak_mb(lambda: rerank_scores(scorer, candidates, settings.pairs_a_batch), settings.device)
        queue.put((first, rerank))


def gallery_memory(settings: Settings) -> list[dict[str, float]]:
    """A process a size, so that none inherits another's memory."""
    context, rows = multiprocessing.get_context("spawn"), []
    for size in settings.galleries:
        queue = context.SimpleQueue()
        process = context.Process(target=memory_of_gallery, args=(settings, size, queue))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise AmpError(f"the process of a gallery of {size:,} ended with {process.exitcode}")
        first, rerank = queue.get()
        rows.append({"images": size, "first_stage_MB": round(first, 1), "rerank_MB": round(rerank, 1),
                     "score_matrix_MB": round(4e-6 * size * size, 1)})  # fmt: skip
    return rows
