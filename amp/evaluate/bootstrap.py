"""Confidence intervals of recall by bootstrap over images.

The captions of an image are not independent queries, since they share the image. Therefore images are drawn with
replacement, each with all its queries of both directions (cluster bootstrap; Field and Welsh, J. R. Stat. Soc. B 69,
2007).
"""

from collections.abc import Sequence

import numpy as np

from amp.retrieval.metrics import KS

LEVEL = 0.95


def resampled_recalls(
    ranks: Sequence[np.ndarray],
    images: Sequence[np.ndarray],
    samples: int,
    fold: np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Computes the recalls of several sets of queries on the same resampled images.

    Args:
        ranks: 0-based ranks of the queries: S arrays (Q_s,), each of one method and direction.
        images: Image of each query: S arrays (Q_s,), int.
        samples: Number of samples B.
        fold: Fold of each image, (I,). Images are drawn within folds, and recalls are averaged over folds.
        seed: Random seed. Calls with the same seed and images draw the same samples, so their results are paired.

    Returns:
        Recalls in percent, (B, S, len(KS)). If a sample has no query of a set in a fold, the average omits that fold.
    """
    total = 1 + max(int(x.max()) for x in images)
    fold = np.zeros(total, dtype=np.int64) if fold is None else np.asarray(fold)
    # Per image: hits at each K, and the number of queries in the last column.
    sums = np.stack([_sums(r, x, len(fold)) for r, x in zip(ranks, images, strict=True)])
    counted = sums[..., -1].sum(axis=0) > 0  # images without queries are not drawn
    members = [np.flatnonzero((fold == number) & counted) for number in np.unique(fold)]
    generator = np.random.default_rng(seed)
    out = np.empty((samples, len(ranks), len(KS)))
    for sample in range(samples):
        folds = []
        for own in (m for m in members if len(m)):
            weight = np.bincount(generator.integers(len(own), size=len(own)), minlength=len(own))
            drawn = np.tensordot(weight, sums[:, own], axes=(0, 1))
            with np.errstate(invalid="ignore"):
                folds.append(100.0 * drawn[:, :-1] / drawn[:, -1:])
        out[sample] = np.nanmean(folds, axis=0)
    return out


def interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of resampled figures, (B,)."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _sums(ranks: np.ndarray, images: np.ndarray, total: int) -> np.ndarray:
    hits = [np.bincount(images, weights=ranks < k, minlength=total) for k in KS]
    return np.stack([*hits, np.bincount(images, minlength=total)], axis=1)
