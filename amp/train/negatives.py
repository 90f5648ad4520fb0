"""Negatives for `conditioning: contrastive`: which captions an image is conditioned on besides its own.

Scoring all N x N pairs of a batch, each with its own knowledge, costs N forward passes an image. Instead m negatives
are drawn where the frozen CLIP is most confused, and their weights undo the bias of the draw. Always taking the m
hardest would teach that what CLIP finds similar is wrong: the coarse ranking is unlearnt.
"""

from typing import NamedTuple

import numpy as np
import torch


class Negatives(NamedTuple):
    """m negatives for each of B rows: columns int64 (B, m) and log importance weights (B, m), -inf for "none left"."""

    columns: torch.Tensor
    log_weight: torch.Tensor


def draw_negatives(
    cosines: torch.Tensor,
    forbidden: torch.Tensor,
    noise: torch.Tensor,
    m: int,
    scale: float | torch.Tensor,
    uniform: float = 0.1,
) -> Negatives:
    """Draws m distinct negatives a row with q = (1 - uniform) softmax(scale * cosines) + uniform / N.

    The weighted sum over the m has the sum over all negatives as its expectation. The uniform part bounds the weights
    at N / (uniform m) + 1 (defensive importance sampling).

    Args:
        cosines: The frozen CLIP's, (B, N).
        forbidden: Columns that are no negatives of a row: its own and other captions of its image, bool (B, N).
        noise: Standard Gumbel noise (B, N), so that the draw is the caller's to seed.
        m: Negatives a row.
        scale: The frozen CLIP's 1 / tau.
        uniform: Share of the uniform part.
    """
    allowed = ~forbidden
    soft = (scale * cosines.float()).masked_fill(forbidden, float("-inf")).softmax(dim=1).nan_to_num(0.0)
    flat = allowed.float() / allowed.sum(dim=1, keepdim=True).clamp(min=1)
    log_q = ((1 - uniform) * soft + uniform * flat).log()
    index = (log_q + noise).masked_fill(forbidden, float("-inf")).topk(m, dim=1).indices
    # The Gumbel trick lists the m as if drawn one after another without replacement, where 1 / (m q) would be biased.
    # After each draw, the terms drawn before plus this one by its share of what was left estimate the whole sum
    # (Des Raj 1956); the weights are the mean of these m estimates.
    q = log_q.gather(1, index).exp()
    left = torch.maximum(1 - (q.cumsum(dim=1) - q), q)  # at least its own share, whatever the rounding
    later = torch.arange(m - 1, -1, -1, device=q.device)
    log_weight = ((left / q + later) / m).log()
    return Negatives(index, log_weight.masked_fill(forbidden.gather(1, index), float("-inf")))


def gumbel_noise(rows: int, columns: int, seed: int, step: int, direction: int) -> torch.Tensor:
    """Standard Gumbel noise (rows, columns) of a step, the same on every rank and device."""
    return torch.from_numpy(np.random.default_rng([seed, step, direction]).gumbel(size=(rows, columns))).float()
