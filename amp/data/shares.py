"""Which samples of a mixture take part in an epoch."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np


@dataclass(frozen=True)
class Part:
    """Shards of which only a fraction of the samples takes part in each epoch.

    Attributes:
        first, last: Numbers of the shards, `last` excluded.
        fraction: Between 0 and 1.
    """

    first: int
    last: int
    fraction: Fraction


@dataclass(frozen=True)
class Shares:
    """The samples of a mixture that take part in an epoch, a pure function of (seed, epoch).

    A fraction takes whole shards at random, and of one more shard the rest, so that few shards have to be read.

    Attributes:
        sizes: Number of samples in each shard.
        parts: The shards that are not used whole.
    """

    sizes: tuple[int, ...]
    parts: tuple[Part, ...] = ()

    @property
    def samples(self) -> int:
        """Number of samples in an epoch, the same in each."""
        return sum(self.sizes) - sum(self._size(part) - self._count(part) for part in self.parts)

    def taken(self, seed: int, epoch: int) -> dict[int, np.ndarray]:
        """The samples that are used, int64, of each shard that isn't used whole, by its number."""
        starts = np.concatenate([[0], np.cumsum(self.sizes)])
        found: dict[int, np.ndarray] = {}
        for part in self.parts:
            rng = np.random.default_rng([seed, epoch, part.first])
            left = self._count(part)
            for shard in (part.first + rng.permutation(part.last - part.first)).tolist():
                samples = np.arange(starts[shard], starts[shard + 1])
                found[shard] = samples if left >= len(samples) else np.sort(rng.permutation(samples)[:left])
                left -= len(found[shard])
        return found

    def _size(self, part: Part) -> int:
        return sum(self.sizes[part.first : part.last])

    def _count(self, part: Part) -> int:
        return round(self._size(part) * part.fraction)
