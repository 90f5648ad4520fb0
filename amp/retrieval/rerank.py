"""Re-ranking of the pre-selected candidates by the action-aware similarity (sec. 3.5 of arXiv 2506.23502)."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from amp.retrieval.first_stage import FirstStage
from amp.retrieval.metrics import rank_of_best_positive, require_finite
from amp.retrieval.score_store import ScoreStore

ScorePairs = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[int, int], None]


def fuse(first: FirstStage, scores: Tensor, fusion_weight: float = 0.0) -> Tensor:
    """Final scores of the candidates: new score + fusion_weight * first-stage score.

    Args:
        first: The pre-selection of Q queries.
        scores: (Q, k) new scores of `first.candidates`.
        fusion_weight: Weight of the first-stage cosine; 0 re-ranks only by the new similarity, as in the paper.

    Returns:
        (Q, k) float32 on the device of `first`, in the order of `first.candidates`.

    Raises:
        AmpError: A score is not finite.
        ValueError: `scores` doesn't have the shape of the candidates.
    """
    if scores.shape != first.scores.shape:
        raise ValueError(f"scores of shape {tuple(scores.shape)} for candidates of shape {tuple(first.scores.shape)}")
    fused = scores.to(first.scores.device, torch.float32) + fusion_weight * first.scores
    require_finite(fused, "re-ranking scores")
    return fused


def rerank_order(first: FirstStage, scores: Tensor, fusion_weight: float = 0.0) -> Tensor:
    """Positions of the candidates in descending order of the final score. Equal scores stay in first-stage order.

    Args:
        first, scores, fusion_weight: See `fuse`.

    Returns:
        (Q, k) int64 positions; `first.candidates.gather(1, order)` are the re-ranked gallery indices.
    """
    return fuse(first, scores, fusion_weight).sort(dim=1, descending=True, stable=True).indices


def rerank(first: FirstStage, scores: Tensor, positive_mask: Tensor, fusion_weight: float = 0.0) -> Tensor:
    """Rank of each query's best positive after re-ranking.

    Args:
        first: The pre-selection of Q queries.
        scores: (Q, k) new scores of `first.candidates`.
        positive_mask: (Q, k) bool, which candidates are positives of the query (`Positives.of(first.candidates)`).
        fusion_weight: Weight of the first-stage score, which is added to the new one.

    Returns:
        (Q,) int64 0-based ranks: below k if a candidate is a positive, else the unchanged first-stage rank.

    Raises:
        AmpError: A score is not finite.
        ValueError: The shapes don't match, or the mask belongs to another first stage.
    """
    if positive_mask.shape != first.candidates.shape:
        raise ValueError(f"mask of shape {tuple(positive_mask.shape)}, candidates {tuple(first.candidates.shape)}")
    positive_mask = positive_mask.to(first.candidates.device)
    selected = positive_mask.any(1)
    if not torch.equal(selected, first.ranks < first.candidates.shape[1]):
        raise ValueError("positive_mask contradicts the first stage's ranks: it was made for other candidates")
    ranks = rank_of_best_positive(fuse(first, scores, fusion_weight), positive_mask)
    return torch.where(selected, ranks, first.ranks)


def shard_bounds(total: int, rank: int, world: int) -> tuple[int, int]:
    """Start and stop of a rank's contiguous share of `total` items; shares differ by at most one item."""
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of a world of {world}, expected 0 <= rank < world")
    return total * rank // world, total * (rank + 1) // world


@torch.no_grad()
def score_candidates(
    candidates: Tensor,
    score_pairs: ScorePairs,
    batch_size: int,
    group_by: Literal["query", "candidate"] = "query",
    shard: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
    prepare: Callable[[Tensor, Tensor], None] | None = None,
    block_pairs: int = 0,
    store: ScoreStore | None = None,
) -> Tensor:
    """Scores all (query, candidate) pairs in full batches.

    Pairs are split into blocks. `prepare` encodes the inputs of a block once. Within a block, pairs with the same image
    are placed next to each other, because the scorer encodes each distinct image once per batch. So `group_by` should
    be the image side: `candidate` for text-to-image, `query` for image-to-text.

    Args:
        candidates: (Q, k) int64 gallery indices.
        score_pairs: Maps query indices (P,) and gallery indices (P,), both int64, to scores (P,). Called without
            gradients; P is `batch_size`, or less in the last batch of a block.
        batch_size: Pairs per call.
        group_by: Side whose equal indices are placed next to each other.
        shard: (rank, world): only this rank's contiguous share of the pairs is scored. Pairs of other ranks are 0, so
            the sum over ranks (an all-reduce) gives all scores.
        progress: Called after each batch as progress(pairs done, pairs of this rank).
        prepare: Called with the query and gallery indices of a block before its pairs are scored.
        block_pairs: Maximum number of pairs per block, which bounds the memory of `prepare`; 0 for one block.
        store: Store of scores. Its pairs are not scored again (rank 0 returns them), the other pairs are shared evenly
            by the ranks, and new scores are added to it.

    Returns:
        (Q, k) float32 scores in the order of `candidates` and on their device.

    Raises:
        AmpError: A score is not finite.
        ValueError: An argument is invalid, or `score_pairs` returned another shape.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    if group_by not in ("query", "candidate"):
        raise ValueError(f"group_by is {group_by!r}, expected 'query' or 'candidate'")
    queries, k = candidates.shape
    flat = candidates.flatten()
    scores = torch.zeros(queries * k, dtype=torch.float32, device=candidates.device)
    missing = torch.arange(queries * k, device=candidates.device)
    if store is not None:
        done = store.done.to(candidates.device)
        missing = missing[~done]
        if shard[0] == 0:
            scores[done] = store.scores.to(scores)[done]
    start, stop = shard_bounds(len(missing), *shard)
    mine = missing[start:stop]
    scored = 0
    try:
        for block in mine.split(block_pairs or max(1, len(mine))) if len(mine) else ():
            if group_by == "candidate":
                block = block[flat[block].sort(stable=True).indices]
            if prepare is not None:
                prepare(block // k, flat[block])
            for pairs in block.split(batch_size):
                batch = score_pairs(pairs // k, flat[pairs])
                if batch.shape != pairs.shape:
                    raise ValueError(f"score_pairs returned shape {tuple(batch.shape)} for {len(pairs)} pairs")
                require_finite(batch, "re-ranking scores")
                scores[pairs] = batch.to(scores)
                scored += len(pairs)
                if store is not None:
                    store.add(pairs, scores[pairs])
                if progress is not None:
                    progress(scored, len(mine))
    finally:  # keep the scores so far if the search is interrupted
        if store is not None:
            store.flush()
    return scores.view(queries, k)
