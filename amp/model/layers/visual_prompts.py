"""Learnable visual prompts, independent for each block (paper, sec. 3.3; VPT-deep, arXiv 2203.12119)."""

import math

import torch
import torch.nn as nn


class VisualPrompts(nn.Module):
    """N prompts for each block from the first prompted one on. They replace those of the block before.

    Args:
        depth: Number of blocks that get prompts.
        num_prompts: Prompts per block, N; 0 leaves the sequence unchanged.
        width: Channels of the vision tower, d_v.
        patch_size: Patch height and width in pixels, which determine VPT's initialisation range.
    """

    def __init__(self, depth: int, num_prompts: int, width: int, patch_size: tuple[int, int]):
        super().__init__()
        self.num_prompts = num_prompts
        bound = math.sqrt(6.0 / (3 * patch_size[0] * patch_size[1] + width))
        self.prompts = nn.Parameter(torch.empty(depth, num_prompts, width).uniform_(-bound, bound))

    def forward(self, tokens: torch.Tensor, index: int, length: int) -> torch.Tensor:
        """[CLS, patches, ...] (B, >= length, d_v) -> [CLS, patches, P_index] (B, length + N, d_v)."""
        if self.num_prompts == 0:
            return tokens
        prompts = self.prompts[index].to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        return torch.cat([tokens[:, :length], prompts], dim=1)
