"""Which sample comes when: a pure function of (seed, epoch), regardless of the number of workers.

The global order of an epoch is cut into global batches, and each rank takes its slice of each. So every rank runs the
same number of steps, the same global batch is seen by 1, 2 or 64 ranks, and a run continues at any step by counting.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from amp.errors import AmpError

WINDOW = 64  # shards mixed at a time: reads stay within so many files


def epoch_order(
    shard_sizes: Sequence[int], seed: int, epoch: int, window: int, neighbours: np.ndarray | None = None, group: int = 1
) -> np.ndarray:
    """Shuffled sample indices of a split, one an image.

    Shards are shuffled, then samples within windows of `window` shards: a batch mixes that many shards, and reads stay
    within as many open files.

    Args:
        shard_sizes: Samples of each shard.
        seed: Of the run.
        epoch: 0-based.
        window: Shards mixed at a time.
        neighbours: Samples that belong next to each sample, best first (I, k); those of other windows are left out.
        group: Samples that `neighbours` bring together.

    Returns:
        int64 (sum of sizes,): sample i of the split is at position i of the concatenated shards.
    """
    rng = np.random.default_rng([seed, epoch])
    starts = np.concatenate([[0], np.cumsum(shard_sizes)])
    shards = rng.permutation(len(shard_sizes))
    parts = []
    for low in range(0, len(shards), window):
        samples = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards[low : low + window]])
        samples = rng.permutation(samples)
        parts.append(samples if neighbours is None or group < 2 else in_groups(samples, neighbours, group, rng))
    return np.concatenate(parts).astype(np.int64)


def in_groups(samples: np.ndarray, neighbours: np.ndarray, group: int, rng: np.random.Generator) -> np.ndarray:
    """The same samples, each followed by up to `group` - 1 of its neighbours, drawn from those that are still free.

    The groups come in random order, so that a batch holds easy and hard negatives.
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
    """The one caption a sample shows in an epoch; in `captions` epochs each is shown once, in an order of its own."""
    cycle, turn = divmod(epoch, captions)
    # Sorted by a hash. This runs once per image, and just seeding a generator takes several times as long.
    drawn = hashlib.shake_128(f"{seed}/{sample}/{cycle}".encode()).digest(8 * captions)
    return sorted(range(captions), key=lambda number: drawn[8 * number : 8 * number + 8])[turn]


class BatchOrder:
    """Batch sampler of one rank: lists of (sample, epoch), `len(self)` of them, the same number on every rank.

    `steps` is their number in a whole epoch.

    Args:
        shard_sizes: Samples of each shard of the split.
        batch_size: Samples a rank and step.
        rank, world: This process and how many there are.
        seed: Of the run.
        neighbours, group, window: See `epoch_order`.
        accumulation: Batches per step. An epoch is cut into whole steps, so that one of 16 samples is the same as
            1 x 16, 2 x 8 or 4 x 4.

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
    ):
        self.shard_sizes, self.batch_size, self.rank, self.world = list(shard_sizes), batch_size, rank, world
        self.seed, self.window, self.epoch, self.start = seed, window, 0, 0
        self.neighbours, self.group = neighbours, group
        samples = sum(self.shard_sizes)
        self.steps = samples // (batch_size * world * accumulation) * accumulation
        if self.steps == 0:
            parts = f"{batch_size} x {world} processes x {accumulation} batches"
            raise AmpError(
                f"the training split holds {samples} images, fewer than one step of {parts} = "
                f"{batch_size * world * accumulation}. Lower data.batch_size or gradient_accumulation, or add images"
            )

    def set_position(self, batch: int) -> None:
        """Chooses where the next iteration begins, counted in batches of a rank since the run began. It ends with the
        epoch; what lies before is neither read nor decoded."""
        self.epoch, self.start = divmod(batch, self.steps)

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = epoch_order(self.shard_sizes, self.seed, self.epoch, self.window, self.neighbours, self.group)
        size = self.batch_size * self.world
        for step in range(self.start, self.steps):
            start = step * size + self.rank * self.batch_size
            yield [(int(i), self.epoch) for i in order[start : start + self.batch_size]]
