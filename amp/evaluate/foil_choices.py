"""Makes caption-choice tests from the foils in shards: a caption and a false one, each with its knowledge."""

from collections.abc import Sequence

from amp.data.split import ShardSplit
from amp.evaluate.choice import Choice

FOILS = "foils"
"""Name of the test."""


def foil_choices(split: ShardSplit, keep: Sequence[str]) -> list[Choice]:
    """One choice per foil of a split, grouped by the kind of foil; only triplets of the kinds in `keep`."""
    return [
        Choice(str(number), (text, foil.caption), foil.kind, knowledge=(knowledge, foil.knowledge.only(keep)))
        for number, record in enumerate(split.records())
        for (text, knowledge), foils in zip(split.captions(record, keep), split.foils(record), strict=True)
        for foil in foils
    ]
