"""Rankings, two-stage search, recall and its resampling: Python lists, stable sorts, one query at a time."""

from itertools import permutations

import numpy as np


def full_order(scores) -> np.ndarray:
    """Columns of each row of scores (Q, G) from the highest on; of equal scores the lower column is first."""
    rows = [sorted(range(len(row)), key=lambda g, row=row: (-row[g], g)) for row in scores.tolist()]
    return np.array(rows)


def first_positives(order, positive) -> list[int]:
    """Place of the first positive (Q, G) in each row of an order, or the number of columns if there is none."""
    return [
        next((place for place, g in enumerate(row) if answers[g]), len(row))
        for row, answers in zip(order.tolist(), positive.tolist(), strict=True)
    ]


def two_stages(first, top_k, score, fusion_weight=0.0):
    """One query: the gallery ordered by the first stage, then its start by new scores.

    Args:
        first: First-stage score of each item.
        top_k: Number of candidates that are scored again.
        score: Called as `score(candidates)` for their new scores.
        fusion_weight: Weight of the first-stage score next to the new one.

    Returns:
        The items from best to worst, and the new score of each candidate, in the order of the first stage.
    """
    order = sorted(range(len(first)), key=lambda item: -first[item])
    new = dict(zip(order[:top_k], score(order[:top_k]), strict=True))
    return sorted(new, key=lambda item: -(new[item] + fusion_weight * first[item])) + order[top_k:], new


def hits_over_all_orders(positive, top_k, k) -> float:
    """Share of the orders of the first `top_k` of a gallery that have a positive among their first k."""
    orders = list(permutations(range(top_k)))
    return sum(any(([positive[i] for i in order] + positive[top_k:])[:k]) for order in orders) / len(orders)


def resampled_recalls(ranks, images, fold, samples, seed) -> np.ndarray:
    """Recall at 1, 5 and 10 (samples, 3) over images drawn with replacement within each fold, all their queries along.

    Args:
        ranks: Rank of each query's first answer.
        images: Image of each query.
        fold: Fold of each image.
        samples: Number of draws.
        seed: Seed of the draws.
    """
    generator = np.random.default_rng(seed)
    out = []
    for _ in range(samples):
        recalls = []
        for number in sorted(set(fold)):
            members = [i for i in range(len(fold)) if fold[i] == number]
            drawn = [members[j] for j in generator.integers(len(members), size=len(members))]
            found = [ranks[q] for image in drawn for q in range(len(ranks)) if images[q] == image]
            recalls.append([100 * sum(r < k for r in found) / len(found) for k in (1, 5, 10)])
        out.append(np.mean(recalls, axis=0))
    return np.array(out)
