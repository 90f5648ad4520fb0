"""The feature of one image conditioned on captions' prompts (eq. 8-9), for image towers of open_clip and timm."""

import math
from functools import partial

import torch
from timm.models.vision_transformer import ResPostBlock
from torch.nn import functional as F

from support.equations.layers import (
    adapt,
    cross_attention,
    gelu,
    layer_norm,
    linear,
    self_attention,
    triplet_prompts,
)


def image_feature(model, image, prompts=None):
    """Feature (d,) of one image (3, H, W).

    Args:
        model: Model with the interaction ``aim`` or ``cat``.
        image: Output of the model's transform.
        prompts: Prompts (n, d_v) by kind; without them only visual prompts are used.
    """
    tower = tower_of(model.backbone.clip.visual)
    tokens = early_tokens(tower, image, model.tower.first)
    joined = tokens[:0]
    if prompts and model.config.interaction == "aim":
        patches, *_ = interact(model.interaction.aim, tokens[tower.prefix :], **prompts)
        tokens = torch.cat([tokens[: tower.prefix], patches])
    elif prompts:
        joined = torch.cat(list(prompts.values()))
    return tower.pool(late_tokens(model, tower, tokens, joined))


def feature_under(model, image, items):
    """`image_feature` for the concatenated knowledge of several captions, without padding."""
    parts = [prompts_from_text(model, item) for item in items]
    return image_feature(model, image, {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]})


def early_tokens(tower, image, blocks):
    """Tokens (T, d_v) of one image after the first `blocks` blocks."""
    tokens = tower.embed(image)
    for index in range(blocks):
        tokens = tower.run(index, tokens)
    return tokens


def late_tokens(model, tower, tokens, joined=None):
    """Tokens (T, d_v) after the last block. Each block has its own visual prompts; `joined` runs through all."""
    length = len(tokens)
    tokens = tokens if joined is None else torch.cat([tokens, joined])
    kept = len(tokens)
    for depth, index in enumerate(range(model.tower.first, len(tower.blocks))):
        # A block's outputs for its visual prompts are dropped.
        tokens = tower.run(index, torch.cat([tokens[:kept], model.visual_prompts.prompts[depth]]))
    return tokens[:length]


# -- eq. 7-8: the interaction -----------------------------------------------------------------------------------------


def interact(aim, patches, triplets=None, states=None):
    """Conditioned patches (M, d_v) of one image and one caption, and one map (M, M) per kind of prompts.

    Without a gate this is eq. 7-8 literally. With a gate, P~ has a residual connection to the patches, and V~ is
    normalized, rescaled to the patches and added to them. With one kind of prompts V~ = A V, where V is the MLP of the
    values of this kind.
    """
    normed, values, maps = layer_norm(patches, aim.norm), [], []
    for kind, prompts in (("triplet", triplets), ("state", states)):
        if prompts is not None:
            augmented = cross_attention(normed, prompts, getattr(aim, f"cross_{kind}"))
            augmented = augmented if aim.gate is None else normed + augmented
            value, attended = self_attention(augmented, getattr(aim, f"self_{kind}"))
            values.append(value)
            maps.append(attended)
    value = linear(gelu(linear(torch.cat(values, dim=1), aim.mlp[0])), aim.mlp[2])
    mixed = aim.lam * maps[0] + (1 - aim.lam) * maps[1] if len(maps) == 2 else maps[0]
    enhanced = mixed @ value
    if aim.gate is not None:
        enhanced = patches + aim.gate * patches.square().mean().sqrt() * layer_norm(enhanced)
    return enhanced, *maps


# -- prompts of a caption ---------------------------------------------------------------------------------------------


def prompts_of(model, knowledge, row):
    """Prompts (n, d_v) of row `row` of a KnowledgeBatch, for each kind that the model reads."""
    mask, kinds = knowledge.mask[row], {}
    if model.config.knowledge in ("both", "triplets"):
        embedded = model.backbone.embed_tokens(knowledge.triplet_tokens[row])
        triplets = triplet_prompts(model.triplet_encoder, embedded, knowledge.token_mask[row], mask)
        kinds["triplets"] = adapt(triplets, model.interaction.adapter)
    if model.config.knowledge != "triplets":
        states = knowledge.states[row][mask] if mask.any() else model.interaction.null_state[None]
        kinds["states"] = _state_prompts(model, states)
    return kinds


def prompts_from_text(model, item):
    """`prompts_of` for one caption given as text; the sentence of each triplet is encoded here."""
    kinds = prompts_of(model, model.prepare_knowledge([item]), 0)
    if "states" in kinds and item.triplets:
        tokens = model.tokenizer(sentences(item, model.config.knowledge))
        kinds["states"] = _state_prompts(model, model.backbone.clip.encode_text(tokens))
    return kinds


def _state_prompts(model, states):
    projection = model.interaction.state_projection
    states = linear(states, projection) if isinstance(projection, torch.nn.Linear) else states
    return adapt(states, model.interaction.adapter)


def sentences(item, knowledge: str) -> list[str]:
    """The paper's sentence for each triplet of a caption: actions first, at most six."""
    pairs = list(zip(item.triplets, item.states, strict=True))
    pairs = [p for p in pairs if p[0].kind == "action"] + [p for p in pairs if p[0].kind != "action"]
    if knowledge == "template":
        return [
            "A photo capturing a " + t.subject + " performing " + t.action + " in relation to " + t.object + "."
            for t, _ in pairs[:6]
        ]
    return [
        f"Fine-grained state description of action triplet <{t.subject}, {t.action}, {t.object}> is {state}"
        for t, state in pairs[:6]
    ]


# -- image towers -----------------------------------------------------------------------------------------------------


def tower_of(visual):
    """The naive implementation for the image tower of a CLIP."""
    return TimmTower(visual) if hasattr(visual, "trunk") else NativeTower(visual)


class NativeTower:
    """open_clip's image tower, run with its own blocks.

    Attributes:
        prefix: Number of tokens before the patches.
        blocks: Transformer blocks of the tower.
    """

    def __init__(self, visual):
        self.visual, self.prefix, self.blocks = visual, 1, visual.transformer.resblocks

    def embed(self, image):
        """Tokens (T, d_v) that enter block 0."""
        return self.visual._embeds(image[None])[0]

    def run(self, index, tokens):
        """Runs a block on the tokens of one image."""
        return self.blocks[index](tokens[None])[0]

    def pool(self, tokens):
        """Computes the feature (d,) from the tokens after the last block."""
        pooled, _ = self.visual._pool(tokens[None])
        return (pooled @ self.visual.proj)[0]


class TimmTower:
    """timm's image tower: its own embedding and head, but blocks computed head by head. See `NativeTower`."""

    def __init__(self, visual):
        self.visual, self.trunk = visual, visual.trunk
        self.prefix, self.blocks = visual.trunk.num_prefix_tokens, visual.trunk.blocks

    def embed(self, image):
        """Tokens (F + M, d_v) that enter block 0, captured by a hook in the tower's own forward pass."""
        seen = []
        with self.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0])):
            self.trunk(image[None])
        return seen[0][0]

    def run(self, index, tokens):
        """Runs a block on tokens (T, d_v) of one image. Only patches, not the F prefix tokens, get rotary embedding."""
        trunk, block, own = self.trunk, self.blocks[index], self.blocks[index].attn
        first, patches = self.prefix, trunk.patch_embed.num_patches
        rope = getattr(trunk, "rope", None)
        angles = None if rope is None else rope.get_embed(shape=list(trunk.patch_embed.grid_size))
        if angles is not None and angles.ndim == 4:
            angles = angles[index]

        def attend(x):
            if getattr(own, "q_proj", None) is not None:
                q, k, v = own.q_proj(x), own.k_proj(x), own.v_proj(x)
            else:
                q, k, v = F.linear(x, own.qkv.weight, own.qkv.bias).chunk(3, dim=1)
                if getattr(own, "q_bias", None) is not None:
                    q, v = q + own.q_bias, v + own.v_bias
            heads = []
            for h in range(own.num_heads):
                part = slice(h * own.head_dim, (h + 1) * own.head_dim)
                asks, keys = q[:, part].clone(), k[:, part].clone()
                if angles is not None:
                    turn = partial(rotated, angles=angles[h] if angles.ndim == 3 else angles)
                    for rows in (asks, keys):
                        rows[first : first + patches] = turn(rows[first : first + patches])
                heads.append((asks @ keys.T / math.sqrt(own.head_dim)).softmax(dim=1) @ v[:, part])
            return own.proj(own.norm(torch.cat(heads, dim=1)))

        def scaled(x, layer, weight):
            x = x if getattr(block, layer, None) is None else getattr(block, layer)(x)
            return x if getattr(block, weight, None) is None else getattr(block, weight) * x

        if isinstance(block, ResPostBlock) or type(block).__name__ == "EvaBlockPostNorm":
            tokens = tokens + block.norm1(attend(tokens))
            return tokens + block.norm2(block.mlp(tokens))
        tokens = tokens + scaled(attend(block.norm1(tokens)), "ls1", "gamma_1")
        return tokens + scaled(block.mlp(block.norm2(tokens)), "ls2", "gamma_2")

    def pool(self, tokens):
        """Computes the feature (d,) from the tokens (F + M, d_v) after the last block, with the tower's own head."""
        return self.visual.head(self.trunk.forward_head(self.trunk.norm(tokens[None])))[0]


def rotated(rows: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotates each pair of channels of (M, d_head), as a complex number, by its angle; angles are (sines, cosines)."""
    sine, cosine = angles.chunk(2, dim=-1)
    turned = torch.view_as_complex(rows.reshape(len(rows), -1, 2).contiguous()) * torch.complex(
        cosine[:, ::2].contiguous(), sine[:, ::2].contiguous()
    )
    return torch.view_as_real(turned).reshape(rows.shape)
