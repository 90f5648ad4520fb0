"""Re-ranking: pairs per second compared with simpler loops, and peak memory for several gallery sizes.

Photos are noise, captions and knowledge are random words, and candidates are random; nothing is read from shards.
Visual prompts and knowledge enter at the middle image block. All loops score the same pairs, and their scores are
compared.
"""

import multiprocessing
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from amp.errors import AmpError
from amp.knowledge.tensors import Captions, KnowledgeBatch
from amp.model.clip import ActionAwareCLIP
from amp.retrieval.first_stage import Positives, first_stage
from amp.retrieval.rerank import score_candidates
from amp.retrieval.scorer import PairScorer
from benchmarks.machine import multiplies_bf16
from benchmarks.memory import peak_mb
from benchmarks.models import READ_LAST, base_model, build, drawn_captions
from benchmarks.naive import NaiveAIM
from benchmarks.settings import Settings
from benchmarks.step import gflop
from benchmarks.tables import spread, table
from benchmarks.timing import in_turns, medians, ratio, rounded

# EQUATIONS is benchmarks/naive.py. PER_PAIR is the loop that the public API suggests. NO_TEXT is the same with texts
# encoded before, and PER_QUERY also scores all candidates of a query as one batch.
EQUATIONS, PER_PAIR = "naive, one pair at a time", "public API, one pair at a time"
NO_TEXT, PER_QUERY = "public API, texts encoded before", "one query at a time, texts encoded before"
ENGINE, ENGINE_BF16 = "ours", "ours, bf16"
MEMORY_QUERIES = 20  # re-ranked queries of the memory benchmark; its first stage has all queries


def run(settings: Settings) -> dict:
    """Measures the speed of both interactions, and memory for each gallery size."""
    base = base_model(settings)
    layer, speed = base.backbone.num_layers // 2, {}
    for interaction, prompt in {"aim": {}, "readout": READ_LAST}.items():
        loops = Loops(build(base, layer, **prompt).eval(), settings)
        rates = loops.pairs_per_second()
        work = {name: loops.gflop_per_pair(name) for name in loops.ways}
        against = {f"ours / {name}": rounded(ratio(rates, ENGINE, name)) for name in rates if name != ENGINE}
        by_work = {f"ours / {name}": rounded(x / work[ENGINE]) for name, x in work.items() if name != ENGINE}
        speed[interaction] = {
            "pairs_per_second": medians(rates),
            "ratio": against,
            "ratio_by_work": by_work,
            "gflop_per_pair": {name: rounded(x) for name, x in work.items()},
        }
    return {"layer": layer, "blocks": base.backbone.num_layers, "speed": speed, "memory": gallery_memory(settings)}


class Loops:
    """Loops that score the same pairs, of all captions or (the slow ones) of the first `settings.naive_queries`."""

    def __init__(self, model: ActionAwareCLIP, settings: Settings):
        self.model, self.settings, self.device = model, settings, model.logit_scale.device
        count = settings.rerank_images
        self.images = torch.randn(count, 3, *model.backbone.visual.image_size)
        self.captions, self.items = drawn_captions(count, model.config.max_triplets)
        self.candidates = torch.stack([torch.randperm(count)[: settings.top_k] for _ in range(count)])
        self.text, self.knowledge = self.encoded_texts()
        with torch.no_grad():
            self.scored_text = model(None, Captions(self.knowledge.to(self.device), self.text)).captions.text
        ways = {
            PER_PAIR: partial(self.slow, self.by_calls),
            NO_TEXT: partial(self.slow, self.conditioned),
            PER_QUERY: self.by_query,
            ENGINE: self.ours,
        }
        if model.config.interaction == "aim":
            self.naive = NaiveAIM(model)
            ways = {EQUATIONS: partial(self.slow, self.by_equations), **ways}
        if multiplies_bf16(self.device):
            ways[ENGINE_BF16] = partial(self.ours, True)
        self.ways = {name: torch.no_grad()(way) for name, way in ways.items()}

    def pairs_per_second(self) -> dict[str, list[float]]:
        """Measures each loop, with one figure per round.

        Raises:
            AmpError: The loops disagree.
        """
        scores = {}

        def timed(name: str) -> int:
            scores[name] = self.ways[name]()
            return scores[name].numel()

        rates = in_turns({name: partial(timed, name) for name in self.ways}, self.settings.model_rounds, self.device)
        for name, found in scores.items():
            error = float((found - scores[ENGINE][: len(found)]).abs().max())
            allowed = 2e-2 if name == ENGINE_BF16 else 1e-5
            if error > allowed:
                raise AmpError(f"scores of {name!r} and {ENGINE!r} differ by {error:.1e}, expected at most {allowed}")
        return rates

    def gflop_per_pair(self, name: str) -> float:
        """Counts the GFLOP of matrix products per pair."""
        pairs = []
        return gflop(lambda: pairs.append(self.ways[name]().numel())) / pairs[0]

    def slow(self, score: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
        queries = range(self.settings.naive_queries)
        return torch.cat([score(q, c).cpu().flatten() for q in queries for c in self.candidates[q].tolist()])

    def by_equations(self, query: int, image: int) -> torch.Tensor:
        return self.naive.similarity(self.images[image].to(self.device), self.captions[query], self.items[query])

    def by_calls(self, query: int, image: int) -> torch.Tensor:
        model, knowledge = self.model, [self.items[query]]
        frozen = model.encode_text(model.tokenizer([self.captions[query]]).to(self.device))
        text = model(None, Captions(model.prepare_knowledge(knowledge), frozen)).captions.text
        feature = model.encode_image(self.images[image : image + 1].to(self.device), knowledge, text=frozen)
        return F.cosine_similarity(feature.float(), text.float(), dim=-1)

    def conditioned(self, query: int, images: int | torch.Tensor) -> torch.Tensor:
        own, image = slice(query, query + 1), self.images[images].view(-1, *self.images.shape[1:])
        captions = Captions(self.knowledge[own].to(self.device), self.text[own])
        index = torch.arange(len(image), device=self.device)
        features = self.model(image.to(self.device), captions, (index, torch.zeros_like(index))).conditioned
        return F.cosine_similarity(features.float(), self.scored_text[own].float(), dim=-1)

    def by_query(self) -> torch.Tensor:
        return torch.cat([self.conditioned(q, self.candidates[q]).cpu() for q in range(self.settings.naive_queries)])

    def ours(self, autocast: bool = False) -> torch.Tensor:
        """Scores with the engine. The time includes texts and early blocks, which are not stored here."""
        low = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=autocast)
        self.text, self.knowledge = self.encoded_texts()
        with low():
            early = [self.model.tower.early(x.to(self.device)).float().cpu().numpy() for x in self.images.split(32)]
        batch = self.settings.pairs_a_batch
        scorer = PairScorer(self.model, np.concatenate(early), self.knowledge, self.text, low, batch)
        return rerank_scores(scorer, self.candidates, batch).flatten()

    @torch.no_grad()
    def encoded_texts(self) -> tuple[torch.Tensor, KnowledgeBatch]:
        tokens = self.model.tokenizer(self.captions).to(self.device)
        text = torch.cat([self.model.encode_text(x) for x in tokens.split(64)])
        return text, self.model.prepare_knowledge(self.items)


def rerank_scores(scorer: PairScorer, candidates: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Computes scores (Q, k) of captions 0 to Q - 1 like `SplitSearch`."""
    return score_candidates(
        candidates,
        lambda q, c: scorer(c, q),
        batch_size,
        group_by="candidate",
        prepare=lambda q, c: scorer.prepare(q),
        block_pairs=scorer.captions_per_block() * candidates.shape[1],
    )


def memory_of_gallery(settings: Settings, size: int, queue) -> None:
    """Measures peak memory of the first stage with `size` captions and images, and of re-ranking some captions."""
    torch.set_num_threads(1)
    base = base_model(settings)
    model = build(base, base.backbone.num_layers // 2).eval()
    torch.manual_seed(0)
    images, captions = torch.randn(2, size, model.backbone.embed_dim)
    queries = min(size, MEMORY_QUERIES)
    knowledge = model.prepare_knowledge(drawn_captions(queries, model.config.max_triplets)[1])
    shape = (size, model.backbone.num_tokens, model.backbone.vision_width)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        # A sparse file, so that it needs no space on the disk.
        early = np.lib.format.open_memmap(Path(folder) / "early.npy", mode="w+", dtype=np.float16, shape=shape)
        labels = torch.arange(size)
        found, first = peak_mb(lambda: first_stage(captions, images, Positives(labels, labels), settings.top_k))
        device = model.logit_scale.device
        scorer = PairScorer(model, early, knowledge, captions[:queries].to(device))
        candidates = found.candidates[:queries]
        _, rerank = peak_mb(lambda: rerank_scores(scorer, candidates, settings.pairs_a_batch), settings.device)
        queue.put((first, rerank))


def gallery_memory(settings: Settings) -> list[dict[str, float]]:
    """Measures each gallery size in its own process, so that none inherits another's memory."""
    context, rows = multiprocessing.get_context("spawn"), []
    for size in settings.galleries:
        queue = context.SimpleQueue()
        process = context.Process(target=memory_of_gallery, args=(settings, size, queue))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise AmpError(f"the process for {size:,} images ended with exit code {process.exitcode}, expected 0")
        first, rerank = queue.get()
        rows.append(
            {
                "images": size,
                "first_stage_MB": round(first, 1),
                "rerank_MB": round(rerank, 1),
                "score_matrix_MB": round(4e-6 * size * size, 1),
            }
        )
    return rows


def reranks(figures: dict) -> list[str]:
    rows = []
    for interaction, found in figures["speed"].items():
        for name, rate in found["pairs_per_second"].items():
            rows.append(
                [
                    interaction,
                    name,
                    spread(rate),
                    found["ratio"].get(f"ours / {name}"),
                    found["gflop_per_pair"].get(name),
                    found["ratio_by_work"].get(f"ours / {name}"),
                ]
            )
    return table(["interaction", "", "pairs/s", "speedup of ours", "GFLOP per pair", "ratio of GFLOP"], rows)


def galleries(figures: dict) -> list[str]:
    head = ["images", "first stage, MB", "re-ranking, MB", "full score matrix, MB"]
    return table(
        head,
        ([f"{x['images']:,}", x["first_stage_MB"], x["rerank_MB"], x["score_matrix_MB"]] for x in figures["memory"]),
    )


TABLES = {"rerank": reranks, "rerank.memory": galleries}
