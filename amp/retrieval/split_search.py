"""Retrieval on a split: the frozen CLIP pre-selects, a model re-ranks, in both directions (paper, sec. 3.5)."""

import contextlib
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from amp.data.frozen_features import FrozenFeatures
from amp.data.split_captions import SplitCaptions
from amp.data.stream import KnowledgeCollator
from amp.distributed import all_reduce_sum, rank, world_size
from amp.knowledge.tensors import KnowledgeBatch
from amp.model.similarity import pair_similarity
from amp.retrieval.figures import BASE, DirectionResult, RetrievalRow, RowKey
from amp.retrieval.first_stage import FirstStage, Positives, first_stage_in_folds
from amp.retrieval.rerank import ScorePairs, rerank, score_candidates, shard_bounds
from amp.retrieval.score_store import ScoreStore, content_key
from amp.retrieval.scorer import PairScorer
from amp.retrieval.settings import RetrievalSettings

PAIRS_AT_ONCE = 65_536
Score = Callable[[torch.Tensor, torch.Tensor, ScoreStore | None], torch.Tensor]


@dataclass
class Ranking:
    """Ranking by one method in one direction.

    Attributes:
        queries: Indices of the queries among images or captions, int64 (Q,).
        first: The first stage of the frozen CLIP.
        scores: New scores of the first stage's candidates (Q, k); zeros for queries that `skip_decided` left out.
        ranks: 0-based rank of the best positive after re-ranking (Q,).
        fusion_weight: Weight of the first stage's score in `ranks`.
        result: Recalls and other results.
    """

    queries: torch.Tensor
    first: FirstStage
    scores: torch.Tensor
    ranks: torch.Tensor
    fusion_weight: float
    result: DirectionResult


class Rankings(NamedTuple):
    """Rankings by one method in both directions.

    Attributes:
        t2i: Ranking of images for caption queries.
        i2t: Rankings of captions for image queries, by mode of conditioning (`pairwise`, `pooled`); the mode is "" for
            methods without knowledge.
    """

    t2i: Ranking
    i2t: dict[str, Ranking]


class SplitSearch:
    """The queries of a split and their pre-selected candidates, for all models with the same base CLIP.

    Every rank holds the whole first stage and scores its share of the pairs.

    Args:
        captions: Captions of the split.
        frozen: Frozen image features of the split; early tokens are needed only by `rank` and `scorer`.
        text: The frozen caption features (C, d).
        knowledge: Knowledge of the captions; None if no model is used.
        settings: See `RetrievalSettings`.
        device: Device on which scores are computed.
    """

    def __init__(
        self,
        captions: SplitCaptions,
        frozen: FrozenFeatures,
        text: torch.Tensor,
        knowledge: KnowledgeBatch | None,
        settings: RetrievalSettings,
        device: torch.device,
    ):
        self.captions, self.frozen, self.settings, self.device = captions, frozen, settings, device
        self.text, self.knowledge = text.to(device), knowledge
        base = torch.from_numpy(np.array(frozen.base)).to(device)
        gallery_images = torch.arange(captions.images)
        self.queries = {
            "i2t": spaced(captions.images, settings.max_queries),
            "t2i": spaced(len(captions.texts), settings.max_queries),
        }
        self.positives = {
            "i2t": Positives(gallery_images[self.queries["i2t"]], captions.image),
            "t2i": Positives(captions.image[self.queries["t2i"]], gallery_images),
        }
        settings.check(captions.images)
        self.fold = torch.arange(captions.images) * settings.folds // captions.images
        self.first, self.first_seconds = {}, {}
        for direction, (query, gallery) in {"i2t": (base, self.text), "t2i": (self.text, base)}.items():
            start = time.perf_counter()
            query = query[self.queries[direction].to(device)]
            found = first_stage_in_folds(query, gallery, self.positives[direction], settings.top_k, self.fold)
            self.first[direction] = FirstStage(*(x.cpu() for x in (found.candidates, found.scores, found.ranks)))
            self.first_seconds[direction] = time.perf_counter() - start

    @classmethod
    def stored(
        cls,
        captions: SplitCaptions,
        frozen: FrozenFeatures,
        collate: KnowledgeCollator,
        settings: RetrievalSettings,
        device: torch.device,
    ) -> "SplitSearch":
        """Builds a search with caption features and knowledge from a collator's store of text features."""
        text = torch.from_numpy(collate.store.lookup(captions.texts))
        return cls(captions, frozen, text, collate(captions.knowledge), settings, device)

    def base(self) -> Rankings:
        """Rankings by the frozen CLIP."""
        t2i, i2t = (
            self._ranking(direction, first.scores, first.ranks, 0.0, 0.0)
            for direction, first in ((d, self.first[d]) for d in ("t2i", "i2t"))
        )
        return Rankings(t2i, {"": i2t})

    def rank_text(self, text: torch.Tensor) -> Rankings:
        """Re-ranks by the cosine of other caption features (C, d) and the frozen CLIP's image features, without a
        model."""
        base = torch.from_numpy(np.array(self.frozen.base)).to(self.device)

        def cosines(images: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
            return pair_similarity(base[images.to(self.device)], text[captions.to(self.device)])

        def score(direction: str, rows: torch.Tensor, candidates: torch.Tensor, _) -> torch.Tensor:
            return self._score_pairs(cosines, direction, rows, candidates, PAIRS_AT_ONCE)

        t2i, i2t = (self._rerank(d, functools.partial(score, d)) for d in ("t2i", "i2t"))
        return Rankings(t2i, {"": i2t})

    def rank(
        self,
        model,
        autocast=contextlib.nullcontext,
        progress: Callable[[int, int], None] | None = None,
        partial: Path | None = None,
        precision: str = "",
    ) -> Rankings:
        """Re-ranks with a model.

        Args:
            model: `ActionAwareCLIP` in eval mode, or an engine around it, on `device`.
            autocast: Returns the context manager of a forward pass.
            progress: Called as progress(done, total), starting again for each direction.
            partial: Folder in which scores of pairs are kept, so that a later call can resume on any number of ranks.
            precision: Name of the precision of `autocast`. Stored scores of another precision are not used.

        Returns:
            Rankings with each mode of `RetrievalSettings.i2t`; with the mode "" for a control, whose scores don't
            depend on the mode.
        """
        scorer = self.scorer(model, autocast)
        stored = None if partial is None else partial / self._content_key(model, precision)

        def pairwise(direction: str, rows, candidates, store: ScoreStore | None) -> torch.Tensor:
            size = self.settings.batch_size
            return self._score_pairs(scorer, direction, rows, candidates, size, progress, store)

        def pooled(rows, candidates, _) -> torch.Tensor:
            return self._score_pooled(scorer, rows, candidates, progress)

        i2t = functools.partial(pairwise, "i2t")
        t2i = self._rerank("t2i", functools.partial(pairwise, "t2i"), stored)
        if not getattr(model, "module", model).interaction.conditioned:
            return Rankings(t2i, {"": self._rerank("i2t", i2t, stored)})
        found: dict[str, Ranking] = {}
        for mode in self.settings.i2t:
            found[mode] = self._rerank("i2t", i2t, stored) if mode == "pairwise" else self._rerank("i2t", pooled)
        return Rankings(t2i, found)

    def scorer(self, model, autocast=contextlib.nullcontext) -> PairScorer:
        """A scorer of pairs of this split's images and captions."""
        assert self.knowledge is not None, "a model needs the captions' knowledge"
        tokens = self.frozen.tokens
        return PairScorer(model, tokens, self.knowledge, self.text, autocast, self.settings.batch_size)

    def rows(self, method: str, rankings: Rankings, probe: str = "") -> list[RetrievalRow]:
        """The results of rankings, one row per mode."""
        return [
            RetrievalRow(RowKey(method, mode, probe), i2t.result, rankings.t2i.result)
            for mode, i2t in rankings.i2t.items()
        ]

    def base_row(self) -> RetrievalRow:
        """The results of `base`."""
        return self.rows(BASE.method, self.base())[0]

    # -- scoring ----------------------------------------------------------------------------------------------------

    def _rerank(self, direction: str, score: Score, stored: Path | None = None) -> Ranking:
        """Ranks by new scores.

        Args:
            direction: `t2i` or `i2t`.
            score: Maps rows of queries (Q',) and their candidates (Q', k) to this rank's part of the scores.
            stored: Folder of stored scores; None stores none.
        """
        start, first, weight = time.perf_counter(), self.first[direction], self.settings.fusion_weight
        mask = self.positives[direction].of(first.candidates)
        rows = mask.any(dim=1).nonzero().flatten() if self.settings.skip_decided else torch.arange(len(mask))
        candidates, store, before = first.candidates[rows], None, 0.0
        if stored is not None:
            store = ScoreStore(stored / content_key([direction, rows, candidates]), candidates.numel(), self.device)
            before = store.seconds / world_size()
        part = score(rows, candidates, store)
        scores = torch.zeros_like(first.scores)
        scores[rows] = all_reduce_sum(part.to(self.device)).cpu()
        # Count the queries that were left out as if they had taken as long as the others.
        seconds = (before + time.perf_counter() - start) * len(mask) / max(1, len(rows))
        return self._ranking(direction, scores, rerank(first, scores, mask, weight), weight, seconds)

    def _ranking(
        self, direction: str, scores: torch.Tensor, ranks: torch.Tensor, weight: float, seconds: float
    ) -> Ranking:
        first, positives = self.first[direction], self.positives[direction]
        mask = positives.of(first.candidates)
        seconds += self.first_seconds[direction]
        fold = None if self.settings.folds == 1 else self.fold[positives.query_image]
        result = DirectionResult.measure(ranks, first.ranks, mask, seconds, fold)
        return Ranking(self.queries[direction], first, scores, ranks, weight, result)

    def _score_pairs(
        self,
        scorer: PairScorer | ScorePairs,
        direction: str,
        rows: torch.Tensor,
        candidates: torch.Tensor,
        batch_size: int,
        progress=None,
        store: ScoreStore | None = None,
    ) -> torch.Tensor:
        """Scores (Q', k) of the candidates (Q', k) of the queries `rows`; 0 for pairs of other ranks."""
        queries, to_text = self.queries[direction][rows], direction == "i2t"
        block, prepare = 0, None
        if isinstance(scorer, PairScorer):
            block = scorer.captions_per_block() * (1 if to_text else candidates.shape[1])

            def prepare(q: torch.Tensor, c: torch.Tensor) -> None:
                scorer.prepare(c if to_text else queries[q])

        return score_candidates(
            candidates,
            lambda q, c: scorer(queries[q], c) if to_text else scorer(c, queries[q]),
            batch_size,
            group_by="query" if to_text else "candidate",
            shard=(rank(), world_size()),
            progress=progress,
            prepare=prepare,
            block_pairs=block,
            store=store,
        )

    def _score_pooled(self, scorer: PairScorer, rows: torch.Tensor, candidates: torch.Tensor, progress) -> torch.Tensor:
        """Scores (Q', k) of the candidates (Q', k) of the image queries `rows`; 0 for queries of other ranks.

        Each image is conditioned on the union of its candidates' knowledge.
        """
        scores, queries = torch.zeros(candidates.shape, device=self.device), self.queries["i2t"][rows]
        start, stop = shard_bounds(len(rows), rank(), world_size())
        size = max(1, self.settings.batch_size // self.settings.top_k)
        for low in range(start, stop, size):
            part = slice(low, min(low + size, stop))
            scores[part] = scorer.pooled(queries[part], candidates[part])
            if progress is not None:
                progress(part.stop - start, stop - start)
        return scores

    def _content_key(self, model, precision: str) -> str:
        """Hash of everything that the scores of pairs depend on, except the pairs."""
        model = getattr(model, "module", model)
        state = model.adapter_state()
        assert self.knowledge is not None
        knowledge, images = vars(self.knowledge).values(), (np.asarray(self.frozen.base), self.frozen.tokens[0])
        # Base features identify the photos. The tokens of one image identify a grey image used in place of photos.
        return content_key([repr(model.config), precision, *state, *state.values(), *knowledge, self.text, *images])


def spaced(total: int, count: int) -> torch.Tensor:
    """`count` evenly spaced indices below `total`, int64; all indices if `count` is 0 or at least `total`."""
    if count <= 0 or count >= total:
        return torch.arange(total)
    return torch.arange(count) * total // count
