"""The sample order depends only on seed and epoch, not on the number of ranks and workers."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from support.order import epoch_order
from torch.utils.data import DataLoader, Dataset

from amp.data.order import BatchOrder, caption_of_epoch
from amp.errors import AmpError

SIZES = [5, 3, 8, 1, 7, 4]  # 28 samples


def batches(batch_size, rank=0, world=1, seed=3, epoch=0, window=2, sizes=SIZES):
    order = BatchOrder(sizes, batch_size, rank, world, seed, window=window)
    order.set_position(epoch * order.steps)
    return [[sample for sample, _ in batch] for batch in order]


@pytest.mark.parametrize(("window", "epoch"), [(1, 0), (2, 1), (6, 0), (100, 17)])
def test_an_epoch_is_a_permutation_of_the_split(window, epoch):
    order = epoch_order(SIZES, seed=0, epoch=epoch, window=window)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(sum(SIZES)))


def test_the_order_depends_on_seed_and_epoch_alone():
    np.random.seed(1)
    torch.manual_seed(1)
    first = epoch_order(SIZES, seed=5, epoch=2, window=3)
    np.random.seed(2)
    torch.manual_seed(2)
    epoch_order(SIZES, seed=5, epoch=3, window=3)  # must leave no state behind
    np.testing.assert_array_equal(epoch_order(SIZES, seed=5, epoch=2, window=3), first)
    assert epoch_order(SIZES, seed=5, epoch=3, window=3).tolist() != first.tolist()
    assert epoch_order(SIZES, seed=6, epoch=2, window=3).tolist() != first.tolist()
    # (seed, epoch) must not act as a sum: the next seed must not give the order of the next epoch.
    assert epoch_order(SIZES, seed=6, epoch=1, window=3).tolist() != first.tolist()


@pytest.mark.parametrize("window", [1, 4])
def test_no_more_shards_than_the_window_are_begun_and_unfinished(window):
    shard_of = np.repeat(np.arange(len(SIZES)), SIZES)
    most = 0
    for epoch in range(5):
        left, begun = list(SIZES), set()
        for shard in shard_of[epoch_order(SIZES, seed=0, epoch=epoch, window=window)]:
            begun.add(shard)
            most = max(most, len(begun))
            left[shard] -= 1
            if left[shard] == 0:
                begun.remove(shard)
    assert most == window


def test_a_window_mixes_its_shards():
    shard_of = np.repeat(np.arange(2), [50, 50])
    order = shard_of[epoch_order([50, 50], seed=0, epoch=0, window=2)]
    assert 10 < order[:50].sum() < 40  # each half contains samples of both


def test_every_sample_comes_at_most_once_and_only_the_rest_of_a_batch_is_left_out():
    seen = Counter(chain.from_iterable(batches(batch_size=5)))
    assert len(batches(batch_size=5)) == 5 and sum(seen.values()) == 25
    assert set(seen.values()) == {1}


def test_what_an_epoch_leaves_out_changes():
    left_out = {frozenset(set(range(28)) - set(chain.from_iterable(batches(5, epoch=e)))) for e in range(6)}
    assert len(left_out) > 1


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_global_batches_of_one_process(world):
    size = 2
    whole = batches(size * world)
    parts = [batches(size, rank, world) for rank in range(world)]
    assert {len(part) for part in parts} == {len(whole)}
    for step, batch in enumerate(whole):
        slices = [part[step] for part in parts]
        assert all(len(piece) == size for piece in slices)
        assert list(chain.from_iterable(slices)) == batch  # so the slices are disjoint too
        assert len(set(batch)) == size * world


def test_length_is_the_number_of_batches():
    for world in (1, 2, 3):
        for rank in range(world):
            order = BatchOrder(SIZES, 3, rank, world, seed=0, window=2)
            assert len(order) == len(list(order)) == 28 // (3 * world)


def test_an_epoch_can_be_repeated_and_continued():
    order = BatchOrder(SIZES, 4, 0, 1, seed=0, window=2)
    first = list(order)
    assert list(order) == first  # iterating doesn't change the position
    order.set_position(9 * order.steps)
    assert [epoch for batch in order for _, epoch in batch] == [9] * 28
    order.set_position(0 * order.steps)
    assert list(order) == first


def test_an_epoch_can_be_entered_at_any_batch():
    order = BatchOrder(SIZES, 2, 1, 2, seed=0, window=2)  # windows end within batches
    order.set_position(3 * order.steps)
    whole = list(order)
    for start in range(order.steps):
        order.set_position(3 * order.steps + start)
        assert list(order) == whole[start:]


class _Echo(Dataset):
    def __getitem__(self, item):
        return item


def test_the_number_of_workers_changes_nothing():
    def read(workers):
        order = BatchOrder(SIZES, 3, 1, 2, seed=0, window=2)
        loader = DataLoader(
            _Echo(), batch_sampler=order, num_workers=workers, collate_fn=list, persistent_workers=workers > 0
        )
        out = []
        for epoch in (0, 1, 4):  # the epoch reaches workers that are already running
            order.set_position(epoch * order.steps)
            out.append(list(loader))
        return out

    assert read(2) == read(0)


@pytest.mark.parametrize("captions", [1, 5])
def test_all_captions_are_seen_in_as_many_epochs(captions):
    for sample in range(10):
        for cycle in range(3):
            epochs = range(cycle * captions, (cycle + 1) * captions)
            assert sorted(caption_of_epoch(0, e, sample, captions) for e in epochs) == list(range(captions))


def test_samples_and_cycles_have_their_own_order_of_captions():
    orders = {tuple(caption_of_epoch(0, e, sample, 5) for e in range(5)) for sample in range(30)}
    assert len(orders) > 10
    assert len({tuple(caption_of_epoch(0, 5 * c + e, 7, 5) for e in range(5)) for c in range(10)}) > 3
    assert len({tuple(caption_of_epoch(seed, e, 7, 5) for e in range(5)) for seed in range(10)}) > 3


@pytest.mark.parametrize(("batch_size", "world"), [(29, 1), (15, 2)])
def test_a_split_smaller_than_a_global_batch_is_refused(batch_size, world):
    with pytest.raises(AmpError, match=rf"28 images.*{batch_size} x {world} processes.*data\.batch_size"):
        BatchOrder(SIZES, batch_size, 0, world, seed=0, window=2)
    assert len(BatchOrder(SIZES, 28 // world, 0, world, seed=0, window=2)) == 1
