"""Rankings, two-stage search, recall and resampled recall, with Python lists and stable sorts, one query at a time."""

from itertools import permutations

import numpy as np


def full_order(scores) -> np.ndarray:
    """Columns of each row of scores (Q, G) in descending order; ties go to the lower column."""
    rows = [sorted(range(len(row)), key=lambda g, row=row: (-row[g], g)) for row in scores.tolist()]
    return np.array(rows)


def first_positives(order, positive) -> list[int]:
    """Position of the first positive (Q, G) in each row of an order, or the number of columns if there is none."""
    return [
        next((place for place, g in enumerate(row) if answers[g]), len(row))
        for row, answers in zip(order.tolist(), positive.tolist(), strict=True)
    ]


def two_stages(first, top_k, score, fusion_weight=0.0):
    """Ranks the gallery for one query by the first stage, then re-ranks the first `top_k` by new scores.

    Args:
        first: First-stage score per item.
        top_k: Number of candidates to re-rank.
        score: Function that returns the new scores of a list of candidates.
        fusion_weight: Weight of the first-stage score, which is added to the new one.

    Returns:
        The items from best to worst, and the new score of each candidate, in the order of the first stage.
    """
    order = sorted(range(len(first)), key=lambda item: -first[item])
    new = dict(zip(order[:top_k], score(order[:top_k]), strict=True))
    return sorted(new, key=lambda item: -(new[item] + fusion_weight * first[item])) + order[top_k:], new


def hits_over_all_orders(positive, top_k, k) -> float:
    """Fraction of all orders of the first `top_k` items that have a positive among the first k."""
    orders = list(permutations(range(top_k)))
    return sum(any(([positive[i] for i in order] + positive[top_k:])[:k]) for order in orders) / len(orders)


def resampled_recalls(ranks, images, fold, samples, seed) -> np.ndarray:
    """Recall at 1, 5 and 10 (samples, 3), resampled over images within each fold; a drawn image brings all its queries.

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
