"""Cosines of image and caption features, in fp32 regardless of the features' precision."""

import torch
import torch.nn.functional as F


def similarity(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Cosines of all pairs, fp32: (N, d) and (M, d) -> (N, M)."""
    return F.normalize(image.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T


def pair_similarity(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Cosines row by row, fp32: (P, d) and (P, d) -> (P,), or shapes that broadcast, such as (B, C, d) and (C, d)."""
    return F.cosine_similarity(image.float(), text.float(), dim=-1)
