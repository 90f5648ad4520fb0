"""Concatenation, the "CAT" of the paper's Table 3: prompts join the patches and pass through all later blocks."""

import torch

from amp.errors import AmpError
from amp.model.interactions.aim import AdaptedPrompts
from amp.model.interactions.base import Prompts
from amp.model.prompted_tower import PromptedTower


class Concatenation(AdaptedPrompts):
    """Prompts as tokens after the patches (where they join is ours).

    There is no gate, so at step 0 the model is not equal to its base CLIP.

    Args:
        backbone: The tower; its blocks must be able to leave single tokens out of attention.
        triplets, states: Which kinds of knowledge there are.
        bottleneck: As of `AdaptedPrompts`.

    Raises:
        AmpError: The tower's blocks can't leave tokens out.
    """

    stage2 = "interaction.adapter."  # all that lies between prompts and tokens (ours)

    def __init__(self, backbone, triplets: bool, states: bool, bottleneck: int = 16):
        if not backbone.masks_tokens:
            raise AmpError(
                "interaction is 'cat' and the image tower's blocks are not open_clip's ResidualAttentionBlock, "
                "expected that class, which can leave padding prompts out; choose interaction 'aim'"
            )
        super().__init__(backbone, triplets, states, bottleneck)

    def pairs(
        self, tower: PromptedTower, images: tuple[torch.Tensor, ...], prompts: Prompts, image_index: torch.Tensor
    ) -> torch.Tensor:
        (early,) = images
        absent = (~prompts.mask).repeat(1, len(prompts.parts))
        return tower.features(early[image_index], torch.cat(prompts.parts, dim=1).to(early.dtype), absent)
