"""Searches a folder of photos: the frozen CLIP pre-selects, the action-aware model re-ranks (paper, sec. 3.5)."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from amp.data.images.formats import UnreadableImageError
from amp.data.text_features import cut_texts
from amp.errors import AmpError
from amp.knowledge.schema import Knowledge
from amp.search.image_states import StateType
from amp.search.index import MAKE_AGAIN, PhotoIndex
from amp.search.reranker import Reranker
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


@dataclass(frozen=True)
class Selected:
    """Photos that the first stage of a search selected.

    Attributes:
        query, knowledge, skipped: See `Found`.
        count: Number of photos to return.
        fusion_weight: Weight of the first stage's score.
        images: The photos to re-rank, as states or decoded.
        present: Path and first score of the photos, those of `images` first.
    """

    query: str
    knowledge: Knowledge
    count: int
    fusion_weight: float
    images: list[Any]
    present: list[tuple[Path, float]]
    skipped: dict[Path, str]

    def found(self, new: torch.Tensor) -> Found:
        """The result for the new scores of `images`."""
        first = torch.tensor([score for _, score in self.present[: len(new)]])
        fused = new + self.fusion_weight * first if self.fusion_weight else new
        order = fused.sort(descending=True, stable=True)
        ranked = list(zip(order.indices.tolist(), order.values.tolist(), strict=True))
        ranked += [(place, self.present[place][1]) for place in range(len(new), len(self.present))]
        hits = [Hit(self.present[place][0], score, self.present[place][1], place) for place, score in ranked]
        return Found(self.query, self.knowledge, hits[: self.count], self.skipped)


class Retriever:
    """Finds photos of a folder by text.

    The index contains the frozen CLIP's feature of each photo, which pre-selects `top_k` photos, and usually the
    photos' states, from which they are re-ranked. Photos without a state are decoded and encoded for each search.

    Args:
        reranker: Re-ranks the selected photos.
        index: Folder of an index made with this model; `update` makes it.
        top_k: Number of photos that are re-ranked (paper: 20); 0 keeps the frozen CLIP's order.
        fusion_weight: Weight of the frozen CLIP's cosine, which is added to the new score.
    """

    def __init__(self, reranker: Reranker, index: str | os.PathLike, top_k: int = 20, fusion_weight: float = 0.0):
        if top_k < 0:
            raise AmpError(f"top_k is {top_k}, expected at least 0")
        self.reranker, self.folder, self.top_k, self.fusion_weight = reranker, Path(index), top_k, fusion_weight
        self._index: PhotoIndex | None = None
        self._lengths = np.empty(0, dtype=np.float32)

    @classmethod
    def from_adapter(
        cls,
        adapter: str | os.PathLike,
        index: str | os.PathLike,
        top_k: int = 20,
        fusion_weight: float = 0.0,
        **settings,
    ) -> "Retriever":
        """Loads an adapter, which records its base model and transform.

        Args:
            adapter: Adapter; see `amp.from_pretrained`.
            index: Folder of the index.
            top_k, fusion_weight: See the class.
            **settings: Further arguments of `Reranker.from_pretrained`.
        """
        return cls(Reranker.from_pretrained(adapter, **settings), index, top_k, fusion_weight)

    @property
    def index(self) -> PhotoIndex:
        """The index.

        Raises:
            AmpError: There is no index, or it belongs to another model.
        """
        if self._index is None:
            index = PhotoIndex(self.folder)
            seen = (index.base_hash, index.transform)
            if seen != (self.reranker.model.backbone.weights_hash(), repr(self.reranker.preprocess)):
                raise AmpError(
                    f"{self.folder}: was made by a model with weights {index.base_hash[:12]} or with another image "
                    "transform, expected this model's; make a separate index for this model"
                )
            self._index = index
            lengths = np.concatenate([np.linalg.norm(rows, axis=1) for rows in _blocks(index)])
            self._lengths = np.maximum(lengths, 1e-12)
        return self._index

    @property
    def stores_states(self) -> bool:
        """Whether the index has states of this adapter, so that no photo is decoded for a search."""
        states = self.index.states
        return states is not None and states.key == self.reranker.packer.key

    def update(
        self,
        photos: str | os.PathLike,
        workers: int = 4,
        progress: Callable[[int, int], None] | None = None,
        states: StateType | None = "int8",
    ) -> Update:
        """Makes the index of a folder of photos or brings it up to date; see `update_index`."""
        found = update_index(self.folder, photos, self.reranker, states, workers, progress)
        self._index = None
        return found

    def cuts(self, query: str) -> bool:
        """Whether the model's tokenizer truncates a query; False if that can't be determined."""
        model = self.reranker.model
        with suppress(AmpError):
            return bool(cut_texts([query], model.tokenizer, model.backbone.context_length))
        return False

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
        (found,) = self.rank([self.select(query, count=count, knowledge=knowledge)])
        return found

    def search_by_image(
        self, image: Any, query: str = "", count: int = 20, knowledge: Knowledge | None = None
    ) -> Found:
        """Finds the photos that are most similar to an image in the frozen CLIP, and re-ranks them by a text.

        Args:
            image: The image, in any form of `Reranker`.
            query: The text. Without it, there is no knowledge that photos could be conditioned on, so they keep the
                frozen CLIP's order.
            count, knowledge: See `search`.

        Returns:
            The photos found; their `base_score` is the cosine similarity to the image.

        Raises:
            AmpError: The image can't be read, or as for `search`.
        """
        (found,) = self.rank([self.select(query, image, count, knowledge)])
        return found

    @torch.no_grad()
    def select(
        self,
        query: str,
        image: Any = None,
        count: int = 20,
        knowledge: Knowledge | None = None,
        top_k: int | None = None,
        fusion_weight: float | None = None,
    ) -> Selected:
        """The first part of a search, without re-ranking.

        Args:
            query, count, knowledge: See `search`.
            image: See `search_by_image`; None selects by the query.
            top_k, fusion_weight: Settings of this search; None takes those of the retriever.
        """
        if count < 1:
            raise AmpError(f"count is {count}, expected at least 1")
        top_k = self.top_k if top_k is None else top_k
        top_k = top_k if query.strip() else 0
        model = self.reranker.model
        if image is None:
            feature = model.backbone.encode_text(model.tokenizer([query]).to(self.reranker.device))
        else:
            feature = self.reranker.encode_images([image]).base
        images: list[Any] = []
        present: list[tuple[Path, float]] = []  # in the frozen CLIP's order, without photos that are gone
        skipped: dict[Path, str] = {}
        index, key = self.index, self.reranker.packer.key if top_k else ""
        scores = self._base_scores(feature)
        for number in np.argsort(-scores, kind="stable").tolist():
            try:
                index.check_there(number)
                if len(present) < top_k:
                    state = index.state(number, key)
                    if state is not None:
                        self.reranker.packer.check(state)
                    images.append(index.image(number) if state is None else state)
                present.append((index.path(number), float(scores[number])))
            except UnreadableImageError as error:  # the next one takes its place
                skipped[index.path(number)] = str(error)
            if len(present) == max(count, top_k):
                break
        if not present:
            raise AmpError(
                f"{index.root}: holds none of the {len(index):,} photos of the index {self.folder}, expected all of "
                "them; if they were moved, add --photos FOLDER; moved photos are not encoded again"
            )
        if knowledge is None:
            (knowledge,) = self.reranker.knowledge_of([query]) if images else (Knowledge(),)
        weight = self.fusion_weight if fusion_weight is None else fusion_weight
        return Selected(query, knowledge, count, weight, images, present, skipped)

    def rank(self, searches: Sequence[Selected]) -> list[Found]:
        """Re-ranks the photos of several searches in one batch, which takes less time than one after another.

        Raises:
            AmpError: A score is not finite.
        """
        pairs = [(search.query, image) for search in searches for image in search.images]
        knowledge = [search.knowledge for search in searches for _ in search.images]
        scores = torch.from_numpy(self.reranker.predict(pairs, knowledge)).split([len(x.images) for x in searches])
        return [search.found(new) for search, new in zip(searches, scores, strict=True)]

    def _base_scores(self, feature: torch.Tensor) -> np.ndarray:
        """Cosine (N,) of every photo and a feature (1, d), in one pass over the memory-mapped features."""
        index, query = self.index, F.normalize(feature[0].float(), dim=-1).cpu().numpy()
        scores = np.concatenate([rows @ query for rows in _blocks(index)]) / self._lengths
        if not np.isfinite(scores).all():
            raise AmpError(
                f"{index.file}: {int((~np.isfinite(scores)).sum()):,} scores are not finite, expected none; "
                f"{MAKE_AGAIN}"
            )
        return scores


def _blocks(index: PhotoIndex) -> Iterator[np.ndarray]:
    """Rows of the features, in blocks that fit into memory."""
    for low in range(0, len(index), 65_536):
        yield index.features[low : low + 65_536]
