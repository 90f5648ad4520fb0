"""Negatives for `conditioning: contrastive`: which captions an image is conditioned on besides its own.

Scoring all N x N pairs of a batch, each with its own knowledge, costs N forward passes an image. Instead m negatives are
drawn where the frozen CLIP is most confused, and the loss undoes the bias of the draw (`candidate_contrastive_loss`).
Always taking the m hardest would teach that what CLIP finds similar is wrong: the coarse ranking is unlearnt.
"""

import math
from typing import NamedTuple

import numpy as np
import torch


class Negatives(NamedTuple):
    """m negatives for each of B rows: columns int64 (B, m) and log importance weights (B, m), -inf for "none left"."""

    index: torch.Tensor
    log_weight: torch.Tensor


def draw_negatives(cosines: torch.Tensor, forbidden: torch.Tensor, noise: torch.Tensor, m: int, scale: float,
                   uniform: float = 0.1) -> Negatives:  # fmt: skip
    """Draws m distinct negatives a row with q = (1 - uniform) softmax(scale * cosines) + uniform / N.

    The uniform part bounds the importance weights at N / (uniform m) (defensive importance sampling).

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
    log_weight = -log_q.gather(1, index) - math.log(m)
    return Negatives(index, log_weight.masked_fill(forbidden.gather(1, index), float("-inf")))


def gumbel_noise(rows: int, columns: int, seed: int, step: int, direction: int) -> torch.Tensor:
    """Standard Gumbel noise (rows, columns) of a step, the same on every rank and device."""
    return torch.from_numpy(np.random.default_rng([seed, step, direction]).gumbel(size=(rows, columns))).float()
