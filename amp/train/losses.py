"""The two training objectives (paper, eq. 10 and 11). Computed in fp32 regardless of the features' precision."""

import torch
import torch.nn.functional as F


def same_image_mask(image_ids: torch.Tensor) -> torch.Tensor:
    """Off-diagonal pairs that show the same image, bool (N, N). They are neither positives nor negatives."""
    same = image_ids[:, None] == image_ids[None, :]
    return same & ~torch.eye(len(image_ids), dtype=torch.bool, device=image_ids.device)


def contrastive_loss(cosines: torch.Tensor, logit_scale: torch.Tensor, ignore: torch.Tensor) -> torch.Tensor:
    """Symmetric contrastive loss, eq. 10 averaged over both directions.

    Args:
        cosines: Cosines (N, N); row i and column i belong together.
        logit_scale: 1 / tau, (1,).
        ignore: Pairs left out of the sums, bool (N, N).
    """
    logits = (logit_scale * cosines).masked_fill(ignore, float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def triplet_loss(cosines: torch.Tensor, margin: float, ignore: torch.Tensor) -> torch.Tensor:
    """Triplet loss with d = 1 - cos and the hardest negative in the batch, eq. 11 averaged over both directions.

    Args:
        cosines: Cosines (N, N); row i and column i belong together.
        margin: Margin, alpha.
        ignore: Pairs that are not negatives, bool (N, N).
    """
    positive = cosines.diagonal()
    own = torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)
    negatives = cosines.masked_fill(ignore | own, float("-inf"))
    hardest_text, hardest_image = negatives.amax(dim=1), negatives.amax(dim=0)
    return ((margin + hardest_text - positive).relu() + (margin + hardest_image - positive).relu()).mean() / 2


def candidate_contrastive_loss(
    positive: torch.Tensor, negative: torch.Tensor, log_weight: torch.Tensor, logit_scale: torch.Tensor
) -> torch.Tensor:
    """One direction of eq. 10 with the sum over the batch estimated from m sampled negatives.

    log(exp(s+) + sum_j w_j exp(s_j)), where w_j corrects for some negatives being drawn more often than others: the
    expectation of the inner sum is the sum over all negatives (`draw_negatives`).

    Args:
        positive: Cosines of the true pairs (B,).
        negative: Cosines of the sampled pairs (B, m).
        log_weight: log w_j (B, m); -inf leaves a negative out.
        logit_scale: 1 / tau, (1,).
    """
    logits = torch.cat([(logit_scale * positive)[:, None], logit_scale * negative + log_weight], dim=1)
    return -logits.log_softmax(dim=1)[:, 0].mean()


def candidate_triplet_loss(
    positive: torch.Tensor, negative: torch.Tensor, log_weight: torch.Tensor, margin: float
) -> torch.Tensor:
    """One direction of eq. 11 over m sampled negatives; arguments as in `candidate_contrastive_loss`."""
    hardest = negative.masked_fill(log_weight == float("-inf"), float("-inf")).amax(dim=1)
    return (margin + hardest - positive).relu().mean()
