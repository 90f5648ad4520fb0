"""First-stage mining: finding confusable images, and batch orders that group them."""

import numpy as np
import pytest
import torch
from support.equations.losses import confusable as naive_confusable
from support.order import epoch_order

from amp.data.order import BatchOrder
from amp.train import mining
from amp.train.mining import confusable

SIZES = [6, 9, 3, 6]  # 24 samples
OWNER = torch.tensor([0, 1, 1, 2, 3, 3, 3, 4])


def unit(*shape, seed):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


def test_confusable_is_the_mean_of_both_directions(monkeypatch):
    """Compared with a loop over pairs, for features that aren't normalized."""
    monkeypatch.setattr(mining, "CHUNK", 2)
    base, text = unit(5, 8, seed=0), unit(8, 8, seed=1)
    scales = torch.linspace(0.5, 4, 8)
    found = confusable(base * scales[:5, None], text * scales[:, None], OWNER, k=3)
    assert found.tolist() == naive_confusable(base, text, OWNER, k=3)


def test_fewer_images_than_neighbours():
    found = confusable(unit(5, 8, seed=0), unit(8, 8, seed=1), OWNER, k=20)
    assert [sorted(row) for row in found.tolist()] == [[j for j in range(5) if j != i] for i in range(5)]


@pytest.fixture
def neighbours():
    """Six groups of four, spread over the shards: 0, 6, 12, 18 are neighbours, and so on."""
    return np.array([[j for j in range(24) if j % 6 == i % 6 and j != i] for i in range(24)])


def test_neighbours_come_together(neighbours):
    order = epoch_order(SIZES, seed=0, epoch=0, window=4, neighbours=neighbours, group=4)
    assert sorted(order.tolist()) == list(range(24))
    families = (order % 6).reshape(6, 4)
    assert (families == families[:, :1]).all()
    assert families[:, 0].tolist() != sorted(families[:, 0].tolist())  # the order of the groups is shuffled
    assert epoch_order(SIZES, 0, 1, 4, neighbours, 4).tolist() != order.tolist()


def test_groups_stay_within_the_window_of_shards(neighbours):
    """Mining must not open more shards at the same time."""
    order = epoch_order(SIZES, seed=0, epoch=0, window=2, neighbours=neighbours, group=4)
    plain = epoch_order(SIZES, seed=0, epoch=0, window=2)
    shard_of = np.repeat(np.arange(4), SIZES)
    assert sorted(order.tolist()) == list(range(24))
    windows = [set(shard_of[x].tolist()) for x in (order, plain)]
    assert windows[0] == windows[1]
    first = set(shard_of[plain[:3]].tolist())
    size = sum(SIZES[s] for s in set(shard_of[plain[: min(SIZES)]].tolist()) | first) if len(first) == 2 else None
    if size:
        assert set(shard_of[order[:size]].tolist()) == first


def test_ranks_share_the_groups(neighbours):
    whole = [[s for s, _ in batch] for batch in BatchOrder(SIZES, 8, 0, 1, 1, neighbours, 4, window=4)]
    halves = [
        [[s for s, _ in batch] for batch in BatchOrder(SIZES, 4, r, 2, 1, neighbours, 4, window=4)] for r in range(2)
    ]
    assert whole == [a + b for a, b in zip(*halves, strict=True)]
