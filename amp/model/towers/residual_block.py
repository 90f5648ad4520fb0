"""open_clip's plain transformer block, computed without `nn.MultiheadAttention`."""

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock

KeysValues = tuple[torch.Tensor, torch.Tensor]
"""A block's keys and values of some tokens, split into heads, (B, H, T, width / H) each."""


def residual_block(
    block: ResidualAttentionBlock,
    tokens: torch.Tensor,
    mask: torch.Tensor | None = None,
    queries: slice | torch.Tensor | None = None,
    past: KeysValues | None = None,
) -> torch.Tensor:
    """Computes a block for the tokens `queries`, or for all, (B, T, width) -> (B, Q, width).

    `nn.MultiheadAttention` multiplies each position of the batch by the frozen weights in a product of its own. On the
    CPU, this takes up to five times as long as one product for all (measured: a ViT-B/16 block, forward and backward in
    bf16, 8 images, 1.43 s in place of 0.31 s). Only its path for evaluation without a mask doesn't.

    Args:
        block: The block, with frozen weights.
        tokens: Its input.
        mask: As in `F.scaled_dot_product_attention`: bool, true for allowed pairs, or float, added to the logits.
        queries: Indices of Q tokens to compute; all T tokens are keys and values.
        past: The block's `keys_values` of P tokens before these, which are attended to first.
    """
    attention, normed = block.attn, block.ln_1(tokens)
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    if queries is None:
        projected = F.linear(normed, weight, bias).chunk(3, dim=-1)
    else:
        width = normed.shape[-1]
        query = F.linear(normed[:, queries], weight[:width], bias[:width])
        projected = query, *F.linear(normed, weight[width:], bias[width:]).chunk(2, dim=-1)
    query, key, value = (_heads(block, x) for x in projected)
    if past is not None:
        key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    read = tokens if queries is None else tokens[:, queries]
    x = read + block.ls_1(attention.out_proj(attended.transpose(1, 2).flatten(2)))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def keys_values(block: ResidualAttentionBlock, tokens: torch.Tensor) -> KeysValues:
    """A block's keys and values of its input (B, T, width)."""
    weight, bias, width = block.attn.in_proj_weight, block.attn.in_proj_bias, tokens.shape[-1]
    key, value = F.linear(block.ln_1(tokens), weight[width:], bias[width:]).chunk(2, dim=-1)
    return _heads(block, key), _heads(block, value)


def _heads(block: ResidualAttentionBlock, x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2)
