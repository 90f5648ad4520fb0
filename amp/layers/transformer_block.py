"""The transformer block of all trained encoders here: pre-norm, GELU, four times as wide inside, as CLIP's own."""

import torch.nn as nn


def transformer_block(width: int, heads: int) -> nn.TransformerEncoderLayer:
    """A block on (B, T, width)."""
    return nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
