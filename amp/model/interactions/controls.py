"""The controls: the same training, with images that ignore the knowledge."""

import torch

from amp.model.interactions.base import Unconditioned
from amp.model.interactions.readout import make_readout, read_patches
from amp.model.prompted_tower import PromptedTower


class VisualPromptsOnly(Unconditioned):
    """Deep visual prompt tuning (arXiv 2203.12119), Table 3's "w/o action knowledge"; control of `aim` and `cat`."""

    trains = False
    stage2 = "visual_prompts."  # trained further, so that the control takes as many steps (our choice)

    def __init__(self, backbone, triplets: bool, states: bool):
        super().__init__()


class LearnedQuery(Unconditioned):
    """The control of `readout`: one learned query, the same for all captions, attends to the patches.

    Args:
        backbone: The frozen CLIP.
        triplets, states: Unused.
        blocks: See `Readout`.
    """

    def __init__(self, backbone, triplets: bool, states: bool, blocks: int = 1):
        super().__init__()
        self.readout = make_readout(backbone, False, blocks, conditioned=False)

    def image_features(self, tower: PromptedTower, early: torch.Tensor) -> torch.Tensor:
        features, patches = read_patches(self.readout, tower, early)
        return features + self.readout.unconditioned(patches)
