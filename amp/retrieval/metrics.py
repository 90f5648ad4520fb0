"""Recall of image-text retrieval, as pure functions of scores and ranks.

If a query has several positives, it is a hit at K if any of them is among the first K, as is usual (for example in
clip_benchmark). A gallery is ordered by descending score, and equal scores by gallery index, as in a stable sort. All
ranks are 0-based; all recalls are in percent.
"""

from collections.abc import Sequence
from math import comb

import torch
from torch import Tensor

from amp.errors import AmpError

KS = (1, 5, 10)


def require_finite(values: Tensor, what: str) -> None:
    """Checks for NaN and infinity. NaN would otherwise count as a perfect rank, because no score is greater than NaN.

    Args:
        values: A float tensor of any shape.
        what: Name of the values in the error message.

    Raises:
        AmpError: A value is not finite.
    """
    finite = torch.isfinite(values)
    if not finite.all():
        raise AmpError(
            f"{what}: {int((~finite).sum()):,} of {values.numel():,} values are NaN or infinite; expected finite "
            "values; evaluate with precision 'no', and look for NaN in the checkpoint's weights"
        )


def stable_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best columns per row; ties go to the lower column. Costs a top-k instead of a full stable sort.

    With `torch.topk`, the choice and the order of tied columns depend on the device.

    Args:
        scores: (Q, G) finite scores.
        k: Number of columns to keep, 1 <= k <= G.

    Returns:
        Values (Q, k) and int64 columns (Q, k), equal to the first k of a stable descending sort.
    """
    kth = scores.topk(k, dim=1).values[:, -1:]
    above = scores > kth
    tied = scores == kth
    # Keep all columns above the k-th value, and fill the remaining places with tied columns from the left.
    kept = above | (tied & (tied.cumsum(1) <= k - above.sum(1, keepdim=True)))
    columns = kept.nonzero()[:, 1].view(len(scores), k)
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def rank_of_best_positive(scores: Tensor, positive: Tensor) -> Tensor:
    """0-based rank of each query's best positive in its ordered gallery.

    Args:
        scores: (Q, G) finite scores, larger is better.
        positive: (Q, G) bool, which gallery items are positives of the query.

    Returns:
        (Q,) int64 ranks; G for a query without any positive.
    """
    gallery = scores.shape[1]
    index = torch.arange(gallery, device=scores.device)
    best = scores.masked_fill(~positive, float("-inf")).amax(1, keepdim=True)
    first = torch.where(positive & (scores == best), index, gallery).amin(1, keepdim=True)
    return ((scores > best) | ((scores == best) & (index < first))).sum(1)


def recalls(ranks: Tensor, ks: Sequence[int] = KS) -> dict[int, float]:
    """R@K in percent.

    Args:
        ranks: (Q,) 0-based rank of each query's best positive.
        ks: The cut-offs K.

    Raises:
        AmpError: There is no query.
    """
    if len(ranks) == 0:
        raise AmpError("recall of 0 queries is undefined; expected at least 1; check whether the test split is empty")
    return {k: 100.0 * int((ranks < k).sum()) / len(ranks) for k in ks}


def rsum(*directions: dict[int, float]) -> float:
    """Sum of all recalls of all directions, at most 600 for R@1, R@5 and R@10 in both directions."""
    return sum(sum(direction.values()) for direction in directions)


def ceilings(first_ranks: Tensor, top_k: int, ks: Sequence[int] = KS) -> dict[int, float]:
    """The recalls of a perfect re-ranking of the first `top_k` candidates.

    A positive among the first k can rise to the top; any other stays where it is. So R@K <= first-stage R@max(K, k).

    Args:
        first_ranks: (Q,) 0-based first-stage rank of each query's best positive.
        top_k: Number of candidates re-ranked per query, k.
        ks: The cut-offs K.
    """
    reachable = recalls(first_ranks, [max(k, top_k) for k in ks])
    return {k: reachable[max(k, top_k)] for k in ks}


def chance(positive_mask: Tensor, first_ranks: Tensor, ks: Sequence[int] = KS) -> dict[int, float]:
    """Expected recalls of a uniformly random order of the pre-selected candidates.

    Because of the pre-selection, chance is far above K/G. With m positives among k candidates, the first K of a random
    order contain none of them with the hypergeometric probability C(k - m, K) / C(k, K). Positives outside the
    candidates keep their first-stage rank, which matters only for K > k.

    Args:
        positive_mask: (Q, k) bool, which candidates are positives of the query.
        first_ranks: (Q,) 0-based first-stage rank of each query's best positive.
        ks: The cut-offs K.

    Raises:
        AmpError: There is no query.
    """
    top_k = positive_mask.shape[1]
    if len(positive_mask) == 0:
        raise AmpError("chance of 0 queries is undefined; expected at least 1; check whether the test split is empty")
    queries_with = torch.bincount(positive_mask.sum(1).cpu(), minlength=top_k + 1).tolist()
    expected = {}
    for k in ks:
        if k > top_k:
            expected[k] = recalls(first_ranks, (k,))[k]
            continue
        hits = sum(n * (1.0 - comb(top_k - m, k) / comb(top_k, k)) for m, n in enumerate(queries_with))
        expected[k] = 100.0 * hits / len(positive_mask)
    return expected
