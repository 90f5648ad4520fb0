"""Mixtures of several folders of shards, with weights."""

import hashlib
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from support.drawn_data import draw_shards
from support.range_server import RangeServer

from amp.data.order import BatchOrder, epoch_windows, shards_of_epoch
from amp.data.remote.location import Location
from amp.data.shares import Part, Shares
from amp.data.sources import Source, public_sources, sources_of
from amp.data.split import ShardSplit
from amp.errors import AmpError
from amp.train.config import DataSettings, TrainConfig
from amp.train.resume import identity


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A folder with 11 training images in 4 shards, and no validation split."""
    return draw_shards(tmp_path_factory.mktemp("other"), {"train": 11}, samples_per_shard=3)


def test_sources_are_read_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd@2").mkdir()
    (tmp_path / "{a,b}").mkdir()
    assert sources_of("data/coco") == [Source(Path("data/coco"))]
    assert sources_of(["data/coco", "data/mine@3", "x@0.5"]) == [
        Source(Path("data/coco")),
        Source(Path("data/mine"), Fraction(3)),
        Source(Path("x"), Fraction(1, 2)),
    ]
    assert sources_of(["odd@2", "{a,b}"]) == [Source(Path("odd@2")), Source(Path("{a,b}"))]  # folders that exist
    assert sources_of("s3://b/{coco,flickr30k}@2.5") == [
        Source(Location("s3://b/coco"), Fraction(5, 2)),
        Source(Location("s3://b/flickr30k"), Fraction(5, 2)),
    ]
    assert sources_of("https://me@host/x?sig=a@3") == [Source(Location("https://me@host/x", "?sig=a"), Fraction(3))]
    assert sources_of(tmp_path) == [Source(tmp_path)]


@pytest.mark.parametrize("given", ["x@0", "x@1.2.3", "x@.", "s3://b/x@1001"])
def test_wrong_weights_are_refused(given):
    with pytest.raises(AmpError, match=r"data.shards: the weight of .*x is .*; expected a number above 0"):
        sources_of(given)
    with pytest.raises(AmpError, match="no folder of shards"):
        sources_of([])


def test_records_of_sources_are_public():
    given = ["data/mine@3", "https://me:hunter2@host/x?sig=c0ffee@0.5"]
    assert public_sources(given) == ["data/mine@3", "https://***@host/x?***@0.5"]
    assert public_sources("data/mine?x") == "data/mine?x"


def epoch_order(*given, **options) -> np.ndarray:
    return np.concatenate(list(epoch_windows(*given, **options)))


def test_one_folder_keeps_its_order():
    """The order of releases before mixtures, by its hash."""
    order = np.concatenate([epoch_order([5, 3, 8, 1, 7, 4] * 30, seed=5, epoch=e, window=64) for e in range(3)])
    assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:16] == "1cbdc648d081f3a9"


def test_shards_of_an_epoch_are_those_of_its_order():
    sizes = [5, 3, 8, 1, 7, 4]
    shard_of = np.repeat(np.arange(6), sizes)
    for epoch in range(4):
        order = shard_of[epoch_order(sizes, 3, epoch, window=1)]
        assert shards_of_epoch(sizes, 3, epoch) == list(dict.fromkeys(order.tolist()))


def epochs(split: ShardSplit, count: int = 3, batch: int = 2, rank: int = 0, world: int = 1) -> list[list[int]]:
    order = BatchOrder(split.sizes, batch, rank, world, seed=1, window=3, shares=split.shares)
    found = []
    for epoch in range(count):
        order.set_position(epoch * order.steps)
        found.append([sample for samples in order for sample, _ in samples])
    return found


def image_ids(split: ShardSplit, samples: list[int]) -> Counter:
    """How often each image occurs, by its folder and name."""
    return Counter(f"{split._locate(i)[0].path.parent}/{split.record(i)['filename']}" for i in samples)


@pytest.mark.parametrize("weight", [1, 2, 3])
def test_a_whole_weight_repeats_each_sample(shards, other, weight):
    split = ShardSplit([str(shards), f"{other}@{weight}"], "train", weighted=True)
    assert len(split) == split.per_epoch == 22 + 11 * weight and split.shares is None
    for samples in epochs(split, batch=1):
        counts = image_ids(split, samples)
        assert sorted(counts.values()) == sorted([1] * 22 + [weight] * 11)
    plain = ShardSplit([str(shards), f"{other}@{weight}"], "train")
    assert len(plain) == 33 and plain.dataset == "shards + shards"


@pytest.mark.parametrize(("weight", "count"), [("0.5", 6), ("0.25", 3), ("1.5", 17), ("0.01", 0)])
def test_a_fraction_takes_part_of_the_samples_in_each_epoch(shards, other, weight, count):
    split = ShardSplit([str(shards), f"{other}@{weight}"], "train", weighted=True)
    assert split.per_epoch == 22 + count
    seen = []
    for samples in epochs(split, 6, batch=1):
        assert len(samples) == 22 + count
        counts = image_ids(split, samples)
        mine = [number for key, number in counts.items() if str(other) in key]
        assert sum(mine) == count and max(mine, default=0) <= -(-count // 11)
        seen.append(frozenset(samples))
    assert len(set(seen)) > 1 or not count % 11
    again = ShardSplit([str(shards), f"{other}@{weight}"], "train", weighted=True)
    assert epochs(again, 6) == epochs(split, 6)


def test_a_fraction_reads_few_shards():
    shares = Shares((10,) * 20, (Part(0, 20, Fraction(1, 4)),))
    for epoch in range(10):
        taken = shares.taken(3, epoch)
        assert sum(map(len, taken.values())) == shares.samples == 50
        assert sum(len(samples) > 0 for samples in taken.values()) == 5
        assert len(shards_of_epoch(shares.sizes, 3, epoch, taken)) == 5
    used = {shard for epoch in range(60) for shard, samples in shares.taken(3, epoch).items() if len(samples)}
    assert used == set(range(20))


def test_ranks_share_the_batches_of_a_mixture(shards, other):
    split = ShardSplit([str(shards), f"{other}@1.5"], "train", weighted=True)
    whole = epochs(split, batch=4)
    parts = [epochs(split, batch=2, rank=rank, world=2) for rank in range(2)]
    for epoch in range(3):
        joined = [
            sample
            for step in range(0, len(parts[0][epoch]), 2)
            for part in parts
            for sample in part[epoch][step : step + 2]
        ]
        assert joined == whole[epoch]


def test_a_split_that_a_source_lacks(shards, other):
    val = ShardSplit([str(other), str(shards)], "val")
    assert len(val) == 6
    with pytest.raises(AmpError, match="split 'val' doesn't exist"):
        ShardSplit([str(shards), str(other)], "val", weighted=True)
    with pytest.raises(AmpError, match="split 'none' doesn't exist"):
        ShardSplit([str(shards), str(other)], "none")


def test_local_and_remote_sources_are_mixed(shards, other):
    local = ShardSplit([str(shards), f"{other}@2"], "train", weighted=True)
    with RangeServer(other).serve() as server:
        mixed = ShardSplit([str(shards), f"{server.url}@2"], "train", weighted=True)
        samples = list(range(0, len(local), 5))
        mixed.prefetch(samples)
        assert [mixed.decoded(i, bytes) for i in samples] == [local.decoded(i, bytes) for i in samples]
    assert mixed.sizes == local.sizes and epochs(mixed) == epochs(local)


def test_a_run_is_another_with_other_weights(shards, other):
    def shards_in(weight: str) -> list[str]:
        given = [str(shards), f"{other}@{weight}"]
        config = TrainConfig(data=DataSettings(shards=given))
        return identity(config, ShardSplit(given, "train", weighted=True), 4)["shards"]

    found = [shards_in(weight) for weight in ("1", "1.5", "1.25", "2", "0.5")]
    assert len({tuple(shards) for shards in found}) == 5 and found[0] == shards_in("1.0")


def test_a_list_of_one_source_is_that_source(shards):
    assert DataSettings(shards=["data/coco"]).shards == "data/coco"
    assert DataSettings(shards=["a", "b@2"]).shards == ["a", "b@2"]
