"""Retrieval results: recall in both directions, with the ceiling and the chance level after pre-selection."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from amp.errors import AmpError
from amp.retrieval.metrics import KS, ceilings, chance, recalls, rsum

FIGURES = ("recall", "ceiling", "chance")
_ROUNDING = 1e-6


@dataclass(frozen=True)
class DirectionResult:
    """Results of retrieval in one direction, in percent for each K in `KS`.

    Args:
        recall: R@K.
        ceiling: R@K of a perfect re-ranking of the pre-selected candidates.
        chance: Expected R@K of a random order of the pre-selected candidates.
        queries: Number of queries.
        top_k: Number of candidates pre-selected per query.
        seconds: Duration of the ranking: first stage and re-ranking; for the base model only the first stage.
        interval: 95 % interval of R@K by bootstrap over images (`amp.evaluate.bootstrap`); None if not computed.

    Raises:
        AmpError: A value is impossible, such as a recall above its ceiling.
    """

    recall: dict[int, float]
    ceiling: dict[int, float]
    chance: dict[int, float]
    queries: int
    top_k: int
    seconds: float
    interval: dict[int, tuple[float, float]] | None = None

    def __post_init__(self):
        for name in FIGURES:
            figures = getattr(self, name)
            if tuple(figures) != KS:
                raise AmpError(f"{name} holds K = {list(figures)}, expected {list(KS)}")
        for k in KS:
            for name in ("recall", "chance"):
                value, ceiling = getattr(self, name)[k], self.ceiling[k]
                # Written so that NaN also fails.
                if not (0.0 <= value <= ceiling + _ROUNDING and ceiling <= 100.0 + _ROUNDING):
                    raise AmpError(f"{name}@{k} is {value}, expected 0 <= {name} <= ceiling ({ceiling}) <= 100")
        if self.queries < 1 or self.top_k < 1:
            raise AmpError(f"queries {self.queries}, top_k {self.top_k}, expected at least 1 each")
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise AmpError(f"seconds is {self.seconds}, expected a positive number")

    @property
    def queries_per_second(self) -> float:
        """Queries ranked per second."""
        return self.queries / self.seconds

    @classmethod
    def measure(
        cls, ranks: Tensor, first_ranks: Tensor, positive_mask: Tensor, seconds: float, fold: Tensor | None = None
    ) -> "DirectionResult":
        """Computes the results of a direction.

        Args:
            ranks: (Q,) 0-based final rank of each query's best positive; `first_ranks` for the base model.
            first_ranks: (Q,) 0-based rank of each query's best positive after the first stage.
            positive_mask: (Q, k) bool, which pre-selected candidates are positives of the query.
            seconds: Duration of the ranking.
            fold: (Q,) int64 fold of each query; results are averaged over the folds. None for a single gallery.
        """
        top_k = positive_mask.shape[1]
        parts = [slice(None)] if fold is None else [fold == number for number in fold.unique()]
        figures = [
            (recalls(ranks[p]), ceilings(first_ranks[p], top_k), chance(positive_mask[p], first_ranks[p]))
            for p in parts
        ]
        recall, ceiling, by_chance = (
            {k: sum(x[k] for x in column) / len(parts) for k in KS} for column in zip(*figures, strict=True)
        )
        return cls(recall, ceiling, by_chance, len(ranks), top_k, seconds)


class RowKey(NamedTuple):
    """Identifies a row of results.

    Attributes:
        method: Name of an adapter or control, or `BASE`.
        mode: How image queries were conditioned, `pairwise` or `pooled`; empty if they were not.
        probe: Name of the probe that manipulated an input; empty for none.
    """

    method: str
    mode: str = ""
    probe: str = ""

    def __str__(self) -> str:
        """Name in tables and options, such as "ours, shuffled (pairwise)"."""
        return self.method + (f", {self.probe}" if self.probe else "") + (f" ({self.mode})" if self.mode else "")


BASE = RowKey("base CLIP")


@dataclass(frozen=True)
class RetrievalRow:
    """Results of one method in both directions.

    Args:
        key: Identifies the row.
        i2t: Image-to-text: image queries, ranked captions.
        t2i: Text-to-image: caption queries, ranked images.
        rsum_interval: 95 % interval of Rsum, with both directions resampled together; None if not computed.
    """

    key: RowKey
    i2t: DirectionResult
    t2i: DirectionResult
    rsum_interval: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        """Name of the row; see `RowKey`."""
        return str(self.key)

    @property
    def rsum(self) -> float:
        """Sum of the six recalls, at most 600."""
        return rsum(self.i2t.recall, self.t2i.recall)
