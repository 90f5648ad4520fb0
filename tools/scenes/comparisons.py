"""Comparisons of twins: which captions score their own picture above that of the twin."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from amp.errors import AmpError, shorten
from amp.model.similarity import pair_similarity

CHANGES = ("roles", "action")
BATCH = 256  # comparisons per forward pass, two pairs each
TIE = 1e-6  # cosines this close are equal: matrix products round differently from row to row

Scorer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Comparisons:
    """Comparisons of one kind of change: caption, own image and twin's image, each int64 (N,).

    `twins` is the number of pairs of scenes, which are the units of the standard error.
    """

    caption: torch.Tensor
    own: torch.Tensor
    other: torch.Tensor
    twins: int


def twin_comparisons(dataset: Path, filenames: Sequence[str], owner: torch.Tensor) -> dict[str, Comparisons]:
    """Finds the comparisons of a split, by what differs between the twins.

    Args:
        dataset: dataset.json with the keys "twin" and "change".
        filenames: Filenames of the split's images, in the order of the shards.
        owner: Image of each caption, int64 (C,).

    Raises:
        AmpError: The file can't be read, has no twins of this split, or names images that the shards lack.
    """
    try:
        images = json.loads(dataset.read_text(encoding="utf-8"))["images"]
        changed = [(image["filename"], image["twin"], image["change"]) for image in images if "twin" in image]
    except OSError as error:
        raise AmpError(
            f"{dataset}: can't be read ({error.strerror}), expected the dataset.json that tools/scenes/make_scenes.py "
            "writes; run it, or give --dataset FILE"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise AmpError(
            f"{dataset}: not a dataset.json of drawn scenes ({type(error).__name__}: {error}), expected a key 'images' "
            "whose twins have 'filename', 'twin' and 'change'; run tools/scenes/make_scenes.py again"
        ) from error
    row = {name: index for index, name in enumerate(filenames)}
    captions = {}
    for caption, image in enumerate(owner.tolist()):
        captions.setdefault(image, []).append(caption)
    found, pairs = {change: [] for change in CHANGES}, dict.fromkeys(CHANGES, 0)
    for one, other, change in changed:
        if change not in found:
            raise AmpError(f"{dataset}: change of {one} is {shorten(change)}, expected one of {', '.join(CHANGES)}")
        if one not in row and other not in row:  # both are in another split
            continue
        if one not in row or other not in row:
            missing = one if one not in row else other
            raise AmpError(
                f"{dataset}: {missing} is not in the shards, expected both pictures of the twins {one} and {other}; "
                "make the shards from this data set"
            )
        pairs[change] += 1
        for own, twin in ((row[one], row[other]), (row[other], row[one])):
            found[change] += [(caption, own, twin) for caption in captions.get(own, [])]
    if empty := [change for change, rows in found.items() if not rows]:
        raise AmpError(
            f"{dataset}: no twins with another {' or '.join(empty)} among the {len(row)} images of the split, expected "
            "some of each; draw at least 8 scenes per split (tools/scenes/make_scenes.py)"
        )
    return {
        change: Comparisons(*torch.tensor(rows, dtype=torch.int64).T, pairs[change]) for change, rows in found.items()
    }


def accuracy(comparisons: dict[str, Comparisons], score: Scorer) -> dict[str, dict]:
    """Computes the fraction of won comparisons by kind of change.

    Args:
        comparisons: Comparisons from `twin_comparisons`.
        score: Maps images (P,) and captions (P,), int64, to scores (P,).

    Returns:
        For each change: `accuracy` in percent, ties counted as half; `standard_error` in percentage points, clustered
        by twins, since the captions of one pair of pictures are not independent; `won`, `ties`, `comparisons` and
        `twins`.

    Raises:
        AmpError: A score is not finite.
    """
    rows = {}
    for change, c in comparisons.items():
        difference = differences(score, c)
        if not bool(difference.isfinite().all()):
            raise AmpError(
                f"scores of the twins with another {change} are not all finite numbers, expected cosines; train the "
                "adapter again with a lower learning rate"
            )
        won, tie = difference > TIE, difference.abs() <= TIE
        gain = won.double() + 0.5 * tie.double()
        # The captions of both pictures of a pair form one unit.
        low, high = torch.minimum(c.own, c.other), torch.maximum(c.own, c.other)
        _, unit = torch.stack([low, high]).unique(dim=1, return_inverse=True)
        size = torch.bincount(unit).double()
        mean = gain.mean()
        # Ratio estimator, because pairs may have different numbers of captions.
        residual = torch.zeros(len(size), dtype=torch.float64).index_add_(0, unit, gain - mean)
        units = len(size)
        error = math.sqrt(float(residual.square().sum()) * units / max(1, units - 1)) / len(gain)
        rows[change] = {
            "accuracy": 100 * float(mean),
            "standard_error": 100 * error if units > 1 else None,
            "won": int(won.sum()),
            "ties": int(tie.sum()),
            "comparisons": len(gain),
            "twins": c.twins,
        }
    return rows


def base_score(image: torch.Tensor, text: torch.Tensor) -> Scorer:
    """Scores pairs by the cosine of the frozen features of images (I, d) and captions (C, d)."""
    return lambda images, captions: pair_similarity(image[images], text[captions])


def differences(score: Scorer, comparisons: Comparisons) -> torch.Tensor:
    """Score of each caption's own picture minus the score of the twin's (N,)."""
    parts = []
    for rows in torch.arange(len(comparisons.caption)).split(BATCH):
        images = torch.cat([comparisons.own[rows], comparisons.other[rows]])
        own, other = score(images, comparisons.caption[rows].repeat(2)).chunk(2)
        parts.append(own - other)
    return torch.cat(parts)
