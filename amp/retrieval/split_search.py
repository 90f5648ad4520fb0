"""Retrieval: the frozen CLIP pre-selects, the action-aware model re-ranks, in both directions (paper, sec. 3.5)."""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from amp.data.frozen_features import FrozenFeatures
from amp.data.split import ShardSplit
from amp.data.stream import KnowledgeCollator
from amp.distributed import all_reduce_sum, rank, world_size
from amp.errors import AmpError
from amp.evaluate.results import DirectionResult, RetrievalRow
from amp.knowledge.schema import Knowledge
from amp.knowledge.tensors import KnowledgeBatch
from amp.knowledge.text import tower_texts
from amp.retrieval.first_stage import FirstStage, Positives, first_stage_in_folds, usable_faiss
from amp.retrieval.rerank import rerank, score_candidates, shard_bounds
from amp.retrieval.score_store import ScoreStore, content_key
from amp.retrieval.scorer import PairScorer, early_tokens, scored_text
from amp.terminal import Terminal


@dataclass
class RetrievalSettings:
    """How a split is searched.

    Args:
        top_k: Candidates that the frozen CLIP pre-selects (paper: 20).
        i2t: How image queries are conditioned: ``pairwise`` on each candidate's knowledge, ``pooled`` on the union of
            all candidates' knowledge; the paper's text fits pooled.
        fusion_weight: Weight of the first stage's score beside the new one (paper: 0).
        fusions: Further weights, a row each, from the same scores.
        batch_size: Pairs a forward pass.
        captions_per_image: Keep only the first n captions of an image; 0 keeps all (COCO 5K: 25,010).
        max_queries: Search for this many queries a direction, evenly spaced, in the whole gallery; 0 for all.
        skip_decided: Score only queries with an answer among their candidates. The others keep their first-stage rank
            whatever they score, so the recalls are the same for a fraction of the work.
        folds: Galleries that the images are cut into, in order, with figures averaged over them; COCO's "1K" is 5.
        first_stage: ``exact``: a matrix product and the rank of every answer. ``faiss``: an exact inner-product index
            of faiss-cpu for galleries past a million; an answer outside the top k has no rank, so top_k is 10 or more.
    """

    top_k: int = 20
    i2t: list[Literal["pairwise", "pooled"]] = field(default_factory=lambda: ["pairwise", "pooled"])
    fusion_weight: float = 0.0
    fusions: list[float] = field(default_factory=list)
    batch_size: int = 128
    captions_per_image: int = 0
    max_queries: int = 0
    skip_decided: bool = False
    folds: int = 1
    first_stage: Literal["exact", "faiss"] = "exact"

    def __post_init__(self):
        least = {"top_k": 1, "batch_size": 1, "captions_per_image": 0, "max_queries": 0, "folds": 1}
        for key, low in least.items():
            if getattr(self, key) < low:
                raise AmpError(f"search setting {key} is {getattr(self, key)}, expected an integer of at least {low}")
        if not self.i2t:
            raise AmpError("search setting i2t is [], expected pairwise, pooled or both")

    def check(self, images: int) -> None:
        """Raises AmpError where a split of so many images can't be searched like this, or faiss is missing."""
        if self.folds > images:
            raise AmpError(f"search setting folds is {self.folds}, expected at most {images}, the images")
        if self.first_stage == "faiss":
            usable_faiss(self.top_k)


@dataclass
class SplitCaptions:
    """The captions of a split in order, with the image of each.

    Attributes:
        texts: C captions.
        knowledge: Of the captions.
        image: Index of each caption's image, int64 (C,).
        images: Number of images I.
    """

    texts: list[str]
    knowledge: list[Knowledge]
    image: torch.Tensor
    images: int

    @classmethod
    def read(cls, split: ShardSplit, keep: Sequence[str], captions_per_image: int = 0) -> "SplitCaptions":
        """Reads the records of a split; `captions_per_image` 0 keeps all."""
        texts, knowledge, image = [], [], []
        for index, record in enumerate(split.records()):
            for text, item in split.captions(record, keep)[: captions_per_image or None]:
                texts.append(text)
                knowledge.append(item)
                image.append(index)
        return cls(texts, knowledge, torch.tensor(image), len(split))

    def say_without_knowledge(self, terminal: Terminal) -> None:
        """Says how many captions have no triplet, if any."""
        if lacking := sum(not item.triplets for item in self.knowledge):
            terminal.say(f"{lacking:,} of {len(self.texts):,} captions without knowledge")

    def all_texts(self, max_triplets: int, setting: str = "both") -> list[str]:
        """Every text that needs a feature: captions, and what `PromptConfig.knowledge` asks for beside them."""
        return self.texts + [text for item in self.knowledge for text in tower_texts(item, max_triplets, setting)]


@dataclass
class Ranking:
    """One direction of one method, with what a picture needs.

    Attributes:
        queries: Indices of the queries among images or captions, int64 (Q,).
        first: The frozen CLIP's answer.
        scores: New scores of its candidates (Q, k); zeros for queries that `skip_decided` left out.
        ranks: 0-based rank of the best positive after re-ranking (Q,).
        fusion_weight: Of the first stage's score in `ranks`.
        result: The figures.
    """

    queries: torch.Tensor
    first: FirstStage
    scores: torch.Tensor
    ranks: torch.Tensor
    fusion_weight: float
    result: DirectionResult


class Retrieval:
    """Evaluates models that share a base CLIP on one split.

    Every rank holds the first stage and scores its share of the pairs.

    Args:
        captions: Of the split.
        frozen: Stored image features of the split; early tokens are for models.
        text: The frozen caption features (C, d).
        knowledge: Of the captions; None for the base model alone.
        settings: See `RetrievalSettings`.
        device: Where scores are computed.
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
            found = first_stage_in_folds(
                query, gallery, self.positives[direction], settings.top_k, self.fold, settings.first_stage
            )
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
    ) -> "Retrieval":
        """With caption features and knowledge from a store of text features."""
        text = torch.from_numpy(collate.store.lookup(captions.texts))
        return cls(captions, frozen, text, collate(captions.knowledge), settings, device)

    def base(self) -> dict[str, Ranking]:
        """The frozen CLIP alone."""
        return {d: self._ranking(d, first.scores, first.ranks, 0.0, 0.0) for d, first in self.first.items()}

    def base_row(self, name: str = "base CLIP") -> RetrievalRow:
        """The figures of `base`."""
        base = self.base()
        return RetrievalRow(name, base["i2t"].result, base["t2i"].result)

    def rank_text(self, text: torch.Tensor) -> dict[str, Ranking]:
        """Re-ranks with other caption features (C, d) against the frozen CLIP's image features, without any model."""
        features = torch.from_numpy(np.array(self.frozen.base)).to(self.device)
        rankings = {}
        for direction, first in self.first.items():
            start = time.perf_counter()
            scorer = self._feature_scorer(features, direction, text=text)
            mask = self.positives[direction].of(first.candidates)
            scores = score_candidates(first.candidates, scorer, self.settings.batch_size)
            rankings[direction] = self._reranking(direction, scores, mask, time.perf_counter() - start)
        return rankings

    def rank(
        self,
        model,
        autocast=contextlib.nullcontext,
        progress: Callable[[str, int, int], None] | None = None,
        partial: Path | None = None,
        precision: str = "",
    ) -> dict[str, Ranking]:
        """Re-ranks with a model.

        Args:
            model: `ActionAwareCLIP` in eval mode, or an engine around it, on `device`.
            autocast: Makes the context of a forward pass.
            progress: Called as progress(direction, done, total).
            partial: Folder where scores of pairs are kept while this runs, and from which it goes on with what an
                earlier call left, on any number of ranks.
            precision: What `autocast` does; scores of another one are not taken up.

        Returns:
            For a knowledge-aware model ``t2i`` and ``i2t pairwise``/``i2t pooled`` as set, else ``t2i`` and ``i2t``.
        """
        aware = getattr(model, "module", model).knowledge_aware
        if aware:
            pairs = self._pair_scorer(model, autocast)
            text, names = pairs.scored_text, ["t2i", *(f"i2t {mode}" for mode in self.settings.i2t)]
            key = self._content_key(model, precision) if partial is not None else ""
        else:
            features, text = self._over_images(model, autocast), scored_text(model, self._known(), self.text)
            names = ["t2i", "i2t"]
        rankings = {}
        for name in names:
            direction = name[:3]
            start, before = time.perf_counter(), 0.0
            report = None if progress is None else functools.partial(progress, name)
            first, mask = self.first[direction], self.positives[direction].of(self.first[direction].candidates)
            rows = mask.any(dim=1).nonzero().flatten() if self.settings.skip_decided else torch.arange(len(mask))
            candidates, store = first.candidates[rows], None
            if aware and name != "i2t pooled":
                if partial is not None:
                    store = ScoreStore(
                        partial / content_key([key, name, rows, candidates]), candidates.numel(), self.device
                    )
                    before = store.seconds / world_size()
                part = self._score_pairs(pairs, direction, rows, candidates, report, store)
            else:
                if aware:  # the images are the work, what follows is a look-up
                    features, report = self._over_images(model, autocast, rows, report), None
                scorer = self._feature_scorer(features, direction, by_query=aware, text=text, queries=rows)
                part = score_candidates(
                    candidates, scorer, self.settings.batch_size, shard=(rank(), world_size()), progress=report
                )
            scores = torch.zeros_like(first.scores)
            scores[rows] = all_reduce_sum(part.to(self.device)).cpu()
            # Time of the queries left out is counted as that of the others.
            seconds = (before + time.perf_counter() - start) * len(mask) / max(1, len(rows))
            rankings[name] = self._reranking(direction, scores, mask, seconds)
        return rankings

    def methods(self, name: str, rankings: dict[str, Ranking]) -> dict[str, tuple[Ranking, Ranking]]:
        """Image and caption queries of one model by the table's rows: one a way of conditioning image queries and one a
        weight of `fusions` besides."""
        found = {}
        for key, i2t in rankings.items():
            if key.startswith("i2t"):
                plain, *fused = row_names(name, [key], self.settings.fusions)
                found[plain] = i2t, rankings["t2i"]
                for row, weight in zip(fused, self.settings.fusions, strict=True):
                    found[row] = self.fused("i2t", i2t, weight), self.fused("t2i", rankings["t2i"], weight)
        return found

    def fused(self, direction: str, ranking: Ranking, weight: float) -> Ranking:
        """The same scores with another weight of the first stage's score."""
        first, mask = ranking.first, self.positives[direction].of(ranking.first.candidates)
        ranks = rerank(first, ranking.scores, mask, weight)
        result = DirectionResult.measure(ranks, first.ranks, mask, ranking.result.seconds, self._folds(direction))
        return replace(ranking, ranks=ranks, fusion_weight=weight, result=result)

    def rows(self, name: str, rankings: dict[str, Ranking]) -> list[RetrievalRow]:
        """The figures of `methods`."""
        methods = self.methods(name, rankings)
        return [RetrievalRow(row, i2t.result, t2i.result) for row, (i2t, t2i) in methods.items()]

    # -- scoring ----------------------------------------------------------------------------------------------------

    def pair_score(
        self, model, autocast=contextlib.nullcontext
    ) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Scores of any pairs, without a first stage: a function of images (P,) and captions (P,), int64, to (P,).

        A knowledge-aware model conditions each image on its pair's caption; arguments as for `rank`. Needs
        `max_queries` 0.
        """
        if self.settings.max_queries:
            raise ValueError(f"max_queries is {self.settings.max_queries}, expected 0: pairs name any image")
        if getattr(model, "module", model).knowledge_aware:
            pairs = self._pair_scorer(model, autocast)

            def score(images: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
                pairs.prepare(captions)
                return pairs(images, captions)

            return score
        text = scored_text(model, self._known(), self.text)
        return self._feature_scorer(self._over_images(model, autocast), "i2t", text=text)

    def _reranking(self, direction: str, scores: torch.Tensor, mask: torch.Tensor, seconds: float) -> Ranking:
        weight = self.settings.fusion_weight
        return self._ranking(direction, scores, rerank(self.first[direction], scores, mask, weight), weight, seconds)

    def _ranking(
        self, direction: str, scores: torch.Tensor, ranks: torch.Tensor, weight: float, seconds: float
    ) -> Ranking:
        first = self.first[direction]
        mask = self.positives[direction].of(first.candidates)
        seconds += self.first_seconds[direction]
        result = DirectionResult.measure(ranks, first.ranks, mask, seconds, self._folds(direction))
        return Ranking(self.queries[direction], first, scores, ranks, weight, result)

    def _folds(self, direction: str) -> torch.Tensor | None:
        return None if self.settings.folds == 1 else self.fold[self.positives[direction].query_image]

    def _known(self) -> KnowledgeBatch:
        assert self.knowledge is not None, "the base model alone does without knowledge"
        return self.knowledge

    def _pair_scorer(self, model, autocast) -> PairScorer:
        return PairScorer(model, self.frozen.tokens, self._known(), self.text, autocast, self.settings.batch_size)

    def _score_pairs(
        self,
        pairs: PairScorer,
        direction: str,
        rows: torch.Tensor,
        candidates: torch.Tensor,
        progress,
        store: ScoreStore | None,
    ) -> torch.Tensor:
        """Scores of candidates (Q', k) of the queries `rows`; 0 for pairs of other ranks."""
        queries = self.queries[direction][rows]
        to_text = direction == "i2t"
        captions = pairs.captions_a_block()
        return score_candidates(
            candidates,
            lambda q, c: pairs(queries[q], c) if to_text else pairs(c, queries[q]),
            self.settings.batch_size,
            group_by="query" if to_text else "candidate",
            shard=(rank(), world_size()),
            progress=progress,
            prepare=lambda q, c: pairs.prepare(c if to_text else queries[q]),
            block_pairs=captions if to_text else captions * candidates.shape[1],
            store=store,
        )

    def _content_key(self, model, precision: str) -> str:
        """Name for all that scores of pairs depend on, but for the pairs."""
        state = getattr(model, "module", model).adapter_state()
        knowledge, images = vars(self._known()).values(), (self.frozen.base, self.frozen.tokens[0])
        # A row of tokens tells a grey image from photos; base features tell these apart.
        return content_key([repr(model.config), precision, *state, *state.values(), *knowledge, self.text, *images])

    def _feature_scorer(
        self,
        features: torch.Tensor,
        direction: str,
        by_query: bool = False,
        text=None,
        queries: torch.Tensor | None = None,
    ):
        """Scores from one feature an image (I, d), or with `by_query` one an image query (Q, d). `queries`: rows of the
        queries that are asked about, by the numbers that they are asked under; None for all."""
        features = F.normalize(features.float(), dim=-1)
        text = F.normalize((self.text if text is None else text).float(), dim=-1)

        def score(query: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
            query = query if queries is None else queries[query]
            item = self.queries[direction][query]
            image, caption = (item, candidate) if direction == "i2t" else (candidate, item)
            rows = query if by_query else image
            return (features[rows.to(self.device)] * text[caption.to(self.device)]).sum(-1).cpu()

        return score

    def _over_images(self, model, autocast, rows: torch.Tensor | None = None, progress=None) -> torch.Tensor:
        """One feature an image, split over ranks: without knowledge of all images (I, d), or with `rows` of those image
        queries, each conditioned on the union of its candidates' knowledge (Q, d)."""
        pooled = rows is not None
        if rows is None:
            rows = torch.arange(self.captions.images)
        total = len(self.queries["i2t"]) if pooled else len(rows)
        features = torch.zeros(total, self.text.shape[1], device=self.device)
        size = max(1, self.settings.batch_size // (self.settings.top_k if pooled else 1))
        start, stop = shard_bounds(len(rows), rank(), world_size())
        for low in range(start, stop, size):
            part = rows[low : min(low + size, stop)]
            with torch.no_grad(), autocast():
                if pooled:
                    candidates = self.first["i2t"].candidates[part]
                    knowledge = self._known()[candidates.flatten()].to(self.device)
                    early = early_tokens(self.frozen.tokens, self.queries["i2t"][part], self.device)
                    text = self.text[candidates.flatten().to(self.device)]
                    out = model(early, knowledge, captions_a_pair=candidates.shape[1], text=text).conditioned
                else:
                    out = model(early_tokens(self.frozen.tokens, part, self.device), prompted=True).prompted
            features[part.to(self.device)] = out.float()
            if progress is not None:
                progress(low + len(part) - start, stop - start)
        return all_reduce_sum(features)


def row_names(name: str, i2t: Sequence[str], fusions: Sequence[float]) -> list[str]:
    """The rows that a method's rankings make, such as "ours (pairwise)" and "ours (pairwise), fusion 0.5".

    Args:
        name: Of the method.
        i2t: Its rankings of image queries: ``i2t``, or ``i2t pairwise`` and ``i2t pooled``.
        fusions: Of the settings.
    """
    plain = [name if key == "i2t" else f"{name} ({key[4:]})" for key in i2t]
    return [row for one in plain for row in (one, *(f"{one}, fusion {weight:g}" for weight in fusions))]


def spaced(total: int, count: int) -> torch.Tensor:
    """`count` indices below `total`, evenly spaced, int64; all of them for 0 or where there are fewer."""
    if count <= 0 or count >= total:
        return torch.arange(total)
    return torch.arange(count) * total // count
