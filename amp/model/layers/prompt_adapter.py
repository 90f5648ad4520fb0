"""The adapter that maps prompt features to the width of the image tower (paper, eq. 6)."""

import torch
import torch.nn as nn


class PromptAdapter(nn.Module):
    """p_0 = ReLU(LN(p) W_down) W_up, the bottleneck of eq. 6.

    Args:
        width: Channels of the input prompts.
        hidden: Channels of the bottleneck, t in the paper, much smaller than `width`.
        out_width: Channels of the vision tower, d_v.
    """

    def __init__(self, width: int, hidden: int, out_width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(hidden, out_width, bias=False)

    def forward(self, prompts: torch.Tensor) -> torch.Tensor:
        """(..., width) -> (..., out_width)."""
        return self.up(self.down(self.norm(prompts)).relu())
