"""Two-stage search compared with full sorting."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.equations.ranking import first_positives, full_order

from amp.errors import AmpError
from amp.retrieval import first_stage as first_stage_module
from amp.retrieval.first_stage import (
    FirstStage,
    Positives,
    first_stage,
    first_stage_in_folds,
    i2t_positives,
    t2i_positives,
)
from amp.retrieval.metrics import ceilings, chance, recalls
from amp.retrieval.rerank import fuse, rerank, rerank_order, score_candidates, shard_bounds
from amp.retrieval.score_store import ScoreStore

IMAGES, CAPTIONS, WIDTH = 37, 150, 8


@pytest.fixture
def gallery():
    """Features of images and captions, correlated so that recall is well between 0 and 100."""
    generator = torch.Generator().manual_seed(0)
    caption_image = torch.cat([torch.arange(IMAGES), torch.randint(IMAGES, (CAPTIONS - IMAGES,), generator=generator)])
    images = torch.randn(IMAGES, WIDTH, generator=generator)
    captions = images[caption_image] + 1.2 * torch.randn(CAPTIONS, WIDTH, generator=generator)
    return images, captions, caption_image


def directions(gallery):
    images, captions, caption_image = gallery
    yield captions, images, t2i_positives(caption_image, IMAGES)
    yield images, captions, i2t_positives(caption_image, IMAGES)


def cosines(query: torch.Tensor, items: torch.Tensor) -> np.ndarray:
    return (F.normalize(query, dim=-1) @ F.normalize(items, dim=-1).T).numpy()


def test_positives_are_the_images_captions():
    caption_image = torch.tensor([2, 0, 0, 1, 2])
    t2i, i2t = t2i_positives(caption_image, 3), i2t_positives(caption_image, 3)
    assert t2i.rows(0, 5).tolist() == [[i == c for i in range(3)] for c in (2, 0, 0, 1, 2)]
    assert torch.equal(i2t.rows(0, 3), t2i.rows(0, 5).T)
    assert torch.equal(i2t.rows(1, 3), t2i.rows(0, 5).T[1:3])
    assert i2t.of(torch.tensor([[0, 1], [3, 4], [4, 0]])).tolist() == [[False, True], [True, False], [True, True]]


@pytest.mark.parametrize(("k", "chunk"), [(1, 1), (5, 1 << 22), (20, 200)])
def test_first_stage_is_the_full_sort(gallery, k, chunk, monkeypatch):
    monkeypatch.setattr(first_stage_module, "CHUNK_SCORES", chunk)
    for query, items, positives in directions(gallery):
        found = first_stage(query, items, positives, k)
        scores = cosines(query, items)
        order = full_order(scores)
        assert np.array_equal(found.candidates.numpy(), order[:, :k])
        np.testing.assert_allclose(found.scores.numpy(), np.take_along_axis(scores, order[:, :k], 1), atol=1e-6)
        assert found.ranks.tolist() == first_positives(order, positives.rows(0, len(query)))
        assert 0 < recalls(found.ranks)[1] < 100
        assert found.candidates.dtype == torch.int64 and found.scores.dtype == torch.float32


def test_first_stage_ties_go_to_the_lower_index():
    items = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    found = first_stage(
        torch.tensor([[2.0, 0.0]]), items, Positives(torch.tensor([1]), torch.tensor([0, 0, 0, 0, 1])), 4
    )
    assert found.candidates.tolist() == [[1, 3, 4, 0]]
    assert found.scores.tolist() == [[1.0, 1.0, 1.0, 0.0]]  # normalized for any input
    assert found.ranks.tolist() == [2]


def test_first_stage_keeps_the_whole_of_a_small_gallery(gallery):
    query, items, positives = next(directions(gallery))
    found = first_stage(query, items, positives, 1000)
    assert found.candidates.shape == (CAPTIONS, IMAGES)
    assert found.candidates.sort(1).values.tolist() == [list(range(IMAGES))] * CAPTIONS


def test_first_stage_is_float32_under_autocast(gallery):
    query, items, positives = next(directions(gallery))
    expected = first_stage(query, items, positives, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = first_stage(query, items, positives, 10)
    assert torch.equal(found.scores, expected.scores) and torch.equal(found.candidates, expected.candidates)


def test_first_stage_refuses_bad_input(gallery):
    query, items, positives = next(directions(gallery))
    with pytest.raises(AmpError, match="top-k of the first stage is 0"):
        first_stage(query, items, positives, 0)
    with pytest.raises(ValueError, match="positives of"):
        first_stage(query[:-1], items, positives, 5)
    for at in ("query", "gallery"):
        bad = {"query": query.clone(), "gallery": items.clone()}
        bad[at][3, 1] = float("nan")
        with pytest.raises(AmpError, match=f"{at} features: 8 of"):
            first_stage(bad["query"], bad["gallery"], positives, 5)
    orphan = Positives(torch.arange(CAPTIONS) % IMAGES, torch.arange(IMAGES).clamp(max=IMAGES - 2))
    with pytest.raises(AmpError, match=r"4 of 150 queries have no positive in the gallery \(first: query 36\)"):
        first_stage(query, items, orphan, 5)


@pytest.mark.parametrize(
    ("caption_image", "images", "message"),
    [
        ([], 3, "3 images and 0 captions"),
        ([0], 0, "0 images and 1 captions"),
        ([0, 1, 3], 3, "captions have image indices 0 to 3; expected indices from 0 to 2"),
        ([0, -1], 2, "captions have image indices -1 to 0"),
    ],
)
def test_positives_refuse_bad_input(caption_image, images, message):
    for make in (t2i_positives, i2t_positives):
        with pytest.raises(AmpError, match=message):
            make(torch.tensor(caption_image, dtype=torch.long), images)


def test_image_without_caption_is_a_gallery_item_but_no_query():
    caption_image = torch.tensor([0, 0, 2])
    assert len(t2i_positives(caption_image, 4).gallery_image) == 4
    with pytest.raises(AmpError, match=r"2 of 4 images have no caption \(first: image 1\)"):
        i2t_positives(caption_image, 4)


@pytest.mark.parametrize(("fusion_weight", "levels"), [(0.0, 2), (0.7, 1000)])
def test_rerank_is_a_full_sort_of_the_candidates(gallery, fusion_weight, levels):
    for query, items, positives in directions(gallery):
        first = first_stage(query, items, positives, 10)
        generator = torch.Generator().manual_seed(levels)
        new = torch.randint(levels, first.scores.shape, generator=generator) / 4  # few distinct values, so many ties
        found = rerank(first, new, positives.of(first.candidates), fusion_weight)
        order = rerank_order(first, new, fusion_weight)

        places = full_order(new + fusion_weight * first.scores)
        assert np.array_equal(order.numpy(), places)
        ranking = full_order(cosines(query, items))
        ranking[:, :10] = np.take_along_axis(ranking[:, :10], places, 1)  # after k the first stage's order is kept
        assert found.tolist() == first_positives(ranking, positives.rows(0, len(query)))
        outside = first.ranks >= 10
        assert outside.any() and torch.equal(found[outside], first.ranks[outside])


def test_equal_scores_keep_the_first_stage(gallery):
    for query, items, positives in directions(gallery):
        first = first_stage(query, items, positives, 10)
        mask = positives.of(first.candidates)
        assert torch.equal(rerank(first, torch.zeros_like(first.scores), mask), first.ranks)
        assert torch.equal(rerank(first, first.scores, mask), first.ranks)


def test_oracle_reaches_the_ceiling_and_random_orders_are_chance(gallery):
    for query, items, positives in directions(gallery):
        first = first_stage(query, items, positives, 8)
        mask = positives.of(first.candidates)
        assert recalls(rerank(first, mask.float(), mask)) == ceilings(first.ranks, 8)
        generator = torch.Generator().manual_seed(0)
        random = [recalls(rerank(first, torch.rand(mask.shape, generator=generator), mask)) for _ in range(400)]
        expected = chance(mask, first.ranks)
        for k in (1, 5, 10):
            assert np.mean([r[k] for r in random]) == pytest.approx(expected[k], abs=1.0)
        assert expected[1] < expected[5] < expected[10] == recalls(first.ranks)[10]


def test_scores_are_fused_in_float32(gallery):
    query, items, positives = next(directions(gallery))
    first = first_stage(query, items, positives, 5)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        fused = fuse(first, torch.ones_like(first.scores, dtype=dtype), 1.0)
        assert fused.dtype == torch.float32 and torch.equal(fused, first.scores + 1)


def test_rerank_refuses_bad_input(gallery):
    query, items, positives = next(directions(gallery))
    first = first_stage(query, items, positives, 5)
    mask = positives.of(first.candidates)
    bad = first.scores.clone()
    bad[2, 2] = float("nan")
    with pytest.raises(AmpError, match="re-ranking scores: 1 of 750 values"):
        rerank(first, bad, mask)
    with pytest.raises(ValueError, match="scores of shape"):
        rerank(first, first.scores[:, :-1], mask)
    with pytest.raises(ValueError, match="mask of shape"):
        rerank(first, first.scores, mask[:, :-1])
    with pytest.raises(ValueError, match="other candidates"):
        rerank(first, first.scores, mask.roll(1, 0))


# Scoring of pairs


def pair_score(query: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """A different, nonzero score for each pair."""
    return (1 + query * 1000 + candidate).float()


@pytest.fixture
def candidates():
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(30, generator=generator)[:7] for _ in range(11)])


@pytest.mark.parametrize(
    ("group_by", "batch_size"), [("query", 1), ("candidate", 10), ("query", 77), ("candidate", 1000)]
)
def test_pairs_come_in_full_grouped_batches(candidates, group_by, batch_size):
    calls, ticks = [], []

    def score_pairs(query, candidate):
        assert not torch.is_grad_enabled() and query.dtype == candidate.dtype == torch.int64
        calls.append((query, candidate))
        return pair_score(query, candidate)

    scores = score_candidates(candidates, score_pairs, batch_size, group_by, progress=lambda *tick: ticks.append(tick))
    assert torch.equal(scores, pair_score(torch.arange(11)[:, None].expand(11, 7), candidates))
    sizes = [len(query) for query, _ in calls]
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1) and 0 < sizes[-1] <= batch_size and sum(sizes) == 77
    group = torch.cat([query if group_by == "query" else candidate for query, candidate in calls])
    assert len(group.unique_consecutive()) == len(group.unique())  # each group is contiguous
    assert ticks == [(min(n * batch_size, 77), 77) for n in range(1, len(calls) + 1)]


@pytest.mark.parametrize(("group_by", "world"), [("query", 3), ("candidate", 2), ("query", 80)])
def test_shards_sum_to_the_whole(candidates, group_by, world):
    whole = score_candidates(candidates, pair_score, 10, group_by)
    parts = [score_candidates(candidates, pair_score, 10, group_by, shard=(rank, world)) for rank in range(world)]
    shares = [int((part != 0).sum()) for part in parts]
    assert sum(shares) == 77 and max(shares) - min(shares) <= 1
    assert torch.equal(torch.stack(parts).sum(0), whole)


@pytest.mark.parametrize(("total", "world"), [(0, 3), (1, 3), (10, 3), (25_010 * 20, 7)])
def test_shards_are_contiguous_and_balanced(total, world):
    bounds = [shard_bounds(total, rank, world) for rank in range(world)]
    assert bounds[0][0] == 0 and bounds[-1][1] == total
    assert all(left[1] == right[0] for left, right in pairwise(bounds))
    sizes = [stop - start for start, stop in bounds]
    assert max(sizes) - min(sizes) <= 1


def test_scores_carry_no_graph_and_are_float32(candidates):
    weight = torch.ones((), requires_grad=True)
    scores = score_candidates(candidates, lambda q, c: (weight * q).bfloat16(), 10)
    assert scores.dtype == torch.float32 and not scores.requires_grad


def test_scoring_refuses_bad_input(candidates):
    with pytest.raises(ValueError, match="batch_size is 0"):
        score_candidates(candidates, pair_score, 0)
    with pytest.raises(ValueError, match="group_by is 'image'"):
        score_candidates(candidates, pair_score, 8, "image")
    with pytest.raises(ValueError, match="rank 2 of a world of 2"):
        score_candidates(candidates, pair_score, 8, shard=(2, 2))
    with pytest.raises(ValueError, match=r"shape \(8, 8\) for 8 pairs"):
        score_candidates(candidates, lambda q, c: q[:, None] * c.float(), 8)
    with pytest.raises(AmpError, match="re-ranking scores: 8 of 8 values"):
        score_candidates(candidates, lambda q, c: q / torch.zeros(()), 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to see that nothing is tied to the CPU")
def test_stages_run_on_a_gpu(gallery):
    for query, items, positives in directions(gallery):
        expected = first_stage(query, items, positives, 10)
        found: FirstStage = first_stage(query.cuda(), items.cuda(), positives, 10)
        assert torch.equal(found.candidates.cpu(), expected.candidates)
        scores = score_candidates(found.candidates, pair_score, 16, "candidate")
        assert scores.is_cuda
        ranks = rerank(found, scores, positives.of(found.candidates))
        assert torch.equal(ranks.cpu(), rerank(expected, scores.cpu(), positives.of(expected.candidates)))


def test_a_fold_is_a_gallery_of_its_own(gallery):
    images, captions, caption_image = gallery
    fold = torch.arange(IMAGES) * 3 // IMAGES
    for query, items, positives in directions(gallery):
        found = first_stage_in_folds(query, items, positives, 10, fold)
        for number in range(3):
            rows, kept = (
                fold[positives.query_image] == number,
                (fold[positives.gallery_image] == number).nonzero()[:, 0],
            )
            order = full_order(cosines(query[rows], items[kept]))
            assert torch.equal(found.candidates[rows], kept[torch.from_numpy(order[:, :10].copy())])
            own = Positives(positives.query_image[rows], positives.gallery_image[kept])
            assert found.ranks[rows].tolist() == first_positives(order, own.rows(0, len(order)))
    assert torch.equal(
        first_stage_in_folds(captions, images, t2i_positives(caption_image, IMAGES), 5, fold * 0).candidates,
        first_stage(captions, images, t2i_positives(caption_image, IMAGES), 5).candidates,
    )


def test_blocks_prepare_their_own_pairs_and_a_store_skips_what_it_has(tmp_path):
    candidates = torch.stack([torch.randperm(30, generator=torch.Generator().manual_seed(q))[:4] for q in range(9)])
    table = torch.rand(9, 30, generator=torch.Generator().manual_seed(0))
    ready, scored = set(), []

    def prepare(query, candidate):
        ready.clear()
        ready.update(zip(query.tolist(), candidate.tolist(), strict=True))

    def score(query, candidate):
        pairs = list(zip(query.tolist(), candidate.tolist(), strict=True))
        assert ready.issuperset(pairs) and len(ready) <= 12
        scored.extend(pairs)
        return table[query, candidate]

    store = ScoreStore(tmp_path, 36)
    store.add(torch.arange(0, 36, 2), table.gather(1, candidates).flatten()[::2])
    store.flush()
    store = ScoreStore(tmp_path, 36)
    parts = [
        score_candidates(candidates, score, 5, "candidate", (r, 2), prepare=prepare, block_pairs=12, store=store)
        for r in (0, 1)
    ]
    assert torch.equal(parts[0] + parts[1], table.gather(1, candidates))
    odd = candidates.flatten()[1::2].tolist()
    assert sorted(scored) == sorted((i // 4, c) for i, c in zip(range(1, 36, 2), odd, strict=True))
