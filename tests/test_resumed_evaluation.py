"""An interrupted evaluation resumes with the stored scores, on any number of processes."""

import os

import numpy as np
import pytest
import torch
from support.evaluation import World, ranked
from support.processes import run_ranks

from amp.retrieval import score_store
from amp.retrieval.score_store import ScoreStore, content_key
from amp.retrieval.scorer import PairScorer

PAIRS = ("t2i", "i2t pairwise")


@pytest.fixture(scope="module")
def whole(world):
    return ranked(world.retrieval(batch_size=6), world.model)


@pytest.fixture
def scored(monkeypatch):
    """Scored pairs as (image, caption); stops after `scored.limit` calls."""

    class Calls(list):
        limit = None

    calls = Calls()
    real = PairScorer.__call__

    def call(self, images, captions):
        if calls.limit is not None and len(calls) >= calls.limit:
            raise KeyboardInterrupt
        calls.append(list(zip(images.tolist(), captions.tolist(), strict=True)))
        return real(self, images, captions)

    monkeypatch.setattr(PairScorer, "__call__", call)
    monkeypatch.setattr(score_store, "SAVE_SECONDS", 1e9)  # scores are only saved at the interruption
    return calls


def assert_equal(found, expected):
    for name, ranking in found.items():
        torch.testing.assert_close(ranking.scores, expected[name].scores, rtol=0, atol=1e-5)
        assert torch.equal(ranking.ranks, expected[name].ranks)


def test_a_stopped_evaluation_goes_on(world, whole, scored, tmp_path):
    retrieval = world.retrieval(batch_size=6)
    total = sum(whole[name].scores.numel() for name in PAIRS)
    scored.limit = 9
    with pytest.raises(KeyboardInterrupt):
        retrieval.rank(world.model, partial=tmp_path)
    first = [pair for batch in scored for pair in batch]
    assert len(first) == 9 * 6
    scored.clear()
    scored.limit = None
    resumed = ranked(retrieval, world.model, partial=tmp_path)
    assert_equal(resumed, whole)
    assert len(first) + sum(map(len, scored)) == total  # nothing was scored twice
    scored.clear()
    seconds = retrieval.rank(world.model, partial=tmp_path).t2i.result.seconds
    assert not scored and seconds > 0.8 * resumed["t2i"].result.seconds  # the time of earlier calls counts


@pytest.mark.parametrize("change", ["weights", "knowledge", "precision", "captions"])
def test_scores_of_another_evaluation_are_not_taken_up(world, scored, tmp_path, change):
    retrieval = world.retrieval(batch_size=6)
    retrieval.rank(world.model, partial=tmp_path)
    count = len(scored)
    precision = ""
    gate = world.model.interaction.aim.gate
    if change == "weights":
        gate.data[0] += 1e-3
    elif change == "knowledge":
        retrieval.knowledge = retrieval.knowledge.blank()
    elif change == "captions":
        retrieval.text = retrieval.text.flip(0)
    else:
        precision = "bf16"
    try:
        retrieval.rank(world.model, partial=tmp_path, precision=precision)
    finally:
        if change == "weights":
            gate.data[0] -= 1e-3
    assert len(scored) == 2 * count


def test_a_file_that_cant_be_read_is_as_none(tmp_path):
    folder = tmp_path / "scores"
    store = ScoreStore(folder, 10)
    store.add(torch.tensor([3, 1]), torch.tensor([0.5, 0.25]))
    store.flush()
    (file,) = folder.iterdir()
    (folder / "scores-cut.npz").write_bytes(file.read_bytes()[:40])
    (folder / "scores-empty.npz").write_bytes(b"")
    np.savez(folder / "scores-foreign.npz", pairs=np.array([10]), scores=np.array([1.0]), seconds=1.0)
    np.savez(folder / "scores-nan.npz", pairs=np.array([4]), scores=np.array([np.nan]), seconds=1.0)
    store = ScoreStore(folder, 10)
    assert store.done.nonzero().flatten().tolist() == [1, 3]
    assert store.scores[[1, 3]].tolist() == [0.25, 0.5]


def test_keys_tell_types_shapes_and_values_apart():
    x = torch.arange(6)
    parts = [[x], [x.float()], [x.view(2, 3)], [x + 1], ["a", "b"], ["ab"], [x.to(torch.bfloat16)], [torch.tensor(0.0)]]
    assert len({content_key(part) for part in parts}) == len(parts)
    assert content_key([x.view(2, 3).T]) == content_key([x.view(2, 3).T.contiguous()])


def _rank_or_die(clip_folder, shards, cache_folder, partial, dying):
    world = World(clip_folder, shards, cache_folder)
    score_store.SAVE_SECONDS = 0.0
    calls = 0

    def progress(done, total):
        nonlocal calls
        calls += 1
        if dying and torch.distributed.get_rank() == 1 and calls == 4:
            os._exit(9)

    found = ranked(world.retrieval(batch_size=6), world.model, progress=progress, partial=partial)
    return {name: (ranking.scores, ranking.ranks) for name, ranking in found.items()}, calls


def test_a_rank_dies_and_two_ranks_go_on(world, whole, clip_folder, shards, cache_folder, tmp_path):
    arguments = (clip_folder, shards, cache_folder, tmp_path / "partial")
    with pytest.raises(AssertionError, match="ranks ended with"):
        run_ranks(_rank_or_die, tmp_path / "first", *arguments, True)
    again = run_ranks(_rank_or_die, tmp_path / "second", *arguments, False)
    for found, _ in again:
        assert found.keys() == whole.keys()
        for name, (scores, ranks) in found.items():
            torch.testing.assert_close(scores, whole[name].scores, rtol=0, atol=1e-5)
            assert torch.equal(ranks, whole[name].ranks)
    fresh = run_ranks(_rank_or_die, tmp_path / "third", clip_folder, shards, cache_folder, tmp_path / "other", False)
    # Rank 0 had finished its part of t2i, and rank 1 four batches.
    assert sum(calls for _, calls in again) <= sum(calls for _, calls in fresh) - 8
