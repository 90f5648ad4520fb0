"""Random access to the samples of a split, over all its shards."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, TypeVar

from PIL import Image

from amp.data.images.decode import decode_rgb
from amp.data.recent import Recent
from amp.data.shards import ShardInfo, ShardManifest, ShardReader
from amp.data.shares import Part, Shares
from amp.data.sources import Sources, sources_of
from amp.errors import AmpError
from amp.knowledge.schema import Foil, Knowledge, parse_foils, parse_knowledge

if TYPE_CHECKING:
    from amp.data.remote.cache import ShardCache

Decoded = TypeVar("Decoded")


class ShardSplit:
    """The samples of one split, indexed by their position in the concatenated shards.

    Args:
        root: Folder with a `manifest.json`, or its URL, or several of them (`amp.data.sources`).
        split: Name of the split in the manifest.
        weighted: Repeat the samples of each source by its weight, as training does. Otherwise each sample occurs once,
            and sources without this split are left out.
        cache: Cache for remote shards.

    Attributes:
        root: The folders, for messages.
        dataset: Their names.
        manifests: Their manifests.
        shares: The samples that take part in an epoch; None for all.
        shards: The shards, in order.
        sizes: Number of samples in each shard.
        without_knowledge: Number of captions without a knowledge record.

    Raises:
        AmpError: A folder or split doesn't exist, or the split can't be used.
    """

    def __init__(self, root: Sources, split: str, weighted: bool = False, cache: "ShardCache | None" = None):
        self.name, self.cache = split, cache
        self.shards: list[ShardInfo] = []
        parts: list[Part] = []
        sources = sources_of(root)
        self.manifests = [ShardManifest.load(source.folder) for source in sources]
        having = [split in manifest.splits for manifest in self.manifests]
        for source, manifest, has in zip(sources, self.manifests, having, strict=True):
            if not has and any(having) and not weighted:
                continue
            shards, weight = manifest.split(split), source.weight if weighted else Fraction(1)
            self.shards += shards * math.ceil(weight)  # copies have their own captions and crops in an epoch
            if weight.denominator != 1:
                parts.append(Part(len(self.shards) - len(shards), len(self.shards), weight % 1))
        self.root = ", ".join(str(source.folder) for source in sources)
        self.dataset = " + ".join(source.folder.name for source in sources)
        self.without_knowledge = sum(found.captions_without_knowledge.get(split, 0) for found in self.manifests)
        self.sizes = [shard.samples for shard in self.shards]
        self.shares = Shares(tuple(self.sizes), tuple(parts)) if parts else None
        self._starts = [0, *accumulate(self.sizes)]
        self._readers: Recent[ShardReader] = Recent()

    def __len__(self) -> int:
        return self._starts[-1]

    def _locate(self, index: int) -> tuple[ShardReader, int]:
        shard = self.shard_of(index)
        return self._readers.get(shard, lambda: self._open(shard)), index - self._starts[shard]

    def _open(self, shard: int) -> ShardReader:
        reader = self.shards[shard].open(self.cache)
        if len(reader) != self.sizes[shard]:
            raise AmpError(
                f"{reader.path}: holds {len(reader)} samples; expected {self.sizes[shard]} (from the manifest); "
                "run amp make_shards again"
            )
        return reader

    @property
    def per_epoch(self) -> int:
        """Number of samples in an epoch."""
        return len(self) if self.shares is None else self.shares.samples

    def prefetch(self, indices: Sequence[int]) -> None:
        """Reads remote samples that are needed next, several at a time. Does nothing for local ones."""
        rows: dict[int, list[int]] = {}
        for index in indices:
            shard = self.shard_of(index)
            if self.shards[shard].remote is not None:
                rows.setdefault(shard, []).append(index - self._starts[shard])
        if not rows:
            return
        from amp.data.remote.fetch import in_parallel
        from amp.data.remote.reader import RemoteReader

        missing = [shard for shard in sorted(rows) if shard not in self._readers]
        opened = dict(zip(missing, in_parallel(self._open, missing), strict=True))
        unread: list[tuple[RemoteReader, list[int]]] = []
        for shard in sorted(rows):
            reader = self._readers.get(shard, partial(opened.__getitem__, shard))
            assert isinstance(reader, RemoteReader)
            if not reader.in_cache:  # most shards are, and starting threads takes longer than looking
                unread.append((reader, rows[shard]))
        in_parallel(lambda one: one[0].prefetch(one[1]), unread)

    def record(self, index: int) -> dict:
        """The JSON record of a sample."""
        reader, row = self._locate(index)
        return reader.record(row)

    def decoded(self, index: int, decode: Callable[[bytes], Decoded]) -> Decoded:
        """Applies `decode` to the bytes of a sample's photo.

        Raises:
            AmpError: The photo can't be decoded.
        """
        reader, row = self._locate(index)
        content = reader.photo(row)
        try:
            return decode(content)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise AmpError(
                f"{reader.path}: image of sample {reader.record(row)['key']!r} can't be decoded ({error}); run "
                "amp make_shards again with --check decode, which skips and lists such images"
            ) from error

    def image(self, index: int) -> Image.Image:
        """The photo of a sample in RGB; raises like `decoded`."""
        return Image.fromarray(self.decoded(index, decode_rgb))

    def caption(
        self, record: dict, number: int, keep: Sequence[str] = ("action", "attribute")
    ) -> tuple[str, Knowledge]:
        """Text and knowledge of one caption of a record; only triplets of the kinds in `keep`."""
        caption = record["captions"][number]
        return caption["text"], parse_knowledge(caption, f"{self.root}/{record['key']}.json").only(keep)

    def captions(self, record: dict, keep: Sequence[str] = ("action", "attribute")) -> list[tuple[str, Knowledge]]:
        """Text and knowledge of all captions of a record; see `caption`."""
        return [self.caption(record, number, keep) for number in range(len(record["captions"]))]

    def foils(self, record: dict) -> list[tuple[Foil, ...]]:
        """The foils of each caption of a record."""
        where = f"{self.root}/{record['key']}.json"
        return [parse_foils(caption, where) for caption in record["captions"]]

    def records(self) -> Iterator[dict]:
        """All records in order."""
        return (self.record(i) for i in range(len(self)))

    def rows_of(self, shard: int) -> range:
        """The samples of a shard, given by its number."""
        return range(self._starts[shard], self._starts[shard + 1])

    def shard_of(self, index: int) -> int:
        """Number of the shard that contains a sample."""
        return bisect_right(self._starts, index) - 1
