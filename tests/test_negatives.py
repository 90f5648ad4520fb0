"""The draw of negatives: allowed results, their frequencies, and weights that make the estimate unbiased."""

import math

import pytest
import torch
from support.equations.losses import draw_probabilities
from torch.testing import assert_close

from amp.train.losses import candidate_contrastive_loss
from amp.train.negatives import draw_negatives, gumbel_noise

COLUMNS = 12
DRAWS = 40_000


@pytest.fixture
def cosines():
    """Cosines of one row with one very likely negative; column 0 is the positive."""
    row = 0.3 + 0.1 * torch.randn(COLUMNS, generator=torch.Generator().manual_seed(4))
    row[0], row[5] = 0.9, 0.7
    return row


def forbidden(*columns):
    mask = torch.zeros(COLUMNS, dtype=torch.bool)
    mask[list(columns)] = True
    return mask


def draw_often(cosines, mask, m, scale=10.0, draws=DRAWS, **options):
    """Draws for the same row many times, each time with new noise."""
    noise = gumbel_noise(draws, COLUMNS, seed=1, step=2, direction=0)
    return draw_negatives(cosines.expand(draws, -1), mask.expand(draws, -1), noise, m, scale, **options)


@pytest.mark.parametrize("m", [1, 9, 11])
def test_forbidden_columns_are_never_drawn(m, cosines):
    """The own caption and captions of the same image, which have the highest cosines of the frozen CLIP."""
    mask = forbidden(0, 3, 5)
    drawn = draw_often(cosines, mask, m, draws=500)
    assert drawn.columns.shape == drawn.log_weight.shape == (500, m)
    counts = drawn.log_weight > -math.inf
    assert not mask[drawn.columns[counts]].any()
    assert (counts.sum(dim=1) == min(m, 9)).all()  # if there are fewer than m, the rest has no weight
    assert drawn.log_weight[counts].isfinite().all() and not drawn.log_weight.isnan().any()
    for row in drawn.columns[:50].tolist():
        assert len(set(row)) == m


def test_a_row_without_any_negative():
    drawn = draw_often(torch.ones(COLUMNS), forbidden(*range(COLUMNS)), 2, draws=5)
    assert (drawn.log_weight == -math.inf).all()


def test_rows_are_independent(cosines):
    """Each row has its own forbidden columns."""
    mask = torch.stack([forbidden(*range(11)), forbidden(), forbidden(*range(1, 12))])
    drawn = draw_negatives(cosines.expand(3, -1), mask, gumbel_noise(3, COLUMNS, 0, 0, 0), 1, 10.0)
    assert drawn.columns[0].item() == 11 and drawn.columns[2].item() == 0
    assert drawn.log_weight[[0, 2]].flatten().tolist() == pytest.approx([0.0, 0.0], abs=1e-6)  # always drawn: weight 1


@pytest.mark.parametrize("uniform", [0.1, 0.5])
def test_the_first_is_drawn_as_often_as_q_says(uniform, cosines):
    mask = forbidden(0, 3)
    drawn = draw_often(cosines, mask, 1, scale=15.0, uniform=uniform)
    expected = torch.tensor(draw_probabilities(cosines.tolist(), mask.tolist(), 15.0, uniform))
    found = drawn.columns.flatten().bincount(minlength=COLUMNS) / DRAWS
    assert_close(found, expected, atol=4 * 0.5 / math.sqrt(DRAWS), rtol=0)
    assert expected[5] > 0.4  # the very likely negative
    assert_close(drawn.log_weight.flatten(), -expected[drawn.columns.flatten()].log(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("m", "scale"), [(1, 20.0), (2, 5.0), (10, 20.0)])
def test_weighted_sum_over_the_drawn_has_the_full_sum_as_its_mean(m, scale, cosines):
    """Holds for any terms, even if the model disagrees with the frozen CLIP.

    Weights 1 / (m q) are right for draws with replacement, but fail here from m = 2 on: nothing can be drawn twice.
    """
    mask = forbidden(0, 3)
    drawn = draw_often(cosines, mask, m, scale)
    for terms in ((scale * cosines).exp(), torch.ones(COLUMNS), torch.arange(1.0, 13.0).flip(0) ** 2):
        full = terms[~mask].sum()
        estimates = (drawn.log_weight.exp() * terms[drawn.columns]).sum(dim=1) / full
        error = 4 * estimates.std() / math.sqrt(DRAWS)
        assert abs(estimates.mean() - 1) < error.clamp(min=1e-4)
        assert error < 0.1  # otherwise the line above would be trivial


@pytest.mark.parametrize(("m", "scale"), [(1, 1000.0), (2, 1.0), (10, 100.0)])
def test_weights_are_bounded(m, scale, cosines):
    drawn = draw_often(cosines, forbidden(0), m, scale, draws=5000)
    assert drawn.log_weight.exp().max() <= COLUMNS / (0.1 * m) + 1 and not drawn.log_weight.isnan().any()


def test_loss_over_all_negatives_approaches_the_full_one(cosines):
    """If m is the number of negatives, the draw only orders them, and their weights are almost equal."""
    mask, scale = forbidden(0), torch.tensor([10.0])
    drawn = draw_often(cosines, mask, COLUMNS - 1, draws=2000)
    loss = candidate_contrastive_loss(cosines[:1].expand(2000), cosines[drawn.columns], drawn.log_weight, scale)
    logits = scale * cosines
    full = logits.logsumexp(dim=0) - logits[0]
    assert loss.item() == pytest.approx(full.item(), rel=0.02)


# -- noise ------------------------------------------------------------------------------------------------------------


def test_noise_depends_on_seed_step_and_direction_alone():
    first = gumbel_noise(4, 5, 1, 2, 0)
    torch.manual_seed(9)
    assert torch.equal(gumbel_noise(4, 5, 1, 2, 0), first)
    others = [gumbel_noise(4, 5, *key) for key in ((2, 2, 0), (1, 3, 0), (1, 2, 1), (2, 1, 0))]
    assert all((first - other).abs().min() > 0 for other in others)
    assert first.shape == (4, 5) and first.dtype == torch.float32


def test_noise_is_standard_gumbel():
    noise = gumbel_noise(400, 400, 0, 0, 0)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.03)
