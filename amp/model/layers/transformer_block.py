"""The transformer block of all trained encoders here: pre-norm, GELU, four times as wide inside, as CLIP's own."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class TransformerBlock(nn.TransformerEncoderLayer):
    """A block on (B, T, width) with torch's parameters, computed in one way in every mode.

    torch's own `forward` has a second way for evaluation. Under autocast on the CPU that way keeps the residual stream
    in bf16, unlike training, and under a dispatch mode (FLOP counting) it mixes types and fails.
    """

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)

    def forward(self, x: torch.Tensor, absent: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        """Tokens (B, T, width) to tokens of the same shape; nobody attends to `absent` ones, bool (B, T)."""
        normed = self.norm1(x)
        x = x + self.self_attn(normed, normed, normed, key_padding_mask=absent, need_weights=False)[0]
        return x + self.linear2(F.gelu(self.linear1(self.norm2(x))))
