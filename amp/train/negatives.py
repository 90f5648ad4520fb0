"""Negatives for `conditioning: contrastive`: captions that an image is conditioned on in addition to its own.

Scoring all N x N pairs of a batch, each with its own knowledge, costs N forward passes per image. Instead, m negatives
are drawn where the frozen CLIP is most confused, and weights correct the bias of the draw. Always taking the m hardest
would teach the model that what CLIP finds similar is wrong, and it would unlearn the coarse ranking.
"""

from typing import NamedTuple

import numpy as np
import torch


class Negatives(NamedTuple):
    """m negatives for each of B rows: columns int64 (B, m) and log importance weights (B, m), -inf if none is left."""

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
    """Draws m distinct negatives per row with q = (1 - uniform) softmax(scale * cosines) + uniform / N.

    The expectation of the weighted sum over the m negatives is the sum over all negatives. The uniform part bounds the
    weights at N / (uniform m) + 1 (defensive importance sampling).

    Args:
        cosines: The frozen CLIP's cosines (B, N).
        forbidden: Columns that are not negatives of a row: its own and other captions of its image, bool (B, N).
        noise: Standard Gumbel noise (B, N), seeded by the caller.
        m: Negatives per row.
        scale: The frozen CLIP's 1 / tau.
        uniform: Fraction of the uniform part.
    """
    allowed = ~forbidden
    soft = (scale * cosines.float()).masked_fill(forbidden, float("-inf")).softmax(dim=1).nan_to_num(0.0)
    flat = allowed.float() / allowed.sum(dim=1, keepdim=True).clamp(min=1)
    log_q = ((1 - uniform) * soft + uniform * flat).log()
    index = (log_q + noise).masked_fill(forbidden, float("-inf")).topk(m, dim=1).indices
    # The Gumbel trick orders the m as if drawn one after another without replacement, for which 1 / (m q) would be
    # biased. After each draw, the sum of the earlier terms plus this term, divided by its share of what was left,
    # estimates the whole sum (Des Raj 1956). The weights are the mean of these m estimates.
    q = log_q.gather(1, index).exp()
    left = torch.maximum(1 - (q.cumsum(dim=1) - q), q)  # at least its own share, despite rounding
    later = torch.arange(m - 1, -1, -1, device=q.device)
    log_weight = ((left / q + later) / m).log()
    return Negatives(index, log_weight.masked_fill(forbidden.gather(1, index), float("-inf")))


def gumbel_noise(rows: int, columns: int, seed: int, step: int, direction: int) -> torch.Tensor:
    """Standard Gumbel noise (rows, columns) of a step, the same on every rank and device."""
    return torch.from_numpy(np.random.default_rng([seed, step, direction]).gumbel(size=(rows, columns))).float()
