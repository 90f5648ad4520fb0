"""AIM, the paper's interaction: patches attend to a caption's prompts before the first prompted block (eq. 6-8)."""

import torch
import torch.nn as nn

from amp.errors import AmpError
from amp.knowledge.tensors import Captions
from amp.model.interactions.base import Interaction, Prompts
from amp.model.layers.interaction import ActionAwareInteraction
from amp.model.layers.prompt_adapter import PromptAdapter
from amp.model.layers.triplet_encoder import null_rows, with_null
from amp.model.prompted_tower import PromptedTower


class AdaptedPrompts(Interaction):
    """Base class of interactions with the prompts of eq. 6, in the width of the image tower.

    Args:
        backbone: The frozen CLIP.
        triplets, states: Whether the model reads triplets and states.
        bottleneck: The adapter's hidden width is its input width divided by this (our choice).
    """

    def __init__(self, backbone, triplets: bool, states: bool, bottleneck: int = 16):
        if bottleneck < 1:
            raise AmpError(f"prompt.interaction_options.bottleneck is {bottleneck}, expected at least 1")
        super().__init__()
        d_t, d = backbone.text_width, backbone.embed_dim
        if states:
            self.null_state = nn.Parameter(0.02 * torch.randn(d))
            # Eq. 6 shares W_down and W_up between triplets and states, which requires one width.
            self.state_projection = nn.Linear(d, d_t) if d != d_t else nn.Identity()
        self.adapter = PromptAdapter(d_t, max(1, d_t // bottleneck), backbone.vision_width)
        self.states = states

    def encode_captions(self, captions: Captions, triplets: torch.Tensor | None) -> Prompts:
        knowledge = captions.knowledge
        parts = [] if triplets is None else [self.adapter(triplets)]
        if self.states:
            states, _ = with_null(knowledge.states.to(self.null_state.dtype), knowledge.mask, self.null_state)
            parts.append(self.adapter(self.state_projection(states)))
        return Prompts(tuple(parts), knowledge.mask | null_rows(knowledge.mask))


class Aim(AdaptedPrompts):
    """Action-aware adaptive interaction (eq. 7-8). The prompted blocks run once per pair.

    Args:
        backbone: The frozen CLIP.
        triplets, states: Whether the model reads triplets and states.
        bottleneck: See `AdaptedPrompts`.
        lam: Weight of the triplets' attention map against the states', lambda of eq. 8 (paper: 0.7). No effect if only
            one kind exists.
        residual: True adds the interaction to the patches through a gate that starts at zero (our choice). False
            replaces the patches by it, the literal eq. 8.
    """

    stage2 = "interaction.aim."

    def __init__(
        self,
        backbone,
        triplets: bool,
        states: bool,
        bottleneck: int = 16,
        lam: float = 0.7,
        residual: bool = True,
    ):
        if not 0.0 <= lam <= 1.0:
            raise AmpError(f"prompt.interaction_options.lam is {lam}, expected a number from 0 to 1 (paper: 0.7)")
        super().__init__(backbone, triplets, states, bottleneck)
        self.aim = ActionAwareInteraction(backbone.vision_width, backbone.vision_heads, lam, residual, triplets, states)
        self.triplets = triplets

    def pairs(
        self, tower: PromptedTower, images: tuple[torch.Tensor, ...], prompts: Prompts, image_index: torch.Tensor
    ) -> torch.Tensor:
        (early,) = images
        front = tower.backbone.num_prefix  # class token and registers only see the knowledge in the blocks
        patches = self._attend(early[:, front:], prompts, image_index)
        return tower.features(torch.cat([early[image_index, :front], patches.to(early.dtype)], dim=1))

    def _attend(self, patches, prompts: Prompts, image_index, return_maps: bool = False):
        parts = list(prompts.parts)
        triplets = parts.pop(0) if self.triplets else None
        states = parts.pop(0) if self.states else None
        return self.aim(patches, triplets, states, prompts.mask, image_index, return_maps)

    def attention(self, tower, early, captions, triplets):
        """A^t and A^s of eq. 7, averaged over the attending patches."""
        prompts = self.encode_captions(captions, triplets)
        places = captions.knowledge.mask[0].nonzero()[:, 0]
        first = torch.zeros_like(places)
        one_each = nn.functional.one_hot(places, prompts.mask.shape[1]).bool()
        repeated = prompts.take(first)._replace(mask=one_each)
        _, *maps = self._attend(early[:, tower.backbone.num_prefix :], repeated, first, return_maps=True)
        return {
            name: x.float().mean(dim=1) for name, x in zip(("triplet", "state"), maps, strict=True) if x is not None
        }
