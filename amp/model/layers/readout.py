"""Knowledge-conditioned readout (our choice): queries made from knowledge attend to the patches."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from amp.model.layers.interaction import merge_heads, split_heads
from amp.model.layers.transformer_block import TransformerBlock

HEAD_WIDTH = 64


class KnowledgeReadout(nn.Module):
    """Adds to the image feature what the patches show of a caption: f(I, K) = f(I) + W_o mean_q Attn(query q, patches).

    This is the other reading of eq. 7: prompts are queries, and patches are keys and values. The frozen blocks run once
    per image. Training can therefore condition all N x N pairs of a batch, each image on the knowledge of the text it
    is scored against, and re-ranking costs one small attention per pair. The queries are the caption's own feature and
    one query per triplet, made from its state's feature and its triplet prompt. W_o starts at zero, so at step 0 the
    readout changes nothing.

    The patches are those after the last block. With `blocks`, they are those before the first prompted block, read by
    that many trained transformer blocks: CLIP's last blocks discard detail its training did not need; earlier blocks
    still contain it (docs/ablations.md).

    Args:
        vision_width: Channels of the patches, d_v.
        embed_dim: Width of the joint embedding, d, of features and queries.
        triplet_width: Channels of the triplet prompts, d_t; None if the model reads no triplets.
        conditioned: False builds the control, with one learned query for all captions.
        blocks: Number of trained transformer blocks before the readout.
        vision_heads: Attention heads of these blocks.
    """

    def __init__(
        self,
        vision_width: int,
        embed_dim: int,
        triplet_width: int | None = None,
        conditioned: bool = True,
        blocks: int = 0,
        vision_heads: int = 1,
    ):
        super().__init__()
        fewest = math.ceil(embed_dim / HEAD_WIDTH)
        self.heads = next(heads for heads in range(fewest, embed_dim + 1) if embed_dim % heads == 0)
        self.blocks = None
        if blocks:
            self.blocks = nn.Sequential(
                nn.LayerNorm(vision_width),
                *(TransformerBlock(vision_width, vision_heads) for _ in range(blocks)),
                nn.LayerNorm(vision_width),
            )
        self.key = nn.Linear(vision_width, embed_dim)
        self.value = nn.Linear(vision_width, embed_dim, bias=False)
        self.out = nn.Linear(embed_dim, embed_dim, bias=False)
        nn.init.zeros_(self.out.weight)
        self.query_text = nn.Linear(embed_dim, embed_dim) if conditioned else None
        self.query_triplet = nn.Linear(triplet_width, embed_dim, bias=False) if conditioned and triplet_width else None
        self.query = None if conditioned else nn.Parameter(torch.randn(embed_dim))

    def patches(self, early: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Chooses the patches to read and runs the trained blocks on them.

        `early` are the patches before the first prompted block, `last` those after the last one, both (B, M, d_v).
        """
        read = in_type_of(self.key.weight, last if self.blocks is None else early)
        return read if self.blocks is None else self.blocks(read)

    def queries(
        self, text: torch.Tensor, states: torch.Tensor | None, triplets: torch.Tensor | None, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries of C captions.

        Args:
            text: Caption features (C, d).
            states: State features (C, K, d), or None.
            triplets: Triplet prompts (C, K, d_t), or None.
            mask: Which of the K exist, bool (C, K).

        Returns:
            Queries (C, 1 + K, d), the caption's own first, and which of them exist, bool (C, 1 + K).
        """
        assert self.query_text is not None, "the control has only its learned query"
        own = self.query_text(unit(text, self.query_text.weight))[:, None]
        parts = [] if states is None else [self.query_text(unit(states, self.query_text.weight))]
        if triplets is not None:
            assert self.query_triplet is not None, "no triplet_width was given"
            parts.append(self.query_triplet(triplets))
        if not parts:
            return own, mask.new_ones(len(mask), 1)
        return torch.cat([own, sum(parts)], dim=1), F.pad(mask, (1, 0), value=True)

    def keys_and_values(self, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches (B, M, d_v) to keys and values, each (B, heads, M, d / heads)."""
        return split_heads(self.key(patches), self.heads), split_heads(self.value(patches), self.heads)

    def pairs(self, key: torch.Tensor, value: torch.Tensor, queries: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Additions to the image features of P pairs, (P, d).

        Args:
            key, value: Keys and values of the pairs' images, each (P, heads, M, d / heads).
            queries: Queries of the pairs' captions (P, Q, d).
            mask: Which queries exist, bool (P, Q).
        """
        attended = merge_heads(F.scaled_dot_product_attention(split_heads(queries, self.heads), key, value))
        return self.out((attended * query_weights(mask, attended.dtype)[..., None]).sum(dim=-2))

    def all_pairs(
        self, key: torch.Tensor, value: torch.Tensor, queries: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Additions for all pairs of B images and C captions: queries (C, Q, d) and their mask (C, Q) to (B, C, d).

        Each image needs one attention, over the concatenated queries of all captions. The mean over a caption's queries
        and the product with the values commute, so the mean is taken of whichever is smaller: the attention weights or
        the values that they attend to.
        """
        captions, count, width = queries.shape
        # Query by query, so that the mean over a caption's queries adds contiguous blocks.
        joined = split_heads(queries.transpose(0, 1).reshape(1, count * captions, width), self.heads)
        weight = query_weights(mask, joined.dtype).T[..., None]
        patches, channels = key.shape[-2:]
        if patches <= channels:
            attention = (joined * channels**-0.5 @ key.transpose(-2, -1)).softmax(dim=-1)
            mean = (attention.unflatten(2, (count, captions)) * weight).sum(dim=2) @ value
        else:
            attended = F.scaled_dot_product_attention(joined.expand(len(key), -1, -1, -1), key, value)
            mean = (attended.unflatten(2, (count, captions)) * weight).sum(dim=2)
        return self.out(merge_heads(mean))

    def unconditioned(self, patches: torch.Tensor) -> torch.Tensor:
        """The control's addition (B, d), from its learned query."""
        assert self.query is not None, "only the control has a learned query"
        count = patches.shape[0]  # not `len`, which would make it constant in exports
        queries = self.query.to(patches.dtype).expand(count, 1, -1)
        ones = torch.ones(count, 1, dtype=torch.bool, device=patches.device)
        return self.pairs(*self.keys_and_values(patches), queries, ones)

    def attention(
        self, patches: torch.Tensor, states: torch.Tensor | None, triplets: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Attention maps of K queries over the patches of one image, averaged over heads.

        The triplet part and the state part of each query have separate maps.

        Args:
            patches: (1, M, d_v).
            states: State features (1, K, d), or None.
            triplets: Triplet prompts (1, K, d_t), or None.

        Returns:
            `triplet` and `state`, each (K, M). Parts that are None are left out.
        """
        assert self.query_text is not None, "the control has only its learned query"
        queries = {}
        if triplets is not None and self.query_triplet is not None:
            queries["triplet"] = self.query_triplet(triplets)
        if states is not None:
            queries["state"] = self.query_text(unit(states, self.query_text.weight))
        key, _ = self.keys_and_values(patches)
        found = {}
        for name, query in queries.items():
            query = split_heads(query, self.heads)
            scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
            found[name] = scores.float().softmax(dim=-1).mean(dim=1)[0]
        return found


def query_weights(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weights (C, Q) of a mean over the queries that exist, bool (C, Q)."""
    return mask.to(dtype) / mask.sum(dim=-1, keepdim=True).to(dtype)


def in_type_of(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Casts `x` to the type of a trained weight, because the frozen tower may be in low precision.

    Under autocast, which chooses the type of each product itself, `x` is unchanged.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x
    return x.to(weight.dtype)


def unit(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Scales to unit length in fp32 and casts to the type of `like`."""
    return F.normalize(x.float(), dim=-1).to(like.dtype)
