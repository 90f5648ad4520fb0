"""Action-aware adaptive interaction, AIM: patches attend to the knowledge of a caption (paper, eq. 7-8)."""

import contextlib

import torch
import torch.nn as nn
import torch.nn.functional as F


class CrossAttention(nn.Module):
    """Cross-Attn of eq. 7: patches are queries, prompts are keys and values.

    This is the reading under which the shapes of eq. 8 fit, where A is M x M: the output has one row per patch.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, queries: torch.Tensor, prompts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Attends from the patches to the prompts.

        Args:
            queries: Projected patches (P, M, d_v), i.e. `self.query(patches)`. They don't depend on the knowledge, so a
                caller with many captions per image projects each image only once.
            prompts: Prompts (P, K, d_v).
            mask: Which prompts exist, bool (P, K), at least one True per row.

        Returns:
            Attended prompts (P, M, d_v).
        """
        k, v = self.key_value(prompts).chunk(2, dim=-1)
        q, k, v = (split_heads(x, self.heads) for x in (queries, k, v))
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])))


class SelfAttentionWithMap(nn.Module):
    """Self-Attn of eq. 7: returns the attended values and the attention map averaged over heads.

    The M x M map of each head is materialised. The alternative, the mean over heads of SDPA(q_h, k_h, V), needs no map
    but multiplies d_v channels per head: 16 times the work of eq. 8's product for ViT-L/14-336 (counted, 10.9 against
    0.68 GFLOP per image). It would save 21 MB of bf16 activations per image, about what one frozen block keeps.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(P, M, d_v) -> values V_cs (P, M, d_v) and map A_cs (P, M, M), whose rows sum to one."""
        q, k, v = (split_heads(y, self.heads) for y in self.qkv(x).chunk(3, dim=-1))
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        # The maps are the largest tensors here. Autocast would keep them in fp32, although softmax and sum accumulate
        # in fp32 anyway. On the CPU, `mean` of bf16 takes nine times as long as `sum`.
        with as_they_are(scores.device.type):
            attention = scores.softmax(dim=-1)
            average = attention.sum(dim=1) / self.heads
        return self.out(merge_heads(attention @ v)), average


def as_they_are(device_type: str) -> contextlib.AbstractContextManager:
    """Disables autocast, which doesn't exist for tensors on the meta device."""
    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


class ActionAwareInteraction(nn.Module):
    """AIM: V = MLP([V^t; V^s]), V~ = (lam A^t + (1 - lam) A^s) V (eq. 7-8).

    With `residual` (our choice, default), P~ = LN(E) + CrossAttn(E, p), and patches become E + gate * rms(E) * LN(V~).
    Without the sum, P~ would contain only knowledge: for a caption with a single triplet, all patches would get the
    same row, and A would be uniform. With it, the maps compare patches given the knowledge. The gate, one number per
    channel, starts at zero: at step 0 patches pass through unchanged, and training starts from CLIP's features. The
    normalisation gives the gate a useful gradient: V~ has passed seven linear maps and two averages, and the scale of
    patches differs tenfold between towers.

    Without `residual`, patches become V~ of P~ = CrossAttn(E, p), the literal equations.

    Patches are normalised before the attention (our choice), because deep in the tower their scale is far from that
    of the prompts.
    With only one kind of prompts (Table 2), V~ = A V with V = MLP of that kind's values, and `lam` has no effect.

    Args:
        width: Channels of the vision tower, d_v.
        heads: Attention heads, as many as in a vision block (our choice).
        lam: Weight of the triplets' map (paper: 0.7).
        residual: See above.
        triplets, states: Whether there are triplet prompts and state prompts, at least one of them.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        lam: float = 0.7,
        residual: bool = True,
        triplets: bool = True,
        states: bool = True,
    ):
        super().__init__()
        self.lam = lam
        self.norm = nn.LayerNorm(width)
        self.cross_triplet = CrossAttention(width, heads) if triplets else None
        self.cross_state = CrossAttention(width, heads) if states else None
        self.self_triplet = SelfAttentionWithMap(width, heads) if triplets else None
        self.self_state = SelfAttentionWithMap(width, heads) if states else None
        kinds = triplets + states
        self.mlp = nn.Sequential(nn.Linear(kinds * width, width), nn.GELU(), nn.Linear(width, width))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False) if residual else None
        self.gate = nn.Parameter(torch.zeros(width)) if residual else None
        for module in self.modules():
            if isinstance(module, nn.Linear):  # preserves the scale; the default shrinks it by 1.7 per layer
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        patches: torch.Tensor,
        triplet_prompts: torch.Tensor | None,
        state_prompts: torch.Tensor | None,
        mask: torch.Tensor,
        image_index: torch.Tensor,
        return_maps: bool = False,
    ):
        """Conditions patches on knowledge, one row per pair of an image and a caption.

        Args:
            patches: E, (B, M, d_v), one row per image.
            triplet_prompts: p_0^t of the pairs' captions (P, K, d_v), or None without triplets.
            state_prompts: p_0^s of the pairs' captions (P, K, d_v), or None without states.
            mask: Which prompts exist, bool (P, K), at least one True per row.
            image_index: The image of each pair, int64 (P,) with values below B.
            return_maps: Also return A^t and A^s, for visualisation.

        Returns:
            Conditioned patches (P, M, d_v); with `return_maps` also A^t and A^s, each (P, M, M) or None.
        """
        normed = self.norm(patches.to(self.norm.weight.dtype))  # the frozen tower may be in low precision
        pairs = normed[image_index] if self.gate is not None else None
        values: list[torch.Tensor] = []
        maps: list[torch.Tensor | None] = []
        for cross, attend, prompts in (
            (self.cross_triplet, self.self_triplet, triplet_prompts),
            (self.cross_state, self.self_state, state_prompts),
        ):
            if cross is None or attend is None:
                maps.append(None)
                continue
            augmented = cross(cross.query(normed)[image_index], prompts, mask)
            value, attention = attend(augmented if pairs is None else pairs + augmented)
            values.append(value)
            maps.append(attention)
        value = self.mlp(torch.cat(values, dim=-1))
        map_t, map_s = maps
        if map_t is not None and map_s is not None:
            attention = self.lam * map_t + (1 - self.lam) * map_s
        else:
            attention = map_s if map_t is None else map_t
        enhanced = attention.to(value.dtype) @ value
        if self.gate is not None and self.norm_out is not None:
            # In units of the patches' own scale, which differs tenfold between towers and depths.
            scale = patches.float().square().mean(dim=(1, 2), keepdim=True).sqrt()
            update = self.gate * scale[image_index] * self.norm_out(enhanced)
            enhanced = patches[image_index] + update.to(patches.dtype)
        return (enhanced, map_t, map_s) if return_maps else enhanced


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, T, D) -> (B, heads, T, D / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """(B, heads, T, D / heads) -> (B, T, D)."""
    return x.transpose(1, 2).flatten(-2)
