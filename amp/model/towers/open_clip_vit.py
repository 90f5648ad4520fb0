"""A frozen CLIP whose image tower is open_clip's own VisionTransformer.

It uses `visual._embeds`, `visual.transformer.resblocks`, `visual._pool` and `visual.proj`.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn as nn
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer

from amp.errors import AmpError
from amp.model.towers.base import Backbone
from amp.model.towers.residual_block import residual_block


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
        for index in range(start, stop):
            tokens = self._run(self._block(index), tokens, recompute)
        return tokens

    def _block(self, index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """The block, bit for bit as in the base model where it is evaluated."""
        block = self._layers[index]
        if torch.is_grad_enabled() and type(block) is ResidualAttentionBlock:
            return partial(residual_block, block)
        return block

    def prompted_block(
        self,
        index: int,
        tokens: torch.Tensor,
        recompute: bool = False,
        absent: torch.Tensor | None = None,
        all_tokens: bool = False,
    ) -> torch.Tensor:
        # If features come only from the class token, only that token needs to be a query of the last block and to pass
        # through its MLP. This costs about a fifth of a block, which matters if few blocks run per pair.
        only_class = index == self.num_layers - 1 and self._reads_only_class_token and not all_tokens
        block = self._block(index)
        if only_class or absent is not None:
            present = None if absent is None else ~absent[:, None, None, :]
            block = partial(residual_block, self._layers[index], mask=present, queries=slice(1) if only_class else None)
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

    def pooled(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.visual._pool(tokens[:, : self.num_tokens])

    def project(self, pooled: torch.Tensor) -> torch.Tensor:
        return pooled if self.visual.proj is None else pooled @ self.visual.proj

    @property
    def pooled_width(self) -> int:
        return self.embed_dim if self.visual.proj is None else self.visual.proj.shape[0]
