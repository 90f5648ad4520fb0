"""The transformer block of all trained encoders: pre-norm, GELU and a four times wider MLP, like CLIP's own blocks."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class TransformerBlock(nn.TransformerEncoderLayer):
    """A block on (B, T, width) with torch's parameters and the same computation in every mode.

    torch's own `forward` has a separate path for evaluation. Under autocast on the CPU, that path keeps the residual
    stream in bf16, unlike training. Under a dispatch mode (FLOP counting), it mixes types and fails.
    """

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)

    def forward(self, x: torch.Tensor, absent: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        """Tokens (B, T, width) to tokens of the same shape. No token attends to `absent` ones, bool (B, T)."""
        normed = self.norm1(x)
        x = x + self.self_attn(normed, normed, normed, key_padding_mask=absent, need_weights=False)[0]
        return x + self.linear2(F.gelu(self.linear1(self.norm2(x))))
