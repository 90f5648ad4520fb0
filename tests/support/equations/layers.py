"""The layers of the model (eq. 4-7 and the readout), one sample, head and row at a time."""

import math

import torch
from torch.nn import functional as F


def linear(x, layer):
    """Applies a linear layer to x (..., in)."""
    y = torch.einsum("...i,oi->...o", x, layer.weight)
    return y if layer.bias is None else y + layer.bias


def layer_norm(x, layer=None):
    """Layer norm of x, with scale and shift of `layer` if it is given."""
    centred = x - x.mean(dim=-1, keepdim=True)
    normed = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    return normed if layer is None else normed * layer.weight + layer.bias


def gelu(x):
    """The exact GELU."""
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def attention(queries, keys, values, heads):
    """Multi-head attention of one sample: queries (T, D), keys/values (S, D) -> values (T, D), map (heads, T, S)."""
    size = queries.shape[1] // heads
    rows, maps = [], []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        scores = torch.stack([torch.stack([(q * k).sum() for k in keys[:, part]]) for q in queries[:, part]])
        weights = (scores / math.sqrt(size)).exp()
        weights = weights / weights.sum(dim=1, keepdim=True)
        rows.append(torch.einsum("ts,sd->td", weights, values[:, part]))
        maps.append(weights)
    return torch.cat(rows, dim=1), torch.stack(maps)


# -- eq. 4-5: action triplet prompts ----------------------------------------------------------------------------------


def slot_mean(embedded, token_mask):
    """Mean over the existing tokens of a slot (S, d_t); a zero vector if there is none."""
    present = [token for token, exists in zip(embedded, token_mask, strict=True) if exists]
    return sum(present) / len(present) if present else torch.zeros_like(embedded[0])


def transformer_block(x, block):
    """One pre-norm transformer block over a set of T tokens (T, d_t), without masked tokens."""
    own = block.self_attn
    q, k, v = (torch.einsum("ti,oi->to", layer_norm(x, block.norm1), own.in_proj_weight) + own.in_proj_bias).chunk(3, 1)
    x = x + linear(attention(q, k, v, own.num_heads)[0], own.out_proj)
    return x + linear(gelu(linear(layer_norm(x, block.norm2), block.linear1)), block.linear2)


def triplet_prompts(encoder, embedded, token_mask, mask):
    """p_t of one caption: embedded (K, 3, S, d_t) -> (n, d_t), where n is the number of triplets or 1 null token."""
    prompts = []
    for k in range(len(mask)):
        if mask[k]:
            slots = torch.cat([slot_mean(embedded[k, s], token_mask[k, s]) for s in range(3)])
            prompts.append(linear(layer_norm(slots, encoder.norm), encoder.project))
    prompts = torch.stack(prompts or [encoder.null])
    for block in encoder.blocks:
        prompts = transformer_block(prompts, block)
    return prompts


# -- eq. 6: the adapter -----------------------------------------------------------------------------------------------


def adapt(prompts, adapter):
    """The bottleneck adapter for the prompts of one caption: (K, d_t) -> (K, d_v)."""
    return linear(linear(layer_norm(prompts, adapter.norm), adapter.down).clamp(min=0), adapter.up)


# -- eq. 7: both attentions of the interaction ------------------------------------------------------------------------


def cross_attention(patches, prompts, layer):
    """Cross attention from normalized patches (M, d_v), as queries, to a caption's prompts (K, d_v) -> (M, d_v)."""
    width = patches.shape[1]
    k, v = (linear(prompts, layer.key_value)[:, part] for part in (slice(0, width), slice(width, None)))
    return linear(attention(linear(patches, layer.query), k, v, layer.heads)[0], layer.out)


def self_attention(x, layer):
    """Self attention of (M, d_v) -> values (M, d_v), and the map (M, M) averaged over heads."""
    q, k, v = linear(x, layer.qkv).chunk(3, dim=1)
    values, maps = attention(q, k, v, layer.heads)
    return linear(values, layer.out), sum(maps) / layer.heads


# -- the readout ------------------------------------------------------------------------------------------------------


def readout(layer, patches, text, states, triplets, mask):
    """f(I, K) - f(I) of one image and one caption, query by query and head by head, in float64.

    Args:
        layer: Weights of the readout by name, and its "width" per head.
        patches: Patches (M, d_v).
        text: Text feature (d,).
        states: State features (K, d).
        triplets: Encoded triplets (K, d_t).
        mask: Which of the K triplets exist.
    """

    def linear(name, x):
        return F.linear(x, layer[f"{name}.weight"], layer.get(f"{name}.bias"))

    queries = [linear("query_text", text / text.norm())]
    for k in mask.nonzero().flatten().tolist():
        queries.append(linear("query_text", states[k] / states[k].norm()) + linear("query_triplet", triplets[k]))
    key, value = linear("key", patches), linear("value", patches)
    answers = []
    for query in queries:
        heads = []
        for part in range(len(query) // layer["width"]):
            at = slice(part * layer["width"], (part + 1) * layer["width"])
            weights = torch.tensor([math.exp(float(query[at] @ k[at]) / math.sqrt(layer["width"])) for k in key])
            heads.append((weights.double() / weights.sum()) @ value[:, at])
        answers.append(torch.cat(heads))
    return linear("out", sum(answers) / len(answers))
