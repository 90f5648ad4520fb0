"""What the server computes with the model. All methods run in one thread, see `amp.serve.model_thread`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from amp.data.images.formats import UnreadableImageError
from amp.data.images.inputs import read_rgb
from amp.knowledge.schema import Knowledge
from amp.knowledge.text import select
from amp.report.attention import attention_maps
from amp.search.index import PhotoIndex
from amp.search.reranker import Ranking, Reranker
from amp.search.retriever import Found, Retriever, Selected
from amp.serve.refusal import Refusal


@dataclass(frozen=True)
class Search:
    """One search of the index.

    Attributes:
        query: Text of the query; may be empty if there is an image.
        image: Photo that similar ones are searched for, as a path or as the content of a file; None searches by text.
        count: Number of photos to return.
        top_k: Number of photos to re-rank.
        fusion_weight: Weight of the first stage's score.
        knowledge: Knowledge of the query; None generates it.
    """

    query: str
    image: Path | bytes | None
    count: int
    top_k: int
    fusion_weight: float
    knowledge: Knowledge | None


class Service:
    """Ranks images and texts, searches the index, and computes attention maps.

    Args:
        reranker: The model.
        retriever: Search in the index with this re-ranker; None without an index.
    """

    def __init__(self, reranker: Reranker, retriever: Retriever | None):
        self.reranker, self.retriever = reranker, retriever

    @property
    def index(self) -> PhotoIndex:
        """The index.

        Raises:
            Refusal: The server has none.
        """
        if self.retriever is None:
            raise no_index()
        return self.retriever.index

    def rank_images(self, query: str, images: Sequence[Path | bytes], knowledge: Knowledge | None) -> Ranking:
        """Ranks images for a text; see `amp.Reranker.rank`."""
        return self.reranker.rank(query, list(images), knowledge=knowledge)

    def rank_texts(self, image: Path | bytes, texts: Sequence[str]) -> Ranking:
        """Ranks texts for an image; see `amp.Reranker.rank_texts`."""
        return self.reranker.rank_texts(decoded(image), list(texts))

    def search_all(self, asked: Sequence[Search]) -> list[tuple[Found, bool] | Exception]:
        """Searches the index for several requests; see `amp.Retriever`.

        Returns:
            The photos found, and whether the query is longer than the model reads; or the error of a request.
        """
        if self.retriever is None:
            raise no_index()
        outcomes: dict[int, Exception] = {}
        selected: dict[int, Selected] = {}
        for number, one in enumerate(asked):
            try:
                image = None if one.image is None else decoded(one.image)
                selected[number] = self.retriever.select(
                    one.query, image, one.count, one.knowledge, one.top_k, one.fusion_weight
                )
            except Exception as error:  # the other requests are answered
                outcomes[number] = error
        found = dict(zip(selected, self.retriever.rank(list(selected.values())), strict=True))
        return [
            outcomes[n] if n in outcomes else (found[n], bool(one.query) and self.retriever.cuts(one.query))
            for n, one in enumerate(asked)
        ]

    @torch.no_grad()
    def attention(self, photo: int, knowledge: Knowledge) -> list[dict]:
        """Attention maps of a photo, one entry per triplet that the model reads.

        Returns:
            `triplet`, `state`, and `maps`: rows of the map by the name of what attends, `triplet` or `state`.

        Raises:
            Refusal: There is no such photo, or it can't be read.
        """
        model = self.reranker.model
        try:
            image = self.index.image(number_in(self.index, photo))
        except UnreadableImageError as error:
            raise Refusal(410, f"photo {photo} is {error}") from None
        if not model.interaction.conditioned:
            return []
        early = model.tower.early(self.reranker.preprocess(image)[None].to(model.logit_scale.device))
        maps = attention_maps(model, early, model.prepare_knowledge([knowledge]))
        return [
            {
                "triplet": triplet,
                "state": state,
                "maps": {name: x[number].tolist() for name, x in maps.items()},
            }
            for number, (triplet, state) in enumerate(select(knowledge, model.config.max_triplets))
        ]


def no_index() -> Refusal:
    """The error of a server that only re-ranks."""
    return Refusal(404, "this server has no index of photos; start it with --index FOLDER")


def number_in(index: PhotoIndex, number: int) -> int:
    """Checks the number of a photo.

    Raises:
        Refusal: There is no such photo.
    """
    if not 0 <= number < len(index):
        raise Refusal(404, f"photo {number} doesn't exist, expected 0 to {len(index) - 1}")
    return number


def decoded(image: Path | bytes) -> Image.Image:
    """Decodes an image.

    Raises:
        Refusal: It can't be read.
    """
    try:
        return read_rgb(image)
    except UnreadableImageError as error:
        raise Refusal(400, f"the image {error}") from None
