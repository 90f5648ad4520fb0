"""Bootstrap intervals over images, compared with plain loops and the normal approximation."""

import numpy as np
import pytest
from scipy import stats
from support.equations.ranking import resampled_recalls as naive_recalls

from amp.evaluate.bootstrap import interval, resampled_recalls

IMAGES = 60


@pytest.fixture
def queries():
    generator = np.random.default_rng(1)
    images = np.repeat(np.arange(IMAGES), generator.integers(1, 6, size=IMAGES))
    return generator.integers(0, 15, size=len(images)), images


@pytest.mark.parametrize("folds", [1, 3])
def test_each_draw_takes_images_with_all_their_queries(queries, folds):
    fold = np.arange(IMAGES) * folds // IMAGES
    found = resampled_recalls([queries[0]], [queries[1]], 20, fold, seed=4)
    np.testing.assert_allclose(found[:, 0], naive_recalls(*queries, fold, 20, seed=4), atol=1e-9)


def test_both_directions_share_the_draws(queries):
    found = resampled_recalls([queries[0], queries[0]], [queries[1], queries[1]], 50)
    assert np.array_equal(found[:, 0], found[:, 1]) and found[:, 0].std() > 0
    other = resampled_recalls([queries[0]], [queries[1]], 50, seed=1)
    assert not np.array_equal(found[:, 0], other[:, 0])


def test_one_query_an_image_gives_the_binomial_interval():
    hits = np.random.default_rng(0).random(1000) < 0.3
    low, high = interval(resampled_recalls([np.where(hits, 0, 99)], [np.arange(1000)], 4000)[:, 0, 0])
    expected = stats.norm.interval(0.95, 100 * hits.mean(), 100 * np.sqrt(hits.mean() * (1 - hits.mean()) / 1000))
    assert (low, high) == pytest.approx(expected, abs=0.2)


def test_captions_of_one_image_are_no_independent_queries():
    """Five queries with equal ranks give the same interval as one query, not one narrower by sqrt(5)."""
    ranks = np.where(np.random.default_rng(0).random(400) < 0.5, 0, 99)
    widths = []
    for copies in (1, 5):
        values = resampled_recalls([np.repeat(ranks, copies)], [np.repeat(np.arange(400), copies)], 2000)[:, 0, 0]
        widths.append(np.subtract(*interval(values)[::-1]))
    assert widths[1] == pytest.approx(widths[0], rel=0.05)


def test_images_without_queries_are_never_drawn(queries):
    ranks, images = queries
    np.testing.assert_allclose(
        resampled_recalls([ranks], [images * 10], 30), resampled_recalls([ranks], [images], 30), atol=1e-9
    )
