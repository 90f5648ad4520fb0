"""The settings of the action-aware prompts; each is the paper's or marked as ours."""

from dataclasses import dataclass, field
from typing import Literal

from amp.errors import AmpError

KNOWLEDGE = ("both", "triplets", "template", "states", "caption", "none")


@dataclass
class PromptConfig:
    """Architecture of the action-aware prompts (arXiv 2506.23502, sec. 3.3).

    The defaults are the recommended recipe, which won in docs/ablations.md. The paper's own is the recipe ``paper``.

    Args:
        knowledge: What images are conditioned on, one row of the paper's Table 2 each: ``both`` triplets and states;
            ``triplets`` or ``states`` only; ``template``, the hand-crafted triplet, a sentence in place of the states.
            ``none`` builds the control: the same training without knowledge. ``caption`` conditions images on the
            caption only, without an LLM's knowledge (ours; another control of ``readout``).
        interaction: How images meet knowledge, a name of the registry in `amp.model.interactions`: ``readout`` (ours),
            ``aim`` (paper, eq. 7-8), ``cat`` (Table 3's "CAT"), ``visual_prompts`` and ``learned_query`` (controls,
            whose images ignore the knowledge), or one that is registered elsewhere.
        interaction_options: Keyword arguments of the interaction's class, such as ``{lam: 0.7}`` of ``aim``; its
            docstring lists them.
        depth: Where knowledge and visual prompts enter the image tower, as a fraction of its blocks: 0 is before the
            first block (paper), 0.667 before block 8 of 12 (ours). The blocks before it run once per image and can be
            stored.
        num_prompts: Learnable visual prompts per block, N (ours).
        max_triplets: Triplets per caption, K; actions are kept before attributes (ours).
        enrich: Add learned maps, from zero: of the caption's feature, of its states and of its triplets to the feature
            that images are scored against (`TextEnrichment`), and to CLIP's projection of image features (ours). False
            scores CLIP's own features (paper).
    """

    knowledge: Literal["both", "triplets", "template", "states", "caption", "none"] = "both"
    interaction: str = "readout"
    interaction_options: dict[str, bool | int | float | str | None] = field(default_factory=dict)
    depth: float = 0.667
    num_prompts: int = 16
    max_triplets: int = 6
    enrich: bool = True

    def __post_init__(self):
        for key, least in {"num_prompts": 0, "max_triplets": 1}.items():
            value = getattr(self, key)
            if value < least:
                raise AmpError(f"prompt setting {key} is {value}, expected an integer of at least {least}")
        if not 0.0 <= self.depth < 1.0:
            raise AmpError(
                f"prompt setting depth is {self.depth}, expected a fraction from 0, below 1, of the image tower's "
                "blocks (paper: 0)"
            )
        if self.knowledge not in KNOWLEDGE:
            raise AmpError(f"prompt setting knowledge is {self.knowledge!r}, expected one of {', '.join(KNOWLEDGE)}")

    def first_block(self, blocks: int) -> int:
        """The first block of a tower of so many `blocks` that sees prompts."""
        return min(round(self.depth * blocks), blocks - 1)

    @property
    def reads_triplets(self) -> bool:
        """Whether action triplet prompts exist (eq. 4-5)."""
        return self.knowledge in ("both", "triplets")

    @property
    def reads_states(self) -> bool:
        """Whether prompts from the frozen text tower exist: of states, or of sentences in their place."""
        return self.knowledge in ("both", "states", "template")
