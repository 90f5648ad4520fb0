"""The settings of the action-aware prompts; each is the paper's or marked as ours."""

from dataclasses import dataclass
from typing import Literal

from amp.errors import AmpError


@dataclass
class PromptConfig:
    """Architecture of the action-aware prompts (arXiv 2506.23502, sec. 3.3).

    The paper's supplement with its hyper-parameters is not public: only `lam` is the paper's, the rest is ours.

    Args:
        knowledge: ``both`` conditions patches on triplets and states; ``none`` leaves only the visual prompts, which is
            the control "without action knowledge" of Table 3 (deep visual prompt tuning).
        interaction_layer: Vision block before which patches meet the knowledge. 0 is the paper's; larger values let the
            blocks below run once an image instead of once a pair (ours).
        num_prompts: Learnable visual prompts a block, N (ours).
        max_triplets: Triplets a caption, K; actions are kept before attributes (ours).
        slot_tokens: Tokens kept of each subject, action and object (ours).
        triplet_layers: Transformer layers of the triplet encoder (ours).
        triplet_heads: Attention heads of the triplet encoder (ours).
        bottleneck: The adapter's hidden width is its input width divided by this (ours).
        lam: Weight of the triplets' attention map against the states', lambda of eq. 8 (paper: 0.7).
        text_enrichment: True adds a learned map of the states' features to the caption's feature that images are
            scored against (ours, `TextEnrichment`); False scores against the plain feature, as the paper does.
        residual: True adds the interaction to the patches through a gate that starts at zero (ours); False replaces
            the patches by it, the literal eq. 8.
    """

    knowledge: Literal["both", "none"] = "both"
    interaction_layer: int = 0
    num_prompts: int = 4
    max_triplets: int = 6
    slot_tokens: int = 5
    triplet_layers: int = 2
    triplet_heads: int = 8
    bottleneck: int = 16
    lam: float = 0.7
    residual: bool = True
    text_enrichment: bool = False

    def __post_init__(self):
        minimum = {"interaction_layer": 0, "num_prompts": 0, "max_triplets": 1, "slot_tokens": 1, "triplet_layers": 1,
                   "triplet_heads": 1, "bottleneck": 1}  # fmt: skip
        for key, low in minimum.items():
            value = getattr(self, key)
            if value < low:
                raise AmpError(f"prompt setting {key} is {value}, expected an integer of at least {low}")
        if not 0.0 <= self.lam <= 1.0:
            raise AmpError(f"prompt setting lam is {self.lam}, expected a number from 0 to 1 (paper: 0.7)")
        if self.knowledge not in ("both", "none"):
            raise AmpError(f"prompt setting knowledge is {self.knowledge!r}, expected 'both' or 'none'")
        if self.knowledge == "none" and self.num_prompts == 0:
            raise AmpError("knowledge 'none' with num_prompts 0 leaves nothing to train; give at least 1 visual prompt")
