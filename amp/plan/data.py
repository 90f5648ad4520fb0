"""The data of a planned run: real shards, which are inspected, or a simulated dataset of a given size."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from amp.data.split import ShardSplit
from amp.errors import AmpError
from amp.knowledge.text import select
from amp.plan.findings import Finding, note, ok
from amp.train.config import TrainConfig
from amp.train.run import open_splits

CAPTIONS_PER_IMAGE = 5  # of simulated data, as in COCO and Flickr30K
SHARD_IMAGES = 1_000  # images per shard of simulated data


@dataclass
class Part:
    """Number of images, captions and shards of a split."""

    images: int
    captions: int
    shards: int


@dataclass
class Dataset:
    """Data of a planned run.

    Attributes:
        train: The training split.
        val: The validation split; None if the run has none, or if it is unknown.
        triplets: Estimated mean number of triplets that are used per caption.
        splits: The opened splits, training first; empty for simulated data.
    """

    train: Part
    val: Part | None
    triplets: float
    splits: list[ShardSplit] = field(default_factory=list)

    @property
    def per_epoch(self) -> int:
        """Number of training images per epoch, which the weights of the sources change."""
        return self.splits[0].per_epoch if self.splits else self.train.images

    @property
    def simulated(self) -> bool:
        return not self.splits

    @classmethod
    def simulate(cls, config: TrainConfig, images: int, captions: int | None, shards: int | None) -> "Dataset":
        """Returns a simulated training split of these sizes, with the maximum number of triplets per caption."""
        captions = CAPTIONS_PER_IMAGE * images if captions is None else captions
        shards = -(-images // SHARD_IMAGES) if shards is None else shards
        return cls(Part(images, captions, shards), None, config.prompt.max_triplets)

    @classmethod
    def read(cls, config: TrainConfig) -> "Dataset":
        """Opens the shards of a run, indexes each one and decodes one of its samples.

        Raises:
            AmpError: A shard is missing or can't be read, or its size or number of samples differs from the manifest.
        """
        splits = [split for split in open_splits(config, cached=False) if split is not None]
        found, captions = 0, 0
        for split in splits:
            start = 0
            for size in split.sizes:
                split.image(start)
                for _, knowledge in split.captions(split.record(start), config.data.kinds):
                    captions += 1
                    found += len(select(knowledge, config.prompt.max_triplets))
                start += size
        parts = [Part(len(s), sum(shard.captions for shard in s.shards), len(s.shards)) for s in splits]
        return cls(parts[0], parts[1] if parts[1:] else None, found / captions, splits)


def check_shards(data: Dataset, config: TrainConfig, verify: bool) -> Iterator[Finding]:
    """Reports on the shards, which `Dataset.read` has already inspected; `verify` compares their sha256."""
    if data.simulated:
        train = data.train
        yield note(f"simulated: {train.images:,} training images in {train.shards:,} shards; nothing was read")
        return
    if verify:
        for shard in (shard for split in data.splits for shard in split.shards):
            digest = shard.digest()
            if digest != shard.sha256:
                raise AmpError(
                    f"{shard.path}: sha256 is {digest[:12]}, expected the manifest's {shard.sha256[:12]}; copy it again"
                )
    counts = " and ".join(f"{len(split.shards):,} of {split.name}" for split in data.splits)
    how = "sha256 as in the manifest" if verify else "--plan.verify true also compares their sha256"
    yield ok(f"{data.splits[0].root}: {counts}; sizes and indices match, and one sample of each can be decoded; {how}")
