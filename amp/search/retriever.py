"""Searches a folder of photos: the frozen CLIP pre-selects, the action-aware model re-ranks (paper, sec. 3.5)."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from amp.data.images.formats import UnreadableImageError
from amp.data.text_features import cut_texts
from amp.errors import AmpError
from amp.knowledge.schema import Knowledge
from amp.model.clip import ActionAwareCLIP
from amp.model.pretrained import from_pretrained
from amp.retrieval.scorer import PairScorer
from amp.search.index import MAKE_AGAIN, PhotoIndex
from amp.search.update import Update, update_index


@dataclass(frozen=True)
class Hit:
    """A photo found by a search.

    Attributes:
        path: Path of the photo.
        score: Score by which the photo was ranked.
        base_score: Cosine similarity to the query in the frozen CLIP.
        base_rank: 0-based rank in the frozen CLIP's order, among the photos that still exist.
    """

    path: Path
    score: float
    base_score: float
    base_rank: int


@dataclass(frozen=True)
class Found:
    """Result of a search.

    Attributes:
        query: Text of the query.
        knowledge: Knowledge that photos were conditioned on; empty for models that use none.
        hits: Photos found, best first.
        skipped: Reason for each photo that would have been a candidate but is gone or can't be read.
    """

    query: str
    knowledge: Knowledge
    hits: list[Hit]
    skipped: dict[Path, str]


class Retriever:
    """Finds photos of a folder by text.

    The index contains only the frozen CLIP's feature of each photo. Each search decodes the `top_k` photos that these
    features pre-select, and encodes them conditioned on the query's knowledge.

    Args:
        model: Model on its device; it is put into eval mode.
        preprocess: The validation transform.
        index: Folder of this model's index; `update` makes it.
        knowledge: Function that maps captions to their knowledge, such as
            `amp.generation.query.KnowledgeGenerator()`; None searches without knowledge.
        top_k: Number of photos that are re-ranked (paper: 20); 0 keeps the frozen CLIP's order.
        fusion_weight: Weight of the frozen CLIP's cosine, which is added to the new score.
        batch_size: Photos per forward pass.
    """

    def __init__(
        self,
        model: ActionAwareCLIP,
        preprocess,
        index: str | os.PathLike,
        knowledge: Callable[[Sequence[str]], list[Knowledge]] | None = None,
        top_k: int = 20,
        fusion_weight: float = 0.0,
        batch_size: int = 32,
    ):
        if top_k < 0 or batch_size < 1:
            raise AmpError(f"top_k is {top_k}, batch_size {batch_size}, expected at least 0 and 1")
        self.model, self.preprocess, self.folder = model.eval(), preprocess, Path(index)
        self.knowledge, self.top_k, self.fusion_weight, self.batch_size = knowledge, top_k, fusion_weight, batch_size
        self._index: PhotoIndex | None = None

    @classmethod
    def from_adapter(
        cls,
        adapter: str | os.PathLike,
        index: str | os.PathLike,
        model_name: str | None = None,
        pretrained: str | None = None,
        device: str | torch.device = "cpu",
        **settings,
    ) -> "Retriever":
        """Builds the model from an adapter, which records its base model and transform.

        Args:
            adapter: Adapter; see `amp.from_pretrained`.
            index: Folder of the index.
            model_name, pretrained: Name and weights of the base model on this machine; None uses those in the adapter.
            device: Device of the model.
            **settings: Further arguments of the class.
        """
        model, _, preprocess = from_pretrained(adapter, model_name, pretrained, device)
        return cls(model, preprocess, index, **settings)

    @property
    def index(self) -> PhotoIndex:
        """The index.

        Raises:
            AmpError: There is no index, or it belongs to another model.
        """
        if self._index is None:
            index = PhotoIndex(self.folder)
            seen = (index.base_hash, index.transform)
            if seen != (self.model.backbone.weights_hash(), repr(self.preprocess)):
                raise AmpError(
                    f"{self.folder}: was made by a model with weights {index.base_hash[:12]} or with another image "
                    "transform, expected this model's; make a separate index for this model"
                )
            self._index = index
        return self._index

    def update(self, photos: str | os.PathLike, workers: int = 4, progress=None) -> Update:
        """Makes the index of a folder of photos or brings it up to date; see `update_index`."""
        found = update_index(self.folder, photos, self.model, self.preprocess, self.batch_size, workers, progress)
        self._index = None
        return found

    def cuts(self, query: str) -> bool:
        """Whether the model's tokenizer truncates a query; False if that can't be determined."""
        with suppress(AmpError):
            return bool(cut_texts([query], self.model.tokenizer, self.model.backbone.context_length))
        return False

    @torch.no_grad()
    def search(self, query: str, count: int = 20, knowledge: Knowledge | None = None) -> Found:
        """Finds the best photos for a text.

        Args:
            query: A caption, such as "a dog jumps over a hurdle".
            count: Number of photos to return. The re-ranked photos are followed by others in the frozen CLIP's order.
            knowledge: Knowledge of the query; None generates it.

        Raises:
            AmpError: The query is empty, there is no index, none of its photos is left, or a score is not finite.
        """
        if not query.strip():
            raise AmpError("the query is empty, expected text")
        if count < 1:
            raise AmpError(f"count is {count}, expected at least 1")
        index, model = self.index, self.model
        text = model.encode_text(model.tokenizer([query]).to(model.logit_scale.device))
        images: list[torch.Tensor] = []
        present: list[tuple[Path, float]] = []  # in the frozen CLIP's order, without photos that are gone
        skipped: dict[Path, str] = {}
        scores, numbers = _scores(index, text).sort(descending=True, stable=True)
        for score, number in zip(scores.tolist(), numbers.tolist(), strict=True):
            try:
                if len(present) < self.top_k:
                    images.append(self.preprocess(index.image(number)))
                else:
                    index.check_there(number)
                present.append((index.path(number), score))
            except UnreadableImageError as error:  # the next one takes its place
                skipped[index.path(number)] = str(error)
            if len(present) == max(count, self.top_k):
                break
        if not present:
            raise AmpError(
                f"{index.root}: holds none of the {len(index):,} photos of the index {self.folder}, expected all of "
                "them; if they were moved, add --photos FOLDER; moved photos are not encoded again"
            )
        knowledge = self._knowledge_of(query, knowledge)
        first = torch.tensor([score for _, score in present[: len(images)]])
        new = self._new_scores(images, text, knowledge) + self.fusion_weight * first
        order = new.sort(descending=True, stable=True)
        ranked = list(zip(order.indices.tolist(), order.values.tolist(), strict=True))
        ranked += [(place, present[place][1]) for place in range(len(images), len(present))]
        hits = [Hit(present[place][0], score, present[place][1], place) for place, score in ranked[:count]]
        return Found(query, knowledge, hits, skipped)

    def _knowledge_of(self, query: str, knowledge: Knowledge | None) -> Knowledge:
        config = self.model.config
        if knowledge is not None:
            return knowledge
        if self.knowledge is None or not (config.reads_triplets or config.reads_states):
            return Knowledge()
        return self.knowledge([query])[0]

    def _new_scores(self, images: list[torch.Tensor], text: torch.Tensor, knowledge: Knowledge) -> torch.Tensor:
        """Scores (k,) of preprocessed photos conditioned on the query's knowledge, on the CPU."""
        if not images:
            return torch.empty(0)
        model = self.model
        early = torch.cat([model.tower.early(x.to(text.device)) for x in torch.stack(images).split(self.batch_size)])
        scorer = PairScorer(model, early, model.prepare_knowledge([knowledge]), text)
        numbers = torch.arange(len(images)).split(self.batch_size)
        return torch.cat([scorer(part, torch.zeros_like(part)) for part in numbers]).cpu()


def _scores(index: PhotoIndex, text: torch.Tensor) -> torch.Tensor:
    """Cosine similarity (N,) of every photo to the query, in one pass over the memory-mapped features."""
    text, parts = F.normalize(text.float().cpu(), dim=-1), []
    for low in range(0, len(index), 65_536):
        features = torch.from_numpy(index.features[low : low + 65_536].copy())
        parts.append((F.normalize(features, dim=-1) @ text.T)[:, 0])
    scores = torch.cat(parts)
    if not torch.isfinite(scores).all():
        raise AmpError(
            f"{index.file}: {int((~torch.isfinite(scores)).sum()):,} scores are not finite, expected none; {MAKE_AGAIN}"
        )
    return scores
