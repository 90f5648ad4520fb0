"""How a split is searched."""

from dataclasses import dataclass, field
from typing import Literal

from amp.errors import AmpError


@dataclass
class RetrievalSettings:
    """How a split is searched.

    Args:
        top_k: Candidates that the frozen CLIP pre-selects (paper: 20).
        i2t: How image queries are conditioned: `pairwise` on each candidate's knowledge, `pooled` on the union of
            all candidates' knowledge; the paper's text fits pooled.
        fusion_weight: Weight of the first stage's score beside the new one (paper: 0).
        batch_size: Pairs a forward pass.
        captions_per_image: Keep only the first n captions of an image; 0 keeps all (COCO 5K: 25,010).
        max_queries: Search for this many queries a direction, evenly spaced, in the whole gallery; 0 for all.
        skip_decided: Score only queries with an answer among their candidates. The others keep their first-stage rank
            whatever they score, so the recalls are the same for a fraction of the work.
        folds: Galleries that the images are cut into, in order, with figures averaged over them; COCO's "1K" is 5.
    """

    top_k: int = 20
    i2t: list[Literal["pairwise", "pooled"]] = field(default_factory=lambda: ["pairwise", "pooled"])
    fusion_weight: float = 0.0
    batch_size: int = 128
    captions_per_image: int = 0
    max_queries: int = 0
    skip_decided: bool = False
    folds: int = 1

    def __post_init__(self):
        least = {"top_k": 1, "batch_size": 1, "captions_per_image": 0, "max_queries": 0, "folds": 1}
        for key, low in least.items():
            if getattr(self, key) < low:
                raise AmpError(f"search setting {key} is {getattr(self, key)}, expected an integer of at least {low}")
        if not self.i2t:
            raise AmpError("search setting i2t is [], expected pairwise, pooled or both")

    def check(self, images: int) -> None:
        """Raises AmpError where a split of so many images can't be searched like this."""
        if self.folds > images:
            raise AmpError(f"search setting folds is {self.folds}, expected at most {images}, the images")
