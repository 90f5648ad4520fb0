"""Settings of retrieval on a split."""

from dataclasses import dataclass, field
from typing import Literal

from amp.errors import AmpError


@dataclass
class RetrievalSettings:
    """Settings of retrieval on a split.

    Args:
        top_k: Number of candidates per query that the frozen CLIP pre-selects (paper: 20).
        i2t: How image queries are conditioned: `pairwise` on each candidate's knowledge in turn, `pooled` on the union
            of all candidates' knowledge. The paper's text suggests pooled.
        fusion_weight: Weight of the first stage's score, which is added to the new score (paper: 0).
        batch_size: Pairs per forward pass.
        captions_per_image: Number of captions used per image, the first ones; 0 uses all (COCO 5K: 25,010 in total).
        max_queries: Number of queries per direction, evenly spaced over the split and searched in the whole gallery; 0
            uses all.
        skip_decided: Score only queries that have a positive among their candidates. Re-ranking can't change the rank
            of other queries, so the recalls are the same for a fraction of the work.
        folds: Number of separate galleries that the images are split into, in order; results are averaged over them.
            COCO "1K" is 5 folds.
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
        """Raises AmpError if a split with this number of images can't be searched with these settings."""
        if self.folds > images:
            raise AmpError(f"search setting folds is {self.folds}, expected at most {images}, the number of images")
