"""Settings of the action-aware prompts. Choices that are not from the paper are marked "our choice"."""

from dataclasses import dataclass, field
from typing import Literal

from amp.errors import AmpError

KNOWLEDGE = ("both", "triplets", "template", "states", "caption", "none")


@dataclass
class PromptConfig:
    """Architecture of the action-aware prompts (arXiv 2506.23502, sec. 3.3).

    The defaults are the recommended recipe, the best one in docs/ablations.md. The recipe `paper` is the paper's own.

    Args:
        knowledge: Knowledge that images are conditioned on, as in the rows of the paper's Table 2: `both` (triplets and
            states), `triplets`, `states`, or `template` (a hand-crafted sentence per triplet instead of its state).
            `none` builds the control: the same training without knowledge. `caption` conditions images only on the
            caption, without LLM-generated knowledge (our choice; another control of `readout`).
        interaction: How images are combined with knowledge, a name registered in `amp.model.interactions`: `readout`
            (our choice), `aim` (paper, eq. 7-8), `cat` (Table 3's "CAT"), `visual_prompts` or `learned_query` (controls
            whose images ignore the knowledge), or a name registered by a plugin.
        interaction_options: Keyword arguments of the interaction's class, such as `{lam: 0.7}` for `aim`. The docstring
            of the class lists them.
        depth: Where knowledge and visual prompts enter the image tower, as a fraction of its blocks: 0 is before the
            first block (paper), 0.667 before block 8 of 12 (our choice). Earlier blocks run once per image, and their
            output can be cached.
        num_prompts: Number of learnable visual prompts per block, N (our choice).
        max_triplets: Maximum number of triplets per caption, K. Actions are kept before attributes (our choice).
        enrich: Add learned maps that start at zero (our choice): one adds the caption's feature, states and triplets
            to the text feature that images are scored against (`TextEnrichment`), one is added to CLIP's projection of
            image features. False scores CLIP's own features (paper).
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
                f"prompt setting depth is {self.depth}, expected a fraction of the image tower's blocks, from 0 "
                "to below 1 (paper: 0)"
            )
        if self.knowledge not in KNOWLEDGE:
            raise AmpError(f"prompt setting knowledge is {self.knowledge!r}, expected one of {', '.join(KNOWLEDGE)}")

    def first_block(self, blocks: int) -> int:
        """Index of the first block with prompts in a tower with this many `blocks`."""
        return min(round(self.depth * blocks), blocks - 1)

    @property
    def reads_triplets(self) -> bool:
        """Whether action triplet prompts exist (eq. 4-5)."""
        return self.knowledge in ("both", "triplets")

    @property
    def reads_states(self) -> bool:
        """Whether prompts from the frozen text tower exist, made from states or from template sentences."""
        return self.knowledge in ("both", "states", "template")
