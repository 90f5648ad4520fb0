"""Search by an image: the frozen CLIP finds similar photos, and a text, if there is one, re-ranks them."""

from pathlib import Path

import torch

from amp.data.images.formats import UnreadableImageError
from amp.errors import AmpError
from amp.knowledge.schema import Knowledge
from amp.search.index import PhotoIndex
from amp.search.retriever import Found, Hit, first_scores


def search_by_image(
    reranker,
    index: PhotoIndex,
    feature: torch.Tensor,
    query: str,
    count: int,
    top_k: int,
    fusion_weight: float,
    knowledge: Knowledge | None,
) -> Found:
    """Finds photos that are similar to an image.

    Args:
        reranker: An `amp.Reranker`.
        index: Index to search.
        feature: The frozen CLIP's feature of the image (1, d).
        query: Text by which the `top_k` most similar photos are re-ranked. Without it, there is no knowledge that
            photos could be conditioned on, so they keep their order.
        count, top_k, fusion_weight, knowledge: See `amp.Retriever`.

    Returns:
        Photos found; `base_score` is the cosine similarity to the image.
    """
    top_k = top_k if query else 0
    present: list[tuple[Path, float]] = []
    skipped: dict[Path, str] = {}
    scores, numbers = first_scores(index, feature).sort(descending=True, stable=True)
    for score, number in zip(scores.tolist(), numbers.tolist(), strict=True):
        try:
            index.check_there(number)
            present.append((index.path(number), score))
        except UnreadableImageError as error:
            skipped[index.path(number)] = str(error)
        if len(present) == max(count, top_k):
            break
    if not present:
        raise AmpError(f"none of the {len(index):,} photos of the index can be read, expected all of them")
    ranked = [(place, score) for place, (_, score) in enumerate(present)]
    knowledge = knowledge or Knowledge()
    if top_k:
        first = present[:top_k]
        ranking = reranker.rank(
            query,
            [path for path, _ in first],
            knowledge=knowledge,
            fusion_weight=fusion_weight,
            first_scores=[score for _, score in first],
        )
        skipped |= {first[place][0]: reason for place, reason in ranking.skipped.items()}
        ranked[: len(first)] = [(entry["corpus_id"], entry["score"]) for entry in ranking]
    hits = [Hit(present[place][0], score, present[place][1], place) for place, score in ranked[:count]]
    return Found(query, knowledge, hits, skipped)
