"""Retrieval: the frozen CLIP pre-selects, the action-aware model re-ranks, in both directions (paper, sec. 3.5)."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from amp.data.frozen_features import FrozenFeatures
from amp.data.split import ShardSplit
from amp.data.stream import KnowledgeCollator
from amp.distributed import all_reduce_sum, rank, world_size
from amp.errors import AmpError
from amp.knowledge.batch import KnowledgeBatch
from amp.knowledge.schema import Knowledge
from amp.knowledge.text import tower_texts
from amp.retrieval.first_stage import FirstStage, Positives, first_stage
from amp.retrieval.rerank import rerank, score_candidates, shard_bounds
from amp.retrieval.results import DirectionResult, RetrievalRow
from amp.train.losses import pair_similarity

ENRICH_ROWS = 65_536


@dataclass
class RetrievalSettings:
    """How a split is searched.

    Args:
        top_k: Candidates that the frozen CLIP pre-selects (paper: 20).
        i2t: How image queries are conditioned: ``pairwise`` on each candidate's knowledge, ``pooled`` on the union of
            all candidates' knowledge; the paper's text fits pooled.
        fusion_weight: Weight of the first stage's score beside the new one (paper: 0).
        batch_size: Pairs a forward pass.
        captions_per_image: Keep only the first n captions of an image; 0 keeps all (COCO 5K: 25,010).
        max_queries: Search for this many queries a direction, evenly spaced, in the whole gallery; 0 for all.
        skip_decided: Score only queries with an answer among their candidates. The others keep their first-stage rank
            whatever they score, so the recalls are the same for a fraction of the work.
    """

    top_k: int = 20
    i2t: list[Literal["pairwise", "pooled"]] = field(default_factory=lambda: ["pairwise", "pooled"])
    fusion_weight: float = 0.0
    batch_size: int = 128
    captions_per_image: int = 0
    max_queries: int = 0
    skip_decided: bool = False

    def __post_init__(self):
        least = {"top_k": 1, "batch_size": 1, "captions_per_image": 0, "max_queries": 0}
        for key, low in least.items():
            if getattr(self, key) < low:
                raise AmpError(f"search setting {key} is {getattr(self, key)}, expected an integer of at least {low}")
        if not self.i2t:
            raise AmpError("search setting i2t is [], expected pairwise, pooled or both")


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
        result: The figures.
    """

    queries: torch.Tensor
    first: FirstStage
    scores: torch.Tensor
    ranks: torch.Tensor
    result: DirectionResult


class Retrieval:
    """Evaluates models that share a base CLIP on one split.

    Every rank holds the first stage and scores its share of the pairs.

    Args:
        captions: Of the split.
        frozen: Stored image features of the split.
        collate: Turns knowledge into tensors; its store also holds the caption features.
        settings: See `RetrievalSettings`.
        device: Where scores are computed.
    """

    def __init__(self, captions: SplitCaptions, frozen: FrozenFeatures, collate: KnowledgeCollator,
                 settings: RetrievalSettings, device: torch.device):  # fmt: skip
        self.captions, self.frozen, self.settings, self.device = captions, frozen, settings, device
        self.text = torch.from_numpy(collate.store.lookup(captions.texts)).to(device)
        self.knowledge: KnowledgeBatch = collate(captions.knowledge)
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
        self.first, self.first_seconds = {}, {}
        for direction, (query, gallery) in {"i2t": (base, self.text), "t2i": (self.text, base)}.items():
            start = time.perf_counter()
            query = query[self.queries[direction].to(device)]
            found = first_stage(query, gallery, self.positives[direction], settings.top_k)
            self.first[direction] = FirstStage(*(x.cpu() for x in (found.candidates, found.scores, found.ranks)))
            self.first_seconds[direction] = time.perf_counter() - start

    def base_row(self, name: str = "base CLIP") -> RetrievalRow:
        """The frozen CLIP alone."""
        return RetrievalRow(name, *(self._result(d, self.first[d].ranks, 0.0) for d in ("i2t", "t2i")))

    def rank_text(self, text: torch.Tensor) -> dict[str, Ranking]:
        """Re-ranks with other caption features (C, d) against the frozen CLIP's image features, without any model."""
        features = torch.from_numpy(np.array(self.frozen.base)).to(self.device)
        rankings = {}
        for direction, first in self.first.items():
            start = time.perf_counter()
            scorer = self._feature_scorer(features, direction, text=text)
            mask = self.positives[direction].of(first.candidates)
            scores = score_candidates(first.candidates, scorer, self.settings.batch_size)
            ranks = rerank(first, scores, mask, self.settings.fusion_weight)
            result = self._result(direction, ranks, time.perf_counter() - start)
            rankings[direction] = Ranking(self.queries[direction], first, scores, ranks, result)
        return rankings

    def rank(self, model, autocast=contextlib.nullcontext, progress: Callable[[str, int, int], None] | None = None,
             ) -> dict[str, Ranking]:  # fmt: skip
        """Re-ranks with a model.

        Args:
            model: `ActionAwareCLIP` in eval mode, or an engine around it, on `device`.
            autocast: Makes the context of a forward pass.
            progress: Called as progress(direction, done, total).

        Returns:
            For a knowledge-aware model ``t2i`` and ``i2t pairwise``/``i2t pooled`` as set, else ``t2i`` and ``i2t``.
        """
        aware = getattr(model, "module", model).knowledge_aware
        text = self._enriched(model)
        if not aware:
            features = self._over_images(model, autocast)
            scorers = {d: self._feature_scorer(features, d, text=text) for d in ("t2i", "i2t")}
        else:
            scorers = {"t2i": self._pair_scorer(model, text, autocast, "t2i")}
            for mode in self.settings.i2t:
                pair = self._pair_scorer(model, text, autocast, "i2t")
                scorers[f"i2t {mode}"] = pair if mode == "pairwise" else None
        rankings = {}
        for name, scorer in scorers.items():
            direction = name[:3]
            start = time.perf_counter()
            report = None if progress is None else (lambda done, total, name=name: progress(name, done, total))
            first, mask = self.first[direction], self.positives[direction].of(self.first[direction].candidates)
            rows = mask.any(dim=1).nonzero().flatten() if self.settings.skip_decided else torch.arange(len(mask))
            if scorer is None:
                features = self._over_images(model, autocast, rows, report)
                scorer = self._feature_scorer(features, "i2t", by_query=True, text=text)
                report = None
            part = score_candidates(
                first.candidates[rows],
                lambda query, candidate, scorer=scorer, rows=rows: scorer(rows[query], candidate),
                self.settings.batch_size,
                group_by="query" if direction == "i2t" else "candidate",
                shard=(rank(), world_size()),
                progress=report,
            )
            scores = torch.zeros_like(first.scores)
            scores[rows] = all_reduce_sum(part.to(self.device)).cpu()
            ranks = rerank(first, scores, mask, self.settings.fusion_weight)
            # Time of the queries left out is counted as that of the others.
            seconds = (time.perf_counter() - start) * len(mask) / max(1, len(rows))
            result = self._result(direction, ranks, seconds)
            rankings[name] = Ranking(self.queries[direction], first, scores, ranks, result)
        return rankings

    def rows(self, name: str, rankings: dict[str, Ranking]) -> list[RetrievalRow]:
        """The table's rows of one model: one a way of conditioning image queries."""
        t2i = rankings["t2i"].result
        return [
            RetrievalRow(f"{name} ({key[4:]})" if key != "i2t" else name, ranking.result, t2i)
            for key, ranking in rankings.items()
            if key.startswith("i2t")
        ]

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
        text = self._enriched(model)
        if getattr(model, "module", model).knowledge_aware:
            return self._pair_scorer(model, text, autocast, "i2t")
        return self._feature_scorer(self._over_images(model, autocast), "i2t", text=text)

    def _result(self, direction: str, ranks: torch.Tensor, seconds: float) -> DirectionResult:
        first = self.first[direction]
        mask = self.positives[direction].of(first.candidates)
        return DirectionResult.measure(ranks, first.ranks, mask, self.first_seconds[direction] + seconds)

    def _early(self, images: torch.Tensor) -> torch.Tensor:
        # Memory-mapped rows are read in order and copied once.
        return torch.from_numpy(np.asarray(self.frozen.early[images.numpy()], dtype=np.float32)).to(self.device)

    def _enriched(self, model) -> torch.Tensor:
        """What images are scored against: the caption features, enriched where the model does that (C, d)."""
        rows = range(0, len(self.text), ENRICH_ROWS)
        knowledge = (self.knowledge[low : low + ENRICH_ROWS].to(self.device) for low in rows)
        with torch.no_grad():
            parts = [
                model(None, k, text=self.text[low : low + ENRICH_ROWS]).text
                for low, k in zip(rows, knowledge, strict=True)
            ]
        return torch.cat(parts)

    def _pair_scorer(self, model, text: torch.Tensor, autocast, direction: str):
        def score(query: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
            query = self.queries[direction][query]
            image, caption = (query, candidate) if direction == "i2t" else (candidate, query)
            images, image_index = image.unique(return_inverse=True)
            captions, caption_index = caption.unique(return_inverse=True)
            with torch.no_grad(), autocast():
                features = model(
                    self._early(images), self.knowledge[captions].to(self.device),
                    image_index.to(self.device), caption_index.to(self.device),
                    text=self.text[captions.to(self.device)],
                ).conditioned  # fmt: skip
            return pair_similarity(features, text[caption.to(self.device)]).cpu()

        return score

    def _feature_scorer(self, features: torch.Tensor, direction: str, by_query: bool = False, text=None):
        """Scores from one feature an image (I, d), or with `by_query` one an image query (Q, d)."""
        features = F.normalize(features.float(), dim=-1)
        text = F.normalize((self.text if text is None else text).float(), dim=-1)

        def score(query: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
            item = self.queries[direction][query]
            image, caption = (item, candidate) if direction == "i2t" else (candidate, item)
            rows = query if by_query else image
            return (features[rows.to(self.device)] * text[caption.to(self.device)]).sum(-1).cpu()

        return score

    def _over_images(self, model, autocast, rows: torch.Tensor | None = None, progress=None) -> torch.Tensor:
        """One feature an image, split over ranks: without knowledge of all images (I, d), or with `rows` of those image
        queries, each conditioned on the union of its candidates' knowledge (Q, d)."""
        pooled = rows is not None
        if not pooled:
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
                    knowledge = self.knowledge[candidates.flatten()].to(self.device)
                    early = self._early(self.queries["i2t"][part])
                    text = self.text[candidates.flatten().to(self.device)]
                    out = model(early, knowledge, captions_a_pair=candidates.shape[1], text=text).conditioned
                else:
                    out = model(self._early(part), prompted=True).prompted
            features[part.to(self.device)] = out.float()
            if progress is not None:
                progress(low + len(part) - start, stop - start)
        return all_reduce_sum(features)


def spaced(total: int, count: int) -> torch.Tensor:
    """`count` indices below `total`, evenly spaced, int64; all of them for 0 or where there are fewer."""
    if count <= 0 or count >= total:
        return torch.arange(total)
    return torch.arange(count) * total // count
