"""A frozen CLIP whose image tower is timm's VisionTransformer or Eva: SigLIP, EVA-02, Perception Encoder.

It uses timm's `patch_embed`, `_pos_embed`, `norm_pre`, `blocks`, `rope`, `norm`, `forward_head`, `fc_norm` and `head`,
and `trunk` and `head` of open_clip's TimmModel.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn as nn
from open_clip.model import CLIP, CustomTextCLIP
from timm.layers import PatchEmbed
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer

from amp.model.towers.base import Backbone, unsupported_tower

BLOCKS = {VisionTransformer: (Block, ResPostBlock), Eva: (EvaBlock, EvaBlockPostNorm)}
"""The supported towers, and their blocks that take a token mask. Subclasses may differ and are not supported."""


class TimmBackbone(Backbone):
    """`Backbone` of a CLIP with timm's `VisionTransformer` or `Eva`, with any pooling and prefix tokens.

    Rotary position embedding applies to patches. Prompts after them are rotated by zero, like the class token, because
    they have no position in the image.

    Raises:
        AmpError: The tower is of another class, has a convolutional stem, unusual blocks, or no pooling.
    """

    def __init__(self, clip: CLIP | CustomTextCLIP):
        trunk = clip.visual.trunk
        refuse_unsupported(trunk)
        super().__init__(clip)
        self.vision_width = trunk.embed_dim
        self.vision_heads = trunk.blocks[0].attn.num_heads
        self.num_layers = len(trunk.blocks)
        self.grid_size = tuple(trunk.patch_embed.grid_size)
        self.patch_size = tuple(trunk.patch_embed.patch_size)
        self.num_prefix = trunk.num_prefix_tokens
        maps = [m for head in (trunk.head, self.visual.head) for m in head.modules() if isinstance(m, nn.Linear)]
        self.embed_dim = maps[-1].out_features if maps else self.pooled_width

    @property
    def _trunk(self) -> VisionTransformer | Eva:
        return self.visual.trunk

    @property
    def _layers(self) -> Sequence[nn.Module]:
        return self._trunk.blocks

    @property
    def dtype(self) -> torch.dtype:
        return self._trunk.patch_embed.proj.weight.dtype

    @property
    def quick_gelu(self) -> bool:
        return any(type(module).__name__ == "QuickGELU" for module in self._trunk.blocks.modules())

    @property
    def masks_tokens(self) -> bool:
        return True

    @property
    def keeps_patches(self) -> bool:
        return True

    @property
    def pooled_width(self) -> int:
        return self._trunk.num_features

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        trunk = self._trunk
        tokens = trunk._pos_embed(trunk.patch_embed(images.to(self.dtype)))
        if isinstance(trunk, Eva):
            tokens, _ = tokens  # drops the rotary embedding, which `_rope` computes for the blocks
        return trunk.norm_pre(tokens)  # dropout of patches and positions is off in eval mode

    def blocks(self, tokens: torch.Tensor, start: int, stop: int, recompute: bool = False) -> torch.Tensor:
        rope = self._rope(tokens.shape[1])
        for index in range(start, stop):
            tokens = self._run(self._block(index, rope), tokens, recompute)
        return tokens

    def prompted_block(
        self,
        index: int,
        tokens: torch.Tensor,
        recompute: bool = False,
        absent: torch.Tensor | None = None,
        all_tokens: bool = False,
    ) -> torch.Tensor:
        # Always computes all tokens: timm's blocks differ too much to compute only the class token here.
        return self._run(self._block(index, self._rope(tokens.shape[1]), absent), tokens, recompute)

    def _block(self, index: int, rope: torch.Tensor | None, absent: torch.Tensor | None = None):
        given = {}
        if rope is not None:
            given["rope"] = rope[index] if self._trunk.rope_mixed else rope
        if absent is not None:
            given["attn_mask"] = ~absent[:, None, None, :]
        return partial(self._layers[index], **given)

    def _rope(self, length: int) -> torch.Tensor | None:
        """Sines, then cosines, one row per patch and per prompt after the patches, (..., length - F, 2 d_head).

        None if the tower has no rotary embedding. Has a leading axis of blocks if each block has its own embedding.
        """
        rope = getattr(self._trunk, "rope", None)
        if rope is None:
            return None
        if self._trunk.dynamic_img_size or not hasattr(rope, "feat_shape"):
            rows = rope.get_embed(shape=list(self.grid_size))
        else:
            rows = rope.get_embed()
        extra = length - self.num_tokens
        if extra == 0:
            return rows
        still = rows.new_zeros(*rows.shape[:-2], extra, rows.shape[-1] // 2)
        return torch.cat([rows, torch.cat([still, still + 1], dim=-1)], dim=-2)

    def pooled(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        trunk = self._trunk
        tokens = trunk.norm(tokens[:, : self.num_tokens])
        # With average pooling the norm comes after it. Apply the same norm to the patches, since the scale of a
        # residual stream is not that of features.
        return trunk.forward_head(tokens, pre_logits=True), trunk.fc_norm(tokens[:, self.num_prefix :])

    def project(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.visual.head(self._trunk.head(pooled))


def refuse_unsupported(trunk: VisionTransformer | Eva) -> None:
    """Raises `AmpError` if prompts can't be inserted between the blocks of a tower of timm."""
    name = f"timm's {type(trunk).__name__}"
    if type(trunk) not in BLOCKS:
        raise unsupported_tower(name)
    if type(trunk.patch_embed) is not PatchEmbed:
        raise unsupported_tower(f"{name} with patches from {type(trunk.patch_embed).__name__}")
    unusual = {type(block).__name__ for block in trunk.blocks if type(block) not in BLOCKS[type(trunk)]}
    if unusual:
        raise unsupported_tower(f"{name} with blocks of {', '.join(sorted(unusual))}")
    if not trunk.global_pool and trunk.attn_pool is None:
        raise unsupported_tower(f"{name} without pooling (timm_pool '')")
