"""The paper's equations written naively, one sample, one head and one row at a time, from a layer's weights.

Nothing here calls the layers' own forward passes, so that a test which compares with it can fail.
"""

import math

import torch


def linear(x, layer):
    y = torch.einsum("...i,oi->...o", x, layer.weight)
    return y if layer.bias is None else y + layer.bias


def layer_norm(x, layer=None):
    """With a layer its scale and shift, without one neither."""
    centred = x - x.mean(dim=-1, keepdim=True)
    normed = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    return normed if layer is None else normed * layer.weight + layer.bias


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def attention(queries, keys, values, heads):
    """Multi-head attention of one sample; queries (T, D), keys, values (S, D) -> values (T, D), map (heads, T, S)."""
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
    """Tokens of a slot (S, d_t) to their mean over those that exist; no token at all is a zero vector."""
    present = [token for token, exists in zip(embedded, token_mask, strict=True) if exists]
    return sum(present) / len(present) if present else torch.zeros_like(embedded[0])


def transformer_block(x, block):
    """One pre-norm transformer block over the T tokens of a set (T, d_t), every one of which exists."""
    own = block.self_attn
    q, k, v = (torch.einsum("ti,oi->to", layer_norm(x, block.norm1), own.in_proj_weight) + own.in_proj_bias).chunk(3, 1)
    x = x + linear(attention(q, k, v, own.num_heads)[0], own.out_proj)
    return x + linear(gelu(linear(layer_norm(x, block.norm2), block.linear1)), block.linear2)


def triplet_prompts(encoder, embedded, token_mask, mask):
    """p_t of one caption: embedded (K, 3, S, d_t) -> (number of its triplets or 1 null token, d_t)."""
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
    return linear(linear(layer_norm(prompts, adapter.norm), adapter.down).clamp(min=0), adapter.up)


# -- eq. 7-8: the interaction -----------------------------------------------------------------------------------------


def cross_attention(patches, prompts, layer):
    """Normalised patches (M, d_v) ask, a caption's prompts (K, d_v) answer -> (M, d_v)."""
    width = patches.shape[1]
    k, v = (linear(prompts, layer.key_value)[:, part] for part in (slice(0, width), slice(width, None)))
    return linear(attention(linear(patches, layer.query), k, v, layer.heads)[0], layer.out)


def self_attention(x, layer):
    """(M, d_v) -> values (M, d_v) and the map averaged over heads (M, M)."""
    q, k, v = linear(x, layer.qkv).chunk(3, dim=1)
    values, maps = attention(q, k, v, layer.heads)
    return linear(values, layer.out), sum(maps) / layer.heads


def interact(aim, patches, triplets, states):
    """Conditioned patches of one image and one caption (M, d_v), and the maps A^t and A^s (M, M).

    Without a gate the literal eq. 7-8; with one, P~ keeps the patches, and V~ is added to them, normalised and in their
    scale.
    """
    normed = layer_norm(patches, aim.norm)
    augmented_t = cross_attention(normed, triplets, aim.cross_triplet)
    augmented_s = cross_attention(normed, states, aim.cross_state)
    if aim.gate is not None:
        augmented_t, augmented_s = normed + augmented_t, normed + augmented_s
    value_t, map_t = self_attention(augmented_t, aim.self_triplet)
    value_s, map_s = self_attention(augmented_s, aim.self_state)
    value = linear(gelu(linear(torch.cat([value_t, value_s], dim=1), aim.mlp[0])), aim.mlp[2])
    enhanced = (aim.lam * map_t + (1 - aim.lam) * map_s) @ value
    if aim.gate is not None:
        scale = math.sqrt(sum(float(x) ** 2 for x in patches.flatten()) / patches.numel())
        enhanced = patches + aim.gate * scale * layer_norm(enhanced)
    return enhanced, map_t, map_s


# -- the whole image encoder ------------------------------------------------------------------------------------------


def prompts_of(model, knowledge, row):
    """p_0^t and p_0^s of row `row` of a KnowledgeBatch, each (K, d_v), by a model of ``aim`` or ``cat``."""
    own, mask = model.interaction, knowledge.mask[row]
    embedded = model.backbone.embed_tokens(knowledge.triplet_tokens[row])
    triplets = triplet_prompts(model.triplet_encoder, embedded, knowledge.token_mask[row], mask)
    states = knowledge.states[row][mask] if mask.any() else own.null_state[None]
    if isinstance(own.state_projection, torch.nn.Linear):
        states = linear(states, own.state_projection)
    return adapt(triplets, own.adapter), adapt(states, own.adapter)


def action_aware_feature(model, image, knowledge, row, conditioned=True):
    """Feature (d,) of one image (3, H, W), conditioned on row `row` of a KnowledgeBatch or on visual prompts alone."""
    visual, first = model.backbone.clip.visual, model.tower.first
    tokens = visual._embeds(image[None])
    for block in visual.transformer.resblocks[:first]:
        tokens = block(tokens)
    cls, patches = tokens[0, :1], tokens[0, 1:]
    if conditioned:
        patches, *_ = interact(model.interaction.aim, patches, *prompts_of(model, knowledge, row))
    for i, block in enumerate(visual.transformer.resblocks[first:]):
        prompts = model.visual_prompts.prompts[i]
        tokens = block(torch.cat([cls, patches, prompts])[None])[0]
        cls, patches = tokens[:1], tokens[1 : 1 + len(patches)]  # what the block made of its prompts is dropped
    pooled, _ = visual._pool(torch.cat([cls, patches])[None])
    return (pooled @ visual.proj)[0]


# -- eq. 10-11: losses ------------------------------------------------------------------------------------------------


def contrastive(cosines, scale, image_ids):
    """Eq. 10, the mean of both directions; other pairs of the same image are left out of the sums."""
    n, total = len(cosines), 0.0
    for i in range(n):
        others = [j for j in range(n) if j == i or image_ids[j] != image_ids[i]]
        for row in ([cosines[i][j] for j in others], [cosines[j][i] for j in others]):
            total -= math.log(math.exp(scale * cosines[i][i]) / sum(math.exp(scale * c) for c in row)) / (2 * n)
    return total


def triplet(cosines, margin, image_ids):
    """Eq. 11 with d = 1 - cos, the mean of both directions; an image without negatives costs nothing."""
    n, total = len(cosines), 0.0
    for i in range(n):
        others = [j for j in range(n) if image_ids[j] != image_ids[i]]
        for row in ([cosines[i][j] for j in others], [cosines[j][i] for j in others]):
            nearest = min((1 - c for c in row), default=math.inf)
            total += max(0.0, margin + (1 - cosines[i][i]) - nearest) / (2 * n)
    return total
