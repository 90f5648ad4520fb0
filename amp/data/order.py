"""The order of samples: a pure function of (seed, epoch), regardless of the number of workers.

The global order of an epoch is cut into global batches, and each rank takes a slice of each batch. So every rank runs
the same number of steps, the global batches are the same on 1, 2 or 64 ranks, and a run can resume at any step without
stored state.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from amp.data.shares import Shares
from amp.errors import AmpError

WINDOW = 64  # shards that are mixed with each other, and thus files that are read at a time


def shards_of_epoch(
    shard_sizes: Sequence[int], seed: int, epoch: int, taken: Mapping[int, np.ndarray] | None = None
) -> list[int]:
    """The shards of an epoch in the order in which they are read; see `epoch_windows`."""
    return _shards_of_epoch(np.random.default_rng([seed, epoch]), len(shard_sizes), taken)


def _shards_of_epoch(rng: np.random.Generator, shards: int, taken: Mapping[int, np.ndarray] | None) -> list[int]:
    order = rng.permutation(shards).tolist()
    return [shard for shard in order if taken is None or shard not in taken or len(taken[shard])]


def epoch_windows(
    shard_sizes: Sequence[int],
    seed: int,
    epoch: int,
    window: int,
    neighbours: np.ndarray | None = None,
    group: int = 1,
    taken: Mapping[int, np.ndarray] | None = None,
) -> Iterator[np.ndarray]:
    """Shuffled sample indices of a split, one per image, one window of shards after the other.

    Shards are shuffled, then the samples within each window of `window` shards, so that a batch mixes that many shards
    and reads from as many open files. Memory doesn't depend on the size of the split.

    Args:
        shard_sizes: Number of samples in each shard.
        seed: Random seed of the run.
        epoch: 0-based epoch.
        window: Number of shards that are mixed with each other.
        neighbours: Samples to be placed next to each sample, best first (I, k). Samples of other windows are ignored.
        group: Maximum number of samples that are placed next to each other because of `neighbours`.
        taken: Samples of the shards that aren't used whole (`Shares.taken`), by the number of the shard.

    Yields:
        Indices int64 (number of the window's samples,) into the concatenated shards.
    """
    rng = np.random.default_rng([seed, epoch])
    starts = np.concatenate([[0], np.cumsum(shard_sizes)])
    shards = _shards_of_epoch(rng, len(shard_sizes), taken)
    taken = taken or {}
    for low in range(0, len(shards), window):
        samples = np.concatenate(
            [taken[s] if s in taken else np.arange(starts[s], starts[s + 1]) for s in shards[low : low + window]]
        )
        samples = rng.permutation(samples)
        if neighbours is not None and group > 1:
            samples = in_groups(samples, neighbours, group, rng)
        yield samples.astype(np.int64)


def in_groups(samples: np.ndarray, neighbours: np.ndarray, group: int, rng: np.random.Generator) -> np.ndarray:
    """Reorders samples into groups: a sample and up to `group` - 1 random neighbours that are in no group yet.

    The groups are in random order, so that a batch contains easy and hard negatives.
    """
    free = set(samples.tolist())
    groups = []
    for sample in samples.tolist():
        if sample not in free:
            continue
        near = [other for other in neighbours[sample].tolist() if other in free and other != sample]
        chosen = rng.permutation(len(near))[: group - 1]
        groups.append([sample, *(near[i] for i in chosen)])
        free.difference_update(groups[-1])
    return np.concatenate([groups[i] for i in rng.permutation(len(groups))])


def caption_of_epoch(seed: int, epoch: int, sample: int, captions: int) -> int:
    """Index of the caption that is used for a sample in an epoch. In each cycle of `captions` epochs, every caption is
    used once, in a random order."""
    cycle, turn = divmod(epoch, captions)
    # Sort by a hash. This runs once per image, and seeding a random generator would take several times as long.
    drawn = hashlib.shake_128(f"{seed}/{sample}/{cycle}".encode()).digest(8 * captions)
    return sorted(range(captions), key=lambda number: drawn[8 * number : 8 * number + 8])[turn]


class BatchOrder:
    """Batch sampler of one rank. It yields lists of (sample, epoch), the same number of lists on every rank.

    Args:
        shard_sizes: Number of samples in each shard of the split.
        batch_size: Number of samples per rank and batch.
        rank, world: Rank of this process, and number of processes.
        seed: Random seed of the run.
        neighbours, group, window: See `epoch_windows`.
        accumulation: Batches per step. An epoch is cut into whole steps, so that a step of 16 samples has the same
            samples as 1 x 16, 2 x 8 or 4 x 4.
        shares: The samples of a mixture that take part in an epoch; None for all.

    Attributes:
        steps: Number of batches in a whole epoch.

    Raises:
        AmpError: The split is smaller than one step.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        batch_size: int,
        rank: int,
        world: int,
        seed: int,
        neighbours: np.ndarray | None = None,
        group: int = 1,
        accumulation: int = 1,
        window: int = WINDOW,
        shares: Shares | None = None,
    ):
        self.shard_sizes, self.batch_size, self.rank, self.world = list(shard_sizes), batch_size, rank, world
        self.seed, self.window, self.epoch, self.start = seed, window, 0, 0
        self.neighbours, self.group, self.shares = neighbours, group, shares
        samples = sum(self.shard_sizes) if shares is None else shares.samples
        self.steps = samples // (batch_size * world * accumulation) * accumulation
        if self.steps == 0:
            parts = f"{batch_size} x {world} processes x {accumulation} batches"
            raise AmpError(
                f"the training split holds {samples} images, fewer than one step of {parts} = "
                f"{batch_size * world * accumulation}; lower data.batch_size or gradient_accumulation, or add images"
            )

    def set_position(self, batch: int) -> None:
        """Sets the start of the next iteration, which ends with the epoch. Skipped samples are not read.

        Args:
            batch: Number of batches per rank since the start of the run.
        """
        self.epoch, self.start = divmod(batch, self.steps)

    def taken(self, epoch: int) -> dict[int, np.ndarray] | None:
        """See `Shares.taken`; None if all samples take part."""
        return None if self.shares is None else self.shares.taken(self.seed, epoch)

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        windows = epoch_windows(
            self.shard_sizes,
            self.seed,
            self.epoch,
            self.window,
            self.neighbours,
            self.group,
            self.taken(self.epoch),
        )
        size = self.batch_size * self.world
        left_out = self.start * size  # samples of earlier batches
        order = np.empty(0, np.int64)
        for _ in range(self.start, self.steps):
            while len(order) < size:
                window = next(windows)
                order = np.concatenate([order, window[left_out:]])
                left_out = max(0, left_out - len(window))
            batch, order = order[:size], order[size:]
            mine = batch[self.rank * self.batch_size :][: self.batch_size]
            yield [(int(i), self.epoch) for i in mine]
