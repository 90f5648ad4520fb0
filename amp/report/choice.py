"""Chooses the queries of an evaluation that the gallery picture and the report show."""

from collections.abc import Hashable, Sequence

import numpy as np

from amp.evaluate.per_query import QueryResults

OUTCOMES = ("fixed", "broken", "wrong", "right")
# Fraction of the shown queries per outcome; if an outcome has too few queries, others fill its places.
SHARES = (0.4, 0.25, 0.2, 0.15)


def choose_queries(
    base_ranks: Sequence[int],
    reranked_ranks: Sequence[int],
    count: int,
    groups: Sequence[Hashable] | None = None,
) -> list[int]:
    """Chooses the queries that re-ranking improved most, and as the last one the query that it made worst.

    A query is fixed if re-ranking moves a right result to the first place, and broken if the first place is no longer
    right. If no query is broken, the last place goes to the query that fell most; if none fell, to another of the
    others. If too few are fixed, queries that rose follow, then unchanged ones, then the rest. Ties go to the lower
    index.

    Args:
        base_ranks: (Q,) 0-based rank of each query's best correct item by the base model.
        reranked_ranks: (Q,) the same ranks after re-ranking.
        count: Number of queries to choose; fewer are returned if there are fewer.
        groups: (Q,) labels, such as the image of each caption. No label is repeated while others are left.

    Returns:
        Distinct query indices, in the order in which they are shown.
    """
    base, new = [int(r) for r in base_ranks], [int(r) for r in reranked_ranks]
    if len(base) != len(new) or (groups is not None and len(groups) != len(base)):
        raise ValueError(f"{len(base)} base ranks, {len(new)} re-ranked ranks and the groups differ in number")
    if count < 1:
        return []

    def worth(q: int) -> tuple:
        kind = 0 if new[q] == 0 < base[q] else 1 if new[q] < base[q] else 2 if new[q] == base[q] else 3
        return kind, new[q] - base[q], new[q], q

    by_worth = sorted(range(len(base)), key=worth)
    fallen = [q for q in range(len(base)) if new[q] > base[q]]
    worst = min(fallen, key=lambda q: (base[q] > 0, base[q] - new[q], q), default=None)
    last = [worst] if worst is not None and count > 1 else []
    label = list(range(len(base))) if groups is None else list(groups)
    chosen: list[int] = []
    seen = {label[q] for q in last}
    for repeats in (False, True):
        for q in by_worth:
            if len(chosen) + len(last) < count and q not in chosen + last and (repeats or label[q] not in seen):
                chosen.append(q)
                seen.add(label[q])
    return chosen + last


def outcome_note(base_ranks: Sequence[int], reranked_ranks: Sequence[int]) -> str:
    """Counts the queries that re-ranking fixed and broke, since the shown examples are not representative."""
    pairs = [(int(b), int(n)) for b, n in zip(base_ranks, reranked_ranks, strict=True)]
    fixed = sum(new == 0 < base for base, new in pairs)
    broken = sum(base == 0 < new for base, new in pairs)
    return f"re-ranking fixed {fixed:,} and broke {broken:,} of {len(pairs):,} queries (first result)"


def outcomes(results: QueryResults) -> np.ndarray:
    """Index into `OUTCOMES` of each query, by whether the first result was right before and after re-ranking."""
    before, after = results.first_ranks == 0, results.ranks == 0
    return np.select([~before & after, before & ~after, ~before & ~after], [0, 1, 2], default=3)


def counts(results: QueryResults) -> dict[str, int]:
    """Number of queries per outcome."""
    found = np.bincount(outcomes(results), minlength=len(OUTCOMES))
    return dict(zip(OUTCOMES, found.tolist(), strict=True))


def choose_rows(results: QueryResults, count: int) -> list[int]:
    """Chooses queries of each outcome in the proportions of `SHARES`, evenly spaced, so that none is hand-picked."""
    kinds = [np.flatnonzero(outcomes(results) == kind) for kind in range(len(OUTCOMES))]
    wanted = [min(len(rows), round(share * count)) for rows, share in zip(kinds, SHARES, strict=True)]
    for kind, rows in enumerate(kinds):
        wanted[kind] = min(len(rows), wanted[kind] + max(0, count - sum(wanted)))
    return [int(r) for rows, n in zip(kinds, wanted, strict=True) for r in rows[np.arange(n) * len(rows) // max(1, n)]]
