"""Chooses retrievals of an evaluation and draws them, before and after re-ranking."""

from pathlib import Path

import torch

from amp.data.split import ShardSplit
from amp.data.split_captions import SplitCaptions
from amp.report.choice import choose_queries, outcome_note
from amp.report.gallery import Result, Retrieval, draw_gallery
from amp.retrieval.rerank import rerank_order
from amp.retrieval.split_search import Ranking, Rankings


def draw_retrievals(
    path: Path,
    split: ShardSplit,
    captions: SplitCaptions,
    rankings: Rankings,
    t2i_examples: int = 4,
    i2t_examples: int = 2,
    shown: int = 3,
) -> None:
    """Draws the queries of each direction that re-ranking improved most, and the one that it made worst.

    Args:
        path: File of the picture, PNG, JPEG or WebP by its suffix.
        split: Split with the photos.
        captions: Captions of the split.
        rankings: Rankings of one model, as `SplitSearch.rank` returns them.
        t2i_examples, i2t_examples: Number of queries per direction.
        shown: Number of results per query and ranking.
    """
    t2i, i2t = rankings.t2i, next(iter(rankings.i2t.values()))
    text_cards, image_cards = [], []
    for row in choose_queries(
        t2i.first.ranks.tolist(), t2i.ranks.tolist(), t2i_examples, captions.image[t2i.queries].tolist()
    ):
        caption = int(t2i.queries[row])
        answer = int(captions.image[caption])
        base, new = (
            [Result(split.image(image), score, image == answer) for image, score in hits]
            for hits in both_orders(t2i, row, shown)
        )
        triplets = [f"{t.subject}, {t.action}, {t.object}".rstrip(", ") for t in captions.knowledge[caption].triplets]
        text_cards.append(Retrieval(captions.texts[caption], base, new, triplets))
    for row in choose_queries(i2t.first.ranks.tolist(), i2t.ranks.tolist(), i2t_examples):
        image = int(i2t.queries[row])
        before, after = (
            [Result(captions.texts[c], score, int(captions.image[c]) == image) for c, score in hits]
            for hits in both_orders(i2t, row, shown)
        )
        image_cards.append(Retrieval(split.image(image), before, after))
    notes = [outcome_note(r.first.ranks.tolist(), r.ranks.tolist()) for r in (t2i, i2t)]
    draw_gallery(path, text_cards, image_cards, t2i_note=notes[0], i2t_note=notes[1])


def both_orders(ranking: Ranking, row: int, shown: int) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Returns the first candidates of a query with scores, in the base model's order and in the re-ranked order."""
    first = ranking.first
    order: torch.Tensor = rerank_order(first, ranking.scores, ranking.fusion_weight)[row, :shown]
    base = list(zip(first.candidates[row, :shown].tolist(), first.scores[row, :shown].tolist(), strict=True))
    new = list(zip(first.candidates[row][order].tolist(), ranking.scores[row][order].tolist(), strict=True))
    return base, new
