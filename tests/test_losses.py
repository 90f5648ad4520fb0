"""Eq. 10 and 11, compared with values calculated by hand and with naive loops."""

import math

import pytest
import torch
from support.equations import losses as naive
from torch.testing import assert_close

from amp.model.similarity import pair_similarity, similarity
from amp.train import losses

IDS = torch.tensor([7, 3, 7, 5, 3, 9])  # images 0 and 2 are the same, and so are 1 and 4


@pytest.fixture
def cosines():
    return torch.rand(6, 6, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.fixture(params=["distinct", "repeated"])
def ids(request):
    return torch.arange(6) if request.param == "distinct" else IDS


def no_mask(n):
    return torch.zeros(n, n, dtype=torch.bool)


# -- similarities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_similarity_is_the_cosine_in_single_precision(dtype):
    torch.manual_seed(0)
    image, text = (3 * torch.randn(n, 8).to(dtype) for n in (3, 4))
    found = similarity(image, text)
    assert found.shape == (3, 4) and found.dtype == torch.float32
    for i in range(3):
        for c in range(4):
            a, b = image[i].double(), text[c].double()
            assert found[i, c].item() == pytest.approx((a @ b / (a.norm() * b.norm())).item(), abs=1e-6)
    pairs = pair_similarity(image, text[:3])
    assert pairs.dtype == torch.float32
    assert_close(pairs, found[:, :3].diagonal())


def test_same_image_mask():
    ignore = losses.same_image_mask(IDS)
    assert ignore.nonzero().tolist() == [[0, 2], [1, 4], [2, 0], [4, 1]]


# -- eq. 10 -----------------------------------------------------------------------------------------------------------


def test_contrastive_loss_by_hand():
    cosines = torch.tensor([[1.0, 0.5], [0.0, 0.5]])
    rows = math.log(1 + math.exp(2 * (0.5 - 1.0))) + math.log(1 + math.exp(2 * (0.0 - 0.5)))
    columns = math.log(1 + math.exp(2 * (0.0 - 1.0))) + math.log(1 + math.exp(2 * (0.5 - 0.5)))
    loss = losses.contrastive_loss(cosines, torch.tensor([2.0]), no_mask(2))
    assert loss.shape == () and loss.item() == pytest.approx((rows + columns) / 4, abs=1e-6)


def test_contrastive_loss_of_nothing_to_tell_apart_is_log_n():
    loss = losses.contrastive_loss(torch.full((5, 5), 0.3), torch.tensor([50.0]), no_mask(5))
    assert loss.item() == pytest.approx(math.log(5), abs=1e-5)


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_contrastive_loss_is_eq_10(scale, cosines, ids):
    loss = losses.contrastive_loss(cosines, torch.tensor([scale]), losses.same_image_mask(ids))
    expected = naive.contrastive(cosines.double().tolist(), scale, ids.tolist())
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_masked_pairs_do_not_count(cosines):
    ignore = losses.same_image_mask(IDS)
    changed = torch.where(ignore, torch.tensor(1.0), cosines).requires_grad_()
    scale = torch.tensor([10.0])
    for loss in (losses.contrastive_loss(changed, scale, ignore), losses.triplet_loss(changed, 0.2, ignore)):
        changed.grad = None
        loss.backward()
        assert (changed.grad[ignore] == 0).all() and changed.grad.isfinite().all()
    assert losses.contrastive_loss(changed, scale, ignore) == losses.contrastive_loss(cosines, scale, ignore)
    assert losses.triplet_loss(changed, 0.2, ignore) == losses.triplet_loss(cosines, 0.2, ignore)
    assert losses.contrastive_loss(changed, scale, no_mask(6)) > losses.contrastive_loss(cosines, scale, ignore)


# -- eq. 11 -----------------------------------------------------------------------------------------------------------


def test_triplet_loss_by_hand():
    cosines = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.5, 0.6], [0.0, 0.1, 0.95]])
    # hardest texts: 0.8, 0.6, 0.1; hardest images: 0.2, 0.8, 0.6
    expected = (0.2 + 0.8 - 0.9) + (0.2 + 0.6 - 0.5) + 0 + 0 + (0.2 + 0.8 - 0.5) + 0
    loss = losses.triplet_loss(cosines, 0.2, no_mask(3))
    assert loss.shape == () and loss.item() == pytest.approx(expected / 6, abs=1e-6)


@pytest.mark.parametrize("margin", [0.0, 0.2, 1.0])
def test_triplet_loss_is_eq_11(margin, cosines, ids):
    loss = losses.triplet_loss(cosines, margin, losses.same_image_mask(ids))
    assert loss.item() == pytest.approx(naive.triplet(cosines.double().tolist(), margin, ids.tolist()), rel=1e-5)


def test_a_batch_of_one_image_costs_nothing(cosines):
    """Captions of one image are not negatives of each other, and the gradient is finite."""
    same = losses.same_image_mask(torch.zeros(6))
    cosines.requires_grad_()
    loss = losses.triplet_loss(cosines, 0.2, same) + losses.contrastive_loss(cosines, torch.tensor([10.0]), same)
    loss.backward()
    assert loss.item() == 0 and (cosines.grad == 0).all()


# -- over sampled candidates ------------------------------------------------------------------------------------------


def others(cosines):
    """Each row without its diagonal element, (N, N) -> (N, N - 1)."""
    n = len(cosines)
    return cosines[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)


def test_all_candidates_once_are_eq_10_and_11(cosines):
    positive, weight, scale = cosines.diagonal(), torch.zeros(6, 5), torch.tensor([14.3])
    found = sum(
        losses.candidate_contrastive_loss(positive, others(direction), weight, scale)
        for direction in (cosines, cosines.T)
    )
    assert_close(found / 2, losses.contrastive_loss(cosines, scale, no_mask(6)))
    found = sum(
        losses.candidate_triplet_loss(positive, others(direction), weight, 0.2) for direction in (cosines, cosines.T)
    )
    assert_close(found / 2, losses.triplet_loss(cosines, 0.2, no_mask(6)))


def test_weights_multiply_the_terms_of_the_sum():
    positive, negative = torch.tensor([0.5]), torch.tensor([[0.2, -0.1]])
    weight, scale = torch.tensor([[3.0, 0.25]]), 4.0
    total = math.exp(scale * 0.5) + 3.0 * math.exp(scale * 0.2) + 0.25 * math.exp(scale * -0.1)
    loss = losses.candidate_contrastive_loss(positive, negative, weight.log(), torch.tensor([scale]))
    assert loss.item() == pytest.approx(math.log(total) - scale * 0.5, abs=1e-6)


def test_candidates_of_no_weight_do_not_count():
    positive, negative = torch.tensor([0.1, 0.1]), torch.tensor([[0.9, 0.3], [0.9, 0.9]], requires_grad=True)
    weight = torch.tensor([[-math.inf, 0.0], [-math.inf, -math.inf]])
    scale = torch.tensor([10.0], requires_grad=True)
    loss = losses.candidate_contrastive_loss(positive, negative, weight, scale)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(10 * 0.2)) / 2, abs=1e-6)
    hinge = losses.candidate_triplet_loss(positive, negative, weight, 0.2)
    assert hinge.item() == pytest.approx((0.2 + 0.3 - 0.1) / 2, abs=1e-6)
    (loss + hinge).backward()
    assert scale.grad.isfinite().all() and negative.grad.isfinite().all()
    assert (negative.grad != 0).tolist() == [[False, True], [False, False]]
