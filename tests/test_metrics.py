"""Recall, ceiling and chance, compared with manual counts, brute force, clip_benchmark, enumeration and simulation."""

import numpy as np
import pytest
import torch
from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k
from support.equations.ranking import first_positives, full_order, hits_over_all_orders

from amp.errors import AmpError
from amp.retrieval.metrics import (
    ceilings,
    chance,
    rank_of_best_positive,
    recalls,
    require_finite,
    rsum,
    stable_topk,
)


def tied_scores(queries: int, gallery: int, levels: int, seed: int) -> torch.Tensor:
    """Scores with few distinct values, including signed zeros, so that most ranks are tied."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (queries, gallery), generator=generator).float() - levels // 2
    return torch.where((scores == 0) & (torch.rand(scores.shape, generator=generator) < 0.5), -0.0, scores)


@pytest.mark.parametrize(
    ("scores", "positive", "rank"),
    [
        ([0.9, 0.5, 0.1], [1, 0, 0], 0),
        ([0.9, 0.5, 0.1], [0, 0, 1], 2),
        ([0.9, 0.5, 0.1], [0, 1, 1], 1),  # the better-ranked of two positives counts
        ([0.5, 0.5, 0.5], [1, 0, 0], 0),  # ties: the lower gallery index is first,
        ([0.5, 0.5, 0.5], [0, 0, 1], 2),  # so a positive with a higher index loses the tie
        ([0.5, 0.5, 0.5], [0, 1, 1], 1),
        ([0.0, -0.0, 1.0], [0, 1, 0], 2),  # signed zeros are equal
        ([-1.0, -2.0, -3.0], [0, 0, 0], 3),  # no positive: worse than every item
    ],
)
def test_rank_by_hand(scores, positive, rank):
    assert rank_of_best_positive(torch.tensor([scores]), torch.tensor([positive]).bool()).tolist() == [rank]


@pytest.mark.parametrize("levels", [1, 5, 10_000])
def test_rank_is_brute_force_count(levels):
    scores = tied_scores(40, 60, levels, seed=0)
    positive = torch.rand(40, 60, generator=torch.Generator().manual_seed(100)) < 0.08
    assert rank_of_best_positive(scores, positive).tolist() == first_positives(full_order(scores), positive)


@pytest.mark.parametrize(("levels", "k"), [(1, 7), (2, 1), (5, 60), (5, 7), (10_000, 7)])
def test_topk_is_start_of_stable_sort(levels, k):
    scores = tied_scores(50, 60, levels, seed=k)
    values, columns = stable_topk(scores, k)
    assert np.array_equal(columns.numpy(), full_order(scores)[:, :k])
    assert torch.equal(values, scores.gather(1, columns))


def test_recalls_by_hand():
    assert recalls(torch.tensor([0, 1, 4, 5, 9, 10, 99, 0])) == {1: 25.0, 5: 50.0, 10: 75.0}
    assert rsum({1: 25.0, 5: 50.0, 10: 75.0}, {1: 1.0, 5: 2.0, 10: 3.0}) == 156.0


def test_recalls_are_clip_benchmarks():
    """Both directions, most images with five captions. Top-k doesn't define the order of ties, so all scores differ."""
    generator = torch.Generator().manual_seed(0)
    images, captions = 80, 390
    caption_image = torch.cat([torch.arange(images), torch.randint(images, (captions - images,), generator=generator)])
    scores = torch.randperm(captions * images, generator=generator).view(captions, images).float()
    positive = caption_image[:, None] == torch.arange(images)
    scores[positive] += scores.numel() // 20 + 0.5  # half-integers never equal the integers
    for matrix, answers in ((scores, positive), (scores.T, positive.T)):
        found = recalls(rank_of_best_positive(matrix, answers))
        for k in (1, 5, 10):
            theirs = (batchify(recall_at_k, matrix, answers, 32, "cpu", k=k) > 0).float().mean().item()
            assert found[k] == pytest.approx(100 * theirs, abs=1e-4)
        assert 0 < found[1] < found[10] < 100


def test_ceilings_by_hand():
    ranks = torch.tensor([0, 2, 3, 6, 8, 11])
    assert ceilings(ranks, top_k=4) == {1: 50.0, 5: 50.0, 10: 100 * 5 / 6}  # after top_k first-stage order is kept
    assert ceilings(ranks, top_k=20) == {1: 100.0, 5: 100.0, 10: 100.0}


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_chance_is_mean_over_all_orders(top_k):
    """Enumerates every set of positives inside and outside the top k, and every order of the top k."""
    ks = (1, 2, 3, 5, 7)
    for outside in range(1 << 3):
        masks = [[bool(bits >> i & 1) for i in range(top_k)] for bits in range(1 << top_k) if bits or outside]
        whole = [mask + [bool(outside >> i & 1) for i in range(3)] for mask in masks]
        first_ranks = torch.tensor([row.index(True) for row in whole])
        found = chance(torch.tensor(masks), first_ranks, ks)
        for k in ks:
            shares = [hits_over_all_orders(row, top_k, k) for row in whole]
            assert found[k] == pytest.approx(100 * sum(shares) / len(shares))


def test_chance_is_a_simulation():
    rng = np.random.default_rng(0)
    mask = rng.random((50, 20)) < rng.random((50, 1)) * 0.25
    first_ranks = torch.from_numpy(np.where(mask.any(1), mask.argmax(1), 20))
    found = chance(torch.from_numpy(mask), first_ranks)
    rounds = 2000
    shuffled = rng.permuted(np.broadcast_to(mask, (rounds, *mask.shape)), axis=2)
    for k in (1, 5, 10):
        simulated = 100 * shuffled[..., :k].any(2).mean()
        assert found[k] == pytest.approx(simulated, abs=0.5)  # 100,000 draws: three standard errors
    one_of_twenty = torch.zeros(4, 20, dtype=torch.bool)
    one_of_twenty[:, 3] = True
    assert chance(one_of_twenty, torch.full((4,), 3)) == {1: pytest.approx(5.0), 5: pytest.approx(25.0), 10: 50.0}


def test_no_queries_are_refused():
    with pytest.raises(AmpError, match="0 queries"):
        recalls(torch.zeros(0, dtype=torch.long))
    with pytest.raises(AmpError, match="0 queries"):
        chance(torch.zeros(0, 20, dtype=torch.bool), torch.zeros(0, dtype=torch.long))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_infinite_scores_are_refused(value):
    scores = torch.zeros(3, 4)
    scores[1, 2] = value
    with pytest.raises(AmpError, match=r"my scores: 1 of 12 values are NaN or infinite"):
        require_finite(scores, "my scores")
