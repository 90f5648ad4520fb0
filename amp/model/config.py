"""The settings of the action-aware prompts; each is the paper's or marked as ours."""

from dataclasses import dataclass
from typing import Literal

from amp.errors import AmpError


@dataclass
class PromptConfig:
    """Architecture of the action-aware prompts (arXiv 2506.23502, sec. 3.3).

    The paper's supplement with its hyper-parameters is not public: only `lam` is the paper's, the rest is ours.

    Args:
        knowledge: What images are conditioned on, a row of the paper's Table 2 each: ``both`` triplets and states;
            ``triplets`` or ``states`` alone; ``template`` the hand-crafted triplet, a sentence of it that takes the
            states' place. ``none`` leaves only the visual prompts, which is the control "without action knowledge" of
            Table 3 (deep visual prompt tuning). ``caption`` conditions images on the caption alone, without an LLM's
            knowledge (ours, a control of ``readout``).
        interaction: ``aim`` lets patches attend to the prompts (eq. 7-8); ``cat`` is Table 3's "CAT": the prompts join
            the tokens behind the patches and pass through all later blocks (paper; where they join is ours). ``cat``
            has no gate: at step 0 it is not equal to the base CLIP. ``readout`` (ours) lets the knowledge ask the
            patches, by default those behind the last block, see `KnowledgeReadout`.
        readout_blocks: With ``readout``, trained transformer blocks that read the patches before block
            `interaction_layer` in place of those behind the last block (ours). Of no effect on ``aim`` and ``cat``.
        condition_images: False keeps the knowledge from the image, so that it only enriches the text (ours, the
            text-only control); asks for `text_enrichment`.
        interaction_layer: Vision block before which patches meet the knowledge. 0 is the paper's; larger values let the
            blocks below run once an image instead of once a pair (ours).
        num_prompts: Learnable visual prompts a block, N (ours).
        max_triplets: Triplets a caption, K; actions are kept before attributes (ours).
        slot_tokens: Tokens kept of each subject, action and object (ours).
        triplet_layers: Transformer layers of the triplet encoder (ours).
        triplet_heads: Attention heads of the triplet encoder (ours).
        bottleneck: The adapter's hidden width is its input width divided by this (ours).
        lam: Weight of the triplets' attention map against the states', lambda of eq. 8 (paper: 0.7). Of no
            effect where there is one map or none.
        text_enrichment: True adds learned maps of the caption's feature and of its states' to the feature that images
            are scored against (ours, `TextEnrichment`); False scores against the plain feature. The states' map
            does not exist where no text of the knowledge is encoded (``triplets``, ``caption`` and ``none``).
        text_triplets: True lets the triplet prompts enrich that feature too, with learned weights over the triplets
            (ours); of no effect without `text_enrichment` or triplets.
        image_projection: True adds a learned map, from zero, to CLIP's projection of image features (ours).
        residual: True adds the interaction to the patches through a gate that starts at zero (ours); False replaces
            the patches by it, the literal eq. 8. Of no effect on ``cat`` and ``readout``.
    """

    knowledge: Literal["both", "triplets", "template", "states", "caption", "none"] = "both"
    interaction: Literal["aim", "cat", "readout"] = "aim"
    condition_images: bool = True
    interaction_layer: int = 0
    readout_blocks: int = 0
    num_prompts: int = 4
    max_triplets: int = 6
    slot_tokens: int = 5
    triplet_layers: int = 2
    triplet_heads: int = 8
    bottleneck: int = 16
    lam: float = 0.7
    residual: bool = True
    text_enrichment: bool = False
    text_triplets: bool = False
    image_projection: bool = False

    def __post_init__(self):
        minimum = {
            "interaction_layer": 0,
            "readout_blocks": 0,
            "num_prompts": 0,
            "max_triplets": 1,
            "slot_tokens": 1,
            "triplet_layers": 1,
            "triplet_heads": 1,
            "bottleneck": 1,
        }
        for key, low in minimum.items():
            value = getattr(self, key)
            if value < low:
                raise AmpError(f"prompt setting {key} is {value}, expected an integer of at least {low}")
        if not 0.0 <= self.lam <= 1.0:
            raise AmpError(f"prompt setting lam is {self.lam}, expected a number from 0 to 1 (paper: 0.7)")
        choices = {
            "knowledge": ("both", "triplets", "template", "states", "caption", "none"),
            "interaction": ("aim", "cat", "readout"),
        }
        for key, known in choices.items():
            value = getattr(self, key)
            if value not in known:
                raise AmpError(f"prompt setting {key} is {value!r}, expected one of {', '.join(known)}")
        if self.knowledge == "none" and self.num_prompts == 0 and self.interaction != "readout":
            raise AmpError("knowledge 'none' with num_prompts 0 leaves nothing to train; give at least 1 visual prompt")
        if self.knowledge == "none" and self.interaction == "cat":
            raise AmpError(
                "prompt setting interaction is 'cat' and knowledge is 'none', expected 'aim' (without effect here): "
                "without knowledge there is nothing to concatenate. Leave interaction out, or choose other knowledge"
            )

        if self.knowledge == "caption" and self.interaction != "readout":
            raise AmpError(
                f"prompt setting knowledge is 'caption' and interaction is {self.interaction!r}, expected 'readout': "
                "it alone asks with the caption's own feature"
            )
        if not (self.condition_images or (self.reads_states and self.text_enrichment) or self.enriches_by_triplets):
            raise AmpError(
                f"prompt setting condition_images is false, knowledge is {self.knowledge!r}, text_enrichment is "
                f"{self.text_enrichment} and text_triplets {self.text_triplets}, expected text_enrichment true with "
                "states, or with triplets and text_triplets true: else no knowledge is used at all"
            )

    @property
    def conditions(self) -> bool:
        """Whether image features depend on a caption."""
        return self.condition_images and self.knowledge != "none"

    @property
    def reads_triplets(self) -> bool:
        """Whether action triplet prompts exist (eq. 4-5)."""
        return self.enriches_by_triplets or (self.conditions and self.knowledge in ("both", "triplets"))

    @property
    def enriches_by_triplets(self) -> bool:
        """Whether triplet prompts enrich the caption's feature."""
        return self.text_enrichment and self.text_triplets and self.knowledge in ("both", "triplets")

    @property
    def reads_states(self) -> bool:
        """Whether prompts from the frozen text tower exist: of states, or of sentences in their place."""
        return self.knowledge in ("both", "states", "template")
