"""A frozen CLIP whose image tower is open_clip's own VisionTransformer.

It uses `visual._embeds`, `visual.transformer.resblocks`, `visual._pool` and `visual.proj`.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer

from amp.errors import AmpError
from amp.model.towers.base import Backbone


class OpenClipBackbone(Backbone):
    """`Backbone` of a CLIP with open_clip's own VisionTransformer.

    Raises:
        AmpError: The image tower's tokens are not batch-first.
    """

    def __init__(self, clip: CLIP | CustomTextCLIP):
        super().__init__(clip)
        visual: VisionTransformer = self.visual
        # Since open_clip 4 this attribute doesn't exist and tokens are always batch-first.
        if not getattr(visual.transformer, "batch_first", True):
            raise AmpError("image tower has batch_first=False, expected True, the default of open_clip")
        self.vision_width = visual.conv1.out_channels
        self.vision_heads = visual.transformer.resblocks[0].attn.num_heads
        self.num_layers = len(visual.transformer.resblocks)
        self.grid_size = tuple(visual.grid_size)
        self.patch_size = tuple(visual.patch_size)
        self.num_prefix = 1
        self.embed_dim = visual.output_dim

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    @property
    def quick_gelu(self) -> bool:
        return isinstance(self.visual.transformer.resblocks[0].mlp.gelu, QuickGELU)

    @property
    def _layers(self) -> Sequence[nn.Module]:
        return self.visual.transformer.resblocks

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return self.visual._embeds(images.to(self.dtype))

    def blocks(self, tokens: torch.Tensor, start: int, stop: int, recompute: bool = False) -> torch.Tensor:
        for block in self._layers[start:stop]:
            tokens = self._run(block, tokens, recompute)
        return tokens

    def prompted_block(
        self,
        index: int,
        tokens: torch.Tensor,
        recompute: bool = False,
        absent: torch.Tensor | None = None,
        all_tokens: bool = False,
    ) -> torch.Tensor:
        block: Callable[[torch.Tensor], torch.Tensor] = self._layers[index]
        if index == self.num_layers - 1 and self._reads_only_class_token and not all_tokens:
            block = partial(self._last_block, absent=absent)
        elif absent is not None:
            block = partial(self._plain_block, block, absent=absent)
        return self._run(block, tokens, recompute)

    @property
    def _reads_only_class_token(self) -> bool:
        """Whether features come only from the class token of the last block."""
        return type(self._layers[-1]) is ResidualAttentionBlock and self.keeps_patches

    @property
    def keeps_patches(self) -> bool:
        # Other pooling types return other tokens.
        return self.visual.attn_pool is None and self.visual.pool_type == "tok"

    @property
    def masks_tokens(self) -> bool:
        return all(type(block) is ResidualAttentionBlock for block in self._layers)

    def _last_block(self, tokens: torch.Tensor, absent: torch.Tensor | None = None) -> torch.Tensor:
        """Computes the last block only for the class token, (B, T, d_v) -> (B, 1, d_v).

        All tokens are keys and values, but only the class token is a query and passes through the MLP. This costs about
        a fifth of a block, which matters if few blocks run per pair. The result equals that of the whole block, except
        for rounding.
        """
        return self._plain_block(self._layers[-1], tokens, 1, absent)

    @staticmethod
    def _plain_block(
        block: ResidualAttentionBlock,
        tokens: torch.Tensor,
        queries: int | None = None,
        absent: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes a block for the first `queries` tokens, or for all, (B, T, d_v) -> (B, queries, d_v).

        No token attends to `absent` ones, bool (B, T).
        """
        attention = block.attn
        normed = block.ln_1(tokens)
        # With fewer queries than keys, nn.MultiheadAttention copies its weights once per token on the CPU (a third of
        # the time of a pair), so its projections are applied here.
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        width, heads = normed.shape[-1], attention.num_heads
        query = F.linear(normed[:, :queries], weight[:width], bias[:width])
        key, value = F.linear(normed, weight[width:], bias[width:]).chunk(2, dim=-1)
        query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
        present = None if absent is None else ~absent[:, None, None, :]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=present)
        x = tokens[:, :queries] + block.ls_1(attention.out_proj(attended.transpose(1, 2).flatten(2)))
        return x + block.ls_2(block.mlp(block.ln_2(x)))

    def pooled(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.visual._pool(tokens[:, : self.num_tokens])

    def project(self, pooled: torch.Tensor) -> torch.Tensor:
        return pooled if self.visual.proj is None else pooled @ self.visual.proj

    @property
    def pooled_width(self) -> int:
        return self.embed_dim if self.visual.proj is None else self.visual.proj.shape[0]
