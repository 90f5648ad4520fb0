"""The readout (our choice, recommended): queries made from knowledge attend to the patches."""

import torch

from amp.errors import AmpError
from amp.knowledge.tensors import Captions
from amp.model.interactions.base import Interaction, Prompts
from amp.model.layers.readout import KnowledgeReadout
from amp.model.prompted_tower import PromptedTower


class Readout(Interaction):
    """`KnowledgeReadout` on top of the prompted tower. Blocks run once per image; a pair costs one small attention.

    Args:
        backbone: The frozen CLIP; needs `keeps_patches`.
        triplets, states: Whether the model reads triplets and states.
        blocks: Number of trained transformer blocks that read the patches before the first prompted block, where CLIP
            still represents who does what. 0 reads the patches after the last block (our choice).

    Raises:
        AmpError: `keeps_patches` of the tower is False.
    """

    control = "learned_query"
    reads_caption = True
    scores_all_pairs = True

    def __init__(self, backbone, triplets: bool, states: bool, blocks: int = 1):
        super().__init__()
        self.readout = make_readout(backbone, triplets, blocks)
        self.states = states

    def encode_captions(self, captions: Captions, triplets: torch.Tensor | None) -> Prompts:
        knowledge, text = captions
        if text is None:
            raise AmpError(
                "text is None, expected the captions' features (C, d): this model's interaction reads them too. Pass "
                "text=model.encode_text(tokens)"
            )
        states = knowledge.states if self.states else None
        queries, mask = self.readout.queries(text, states, triplets, knowledge.mask)
        return Prompts((queries,), mask)

    def encode_images(self, tower: PromptedTower, early: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The features without knowledge (B, d), and keys and values of the patches, each (B, heads, M, d / heads)."""
        features, patches = read_patches(self.readout, tower, early)
        return features, *self.readout.keys_and_values(patches)

    def pairs(
        self, tower: PromptedTower, images: tuple[torch.Tensor, ...], prompts: Prompts, image_index: torch.Tensor
    ) -> torch.Tensor:
        features, key, value = (x[image_index] for x in images)
        return features + self.readout.pairs(key, value, prompts.parts[0], prompts.mask)

    def all_pairs(self, tower: PromptedTower, images: tuple[torch.Tensor, ...], prompts: Prompts) -> torch.Tensor:
        features, key, value = images
        return features[:, None] + self.readout.all_pairs(key, value, prompts.parts[0], prompts.mask)

    def attention(self, tower, early, captions, triplets):
        """Attention of the triplet part and the state part of each query, averaged over heads."""
        _, patches = read_patches(self.readout, tower, early)
        places = captions.knowledge.mask[0].nonzero()[:, 0]
        states = captions.knowledge.states[:, places] if self.states else None
        return self.readout.attention(patches, states, None if triplets is None else triplets[:, places])


def make_readout(backbone, triplets: bool, blocks: int, conditioned: bool = True) -> KnowledgeReadout:
    """Builds the layer for a tower.

    Raises:
        AmpError: `blocks` is negative, or `keeps_patches` of the tower is False.
    """
    if blocks < 0:
        raise AmpError(f"prompt.interaction_options.blocks is {blocks}, expected at least 0")
    if not backbone.keeps_patches:
        raise AmpError(
            "interaction is 'readout' and the image tower pools by attention or average, expected the class token, "
            "which leaves the patches as they are; choose interaction 'aim'"
        )
    width = backbone.text_width if triplets else None
    return KnowledgeReadout(
        backbone.vision_width, backbone.embed_dim, width, conditioned, blocks, backbone.vision_heads
    )


def read_patches(
    readout: KnowledgeReadout, tower: PromptedTower, early: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Early tokens to features without knowledge (B, d) and to the patches (B, M, d_v) that the readout reads."""
    features, last = tower.features_and_patches(early, all_tokens=readout.blocks is None)
    return features, readout.patches(early[:, tower.backbone.num_prefix :], last)
