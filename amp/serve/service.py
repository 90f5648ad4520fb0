"""What the server computes with the model. All methods run in one thread, see `amp.serve.model_thread`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from amp.data.images.decode import decode_rgb
from amp.data.images.file import read_limited
from amp.data.images.formats import UnreadableImageError
from amp.knowledge.schema import Knowledge
from amp.knowledge.text import select
from amp.report.attention import attention_maps
from amp.search.index import PhotoIndex
from amp.search.retriever import Found, Retriever
from amp.serve.refusal import Refusal
from amp.serve.similar import search_by_image


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
        reranker: An `amp.Reranker`.
        retriever: Search in the index with this re-ranker; None without an index.
    """

    def __init__(self, reranker, retriever: Retriever | None):
        self.reranker, self.retriever = reranker, retriever

    @property
    def index(self) -> PhotoIndex:
        """The index.

        Raises:
            Refusal: The server has none.
        """
        if self.retriever is None:
            raise Refusal(404, "this server has no index of photos; start it with --index FOLDER")
        return self.retriever.index

    def rank_images(self, query: str, images: Sequence[Path | bytes], knowledge: Knowledge | None):
        """Ranks images for a text; see `amp.Reranker.rank`."""
        return self.reranker.rank(query, list(images), knowledge=knowledge)

    def rank_texts(self, image: Path | bytes, texts: Sequence[str], knowledge: Knowledge | None):
        """Ranks texts for an image; see `amp.Reranker.rank_texts`."""
        return self.reranker.rank_texts(decoded(image), list(texts), knowledge=knowledge)

    def search(self, asked: Search) -> tuple[Found, bool]:
        """Searches the index by a text, by an image, or by both.

        With an image, the first stage is its similarity to the photos in the frozen CLIP. A text then re-ranks the
        first photos by the knowledge of the text; without a text there is no knowledge, and CLIP's order stays.

        Returns:
            The photos found, and whether the query is longer than the model reads.
        """
        index, retriever = self.index, self.retriever
        assert retriever is not None
        cut = bool(asked.query) and retriever.cuts(asked.query)
        if asked.image is None:
            retriever.top_k, retriever.fusion_weight = asked.top_k, asked.fusion_weight
            return retriever.search(asked.query, asked.count, asked.knowledge), cut
        knowledge = asked.knowledge
        if asked.query and knowledge is None:
            knowledge = self.reranker.knowledge_of([asked.query])[0]
        feature = self.reranker.encode_images([decoded(asked.image)]).base
        return search_by_image(
            self.reranker, index, feature, asked.query, asked.count, asked.top_k, asked.fusion_weight, knowledge
        ), cut

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
        return Image.fromarray(decode_rgb(image if isinstance(image, bytes) else read_limited(image)))
    except Exception as error:  # decoders raise almost any exception on damaged data
        raise Refusal(400, f"the image can't be read ({getattr(error, 'strerror', None) or error})") from None
