"""Knowledge-conditioned readout (ours): knowledge asks and the patches answer."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from amp.model.layers.interaction import merge_heads, split_heads
from amp.model.layers.transformer_block import TransformerBlock

HEAD_WIDTH = 64


class KnowledgeReadout(nn.Module):
    """What the patches say about a caption: f(I, K) = f(I) + W_o mean_q Attn(query q, patches).

    The other reading of eq. 7, where prompts are queries and patches are keys and values. The frozen blocks run once
    an image, so that all N x N pairs of a batch can be conditioned in training, each image on the knowledge of the
    text it is scored against, and a pair costs one small attention in re-ranking. Queries are the caption's own
    feature and one a triplet: its state's feature and its triplet prompt. W_o starts at zero: at step 0 the readout
    changes nothing.

    The patches are those behind the last block, or with `blocks` those before block `interaction_layer`, read by that
    many trained transformer blocks: what CLIP was not trained to tell apart its last blocks have forgotten, the
    early ones not yet (docs/ablations.md).

    Args:
        vision_width: Channels of the patches, d_v.
        embed_dim: Joint width, d, of features and queries.
        triplet_width: Channels of the triplet prompts, d_t; None where the model reads no triplets.
        conditioned: False builds the control, whose one learned query is the same for all captions.
        blocks: Trained transformer blocks in front of the readout.
        vision_heads: Their attention heads.
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
        """What is read: of the patches before block `interaction_layer` and behind the last one, both (B, M, d_v)."""
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
            (C, 1 + K, d), the caption's own first, and which exist, bool (C, 1 + K).
        """
        assert self.query_text is not None, "the control has one query of its own"
        own = self.query_text(unit(text, self.query_text.weight))[:, None]
        parts = [] if states is None else [self.query_text(unit(states, self.query_text.weight))]
        if triplets is not None:
            assert self.query_triplet is not None, "no triplet_width was given"
            parts.append(self.query_triplet(triplets))
        if not parts:
            return own, mask.new_ones(len(mask), 1)
        return torch.cat([own, sum(parts)], dim=1), F.pad(mask, (1, 0), value=True)

    def pairs(
        self, patches: torch.Tensor, queries: torch.Tensor, mask: torch.Tensor, image_index: torch.Tensor
    ) -> torch.Tensor:
        """Additions to the image features of P pairs: patches (B, M, d_v), queries (P, Q, d) and their mask (P, Q) of
        the pairs' captions, and the image of each pair, int64 (P,), to (P, d)."""
        key, value = (split_heads(layer(patches), self.heads)[image_index] for layer in (self.key, self.value))
        answers = merge_heads(F.scaled_dot_product_attention(split_heads(queries, self.heads), key, value))
        return self.out(masked_mean(answers, mask))

    def all_pairs(self, patches: torch.Tensor, queries: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The same for each of B images with each of C captions: (B, M, d_v), (C, Q, d), (C, Q) to (B, C, d).

        One attention an image, in which the queries of all captions stand side by side.
        """
        captions, count, width = queries.shape
        key, value = (split_heads(layer(patches), self.heads) for layer in (self.key, self.value))
        asked = split_heads(queries.reshape(1, captions * count, width), self.heads).expand(len(patches), -1, -1, -1)
        answers = merge_heads(F.scaled_dot_product_attention(asked, key, value))
        return self.out(masked_mean(answers.unflatten(1, (captions, count)), mask))

    def unconditioned(self, patches: torch.Tensor) -> torch.Tensor:
        """The control's addition (B, d), by the learned query."""
        assert self.query is not None, "only the control has a learned query"
        queries = self.query.to(patches.dtype).expand(len(patches), 1, -1)
        ones = torch.ones(len(patches), 1, dtype=torch.bool, device=patches.device)
        return self.pairs(patches, queries, ones, torch.arange(len(patches), device=patches.device))


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the Q rows that exist: (..., C, Q, d) and bool (C, Q) to (..., C, d)."""
    weight = mask.to(x.dtype) / mask.sum(dim=-1, keepdim=True).to(x.dtype)
    return (weight.unsqueeze(-2) @ x).squeeze(-2)


def in_type_of(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`x` in the type of a trained weight, since the frozen tower may be in low precision; under autocast, which
    chooses the type of each product itself, `x` as it is."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x
    return x.to(weight.dtype)


def unit(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Scaled to unit length in fp32, in the type of `like`."""
    return F.normalize(x.float(), dim=-1).to(like.dtype)
