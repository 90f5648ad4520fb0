"""Concatenation, the "CAT" of Table 3: prompts are appended to the patches and pass through all later blocks."""

import torch

from amp.errors import AmpError
from amp.model.interactions.aim import AdaptedPrompts
from amp.model.interactions.base import Prompts
from amp.model.prompted_tower import PromptedTower


class Concatenation(AdaptedPrompts):
    """Prompts as tokens after the patches (the block at which they join is our choice).

    There is no gate, so at step 0 the model differs from its base CLIP.

    Args:
        backbone: The frozen CLIP; needs `masks_tokens`.
        triplets, states: Whether the model reads triplets and states.
        bottleneck: See `AdaptedPrompts`.

    Raises:
        AmpError: `masks_tokens` of the tower is False.
    """

    stage2 = "interaction.adapter."  # everything between prompts and tokens (our choice)

    def __init__(self, backbone, triplets: bool, states: bool, bottleneck: int = 16):
        if not backbone.masks_tokens:
            raise AmpError(
                "interaction is 'cat' and the image tower's blocks are not open_clip's ResidualAttentionBlock, "
                "expected that class, which can mask padding prompts; choose interaction 'aim'"
            )
        super().__init__(backbone, triplets, states, bottleneck)

    def pairs(
        self, tower: PromptedTower, images: tuple[torch.Tensor, ...], prompts: Prompts, image_index: torch.Tensor
    ) -> torch.Tensor:
        (early,) = images
        absent = (~prompts.mask).repeat(1, len(prompts.parts))
        return tower.features(early[image_index], torch.cat(prompts.parts, dim=1).to(early.dtype), absent)
