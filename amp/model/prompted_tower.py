"""The image tower with visual prompts, split before the first prompted block."""

import torch
import torch.nn.functional as F
from torch import nn

from amp.model.layers.readout import in_type_of
from amp.model.layers.visual_prompts import VisualPrompts
from amp.model.towers.base import Backbone


class PromptedTower:
    """The blocks of a frozen image tower, prompted from block `first` on. The parameters belong to the model.

    Args:
        backbone: The frozen CLIP.
        visual_prompts: Prompts for the blocks from `first` on.
        first: Index of the first block that sees prompts or knowledge.
        projection: Learned map that is added to CLIP's projection, or None.

    Attributes:
        recompute: Whether to recompute the prompted blocks in the backward pass, to save memory.
    """

    def __init__(self, backbone: Backbone, visual_prompts: VisualPrompts, first: int, projection: nn.Linear | None):
        self.backbone, self.visual_prompts, self.first, self.projection = backbone, visual_prompts, first, projection
        self.recompute = False

    @torch.no_grad()
    def early(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) to tokens before block `first` (B, F + M, d_v), which don't depend on captions."""
        return self.backbone.blocks(self.backbone.embed(images), 0, self.first)

    @torch.no_grad()
    def base(self, early: torch.Tensor) -> torch.Tensor:
        """Tokens before block `first` to the frozen CLIP's own features (B, d)."""
        return self.backbone.pool(self.backbone.blocks(early, self.first, self.backbone.num_layers))

    def features(
        self, tokens: torch.Tensor, joined: torch.Tensor | None = None, absent: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens before block `first` (B, F + M, d_v) to image features (B, d), with visual prompts.

        Args:
            tokens: Input of the block.
            joined: Further tokens (B, E, d_v), placed after the patches in all blocks.
            absent: Which of the joined tokens are masked out of the attention, bool (B, E).
        """
        return self.features_and_patches(tokens, joined, absent)[0]

    def features_and_patches(
        self,
        tokens: torch.Tensor,
        joined: torch.Tensor | None = None,
        absent: torch.Tensor | None = None,
        all_tokens: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns `features`, and the patches after the last block (B, M, d_v).

        The patches are only valid with `all_tokens`. Without it, the last block may compute only the class token.
        """
        pooled, patches = self.backbone.pooled(self._blocks(tokens, joined, absent, all_tokens))
        features = self.backbone.project(pooled)
        if self.projection is not None:
            features = features + self.projection(in_type_of(self.projection.weight, pooled))
        return features, patches

    def _blocks(self, tokens, joined, absent, all_tokens: bool) -> torch.Tensor:
        backbone = self.backbone
        if self.visual_prompts.num_prompts == 0 and joined is None:  # bit-identical to the base CLIP
            return backbone.blocks(tokens, self.first, backbone.num_layers, self.recompute)
        if joined is not None:
            absent = F.pad(absent, (tokens.shape[1], self.visual_prompts.num_prompts))
            tokens = torch.cat([tokens, joined], dim=1)
        length = tokens.shape[1]  # the visual prompts after it are replaced at each block
        for index in range(self.first, backbone.num_layers):
            tokens = self.visual_prompts(tokens, index - self.first, length)
            tokens = backbone.prompted_block(index, tokens, self.recompute, absent, all_tokens)
        return tokens
