"""Random access to the samples of a split, over all its shards."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

from PIL import Image

from amp.data.images.decode import decode_rgb
from amp.data.recent import SHARDS
from amp.data.shards import ShardInfo, ShardManifest, ShardReader
from amp.errors import AmpError
from amp.knowledge.schema import Knowledge, parse_knowledge

MAX_OPEN = SHARDS
Decoded = TypeVar("Decoded")


class ShardSplit:
    """The samples of one split, indexed by their position in the concatenated shards.

    Args:
        root: Folder with a `manifest.json`.
        split: Name of the split in the manifest.

    Attributes:
        shards: The shards, in order.
        sizes: Number of samples in each shard.
        without_knowledge: Number of captions without a knowledge record.

    Raises:
        AmpError: The folder or split doesn't exist, or the split can't be used.
    """

    def __init__(self, root: str | Path, split: str):
        self.root, self.name = Path(root), split
        manifest = ShardManifest.load(root)
        self._set_shards(manifest.split(split))
        self.without_knowledge = manifest.captions_without_knowledge[split]

    def _set_shards(self, shards: list[ShardInfo]) -> None:
        self.shards = shards
        self.sizes = [shard.samples for shard in shards]
        self._starts = [0, *accumulate(self.sizes)]
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()

    def of_shard(self, number: int) -> "ShardSplit":
        """The samples of one shard, given by its number."""
        part = copy(self)
        part._set_shards([self.shards[number]])
        return part

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self):
        return {**self.__dict__, "_readers": OrderedDict()}

    def _locate(self, index: int) -> tuple[ShardReader, int]:
        shard = self.shard_of(index)
        if shard not in self._readers:
            if len(self._readers) >= MAX_OPEN:
                self._readers.popitem(last=False)[1].close()
            reader = self.shards[shard].open()
            if len(reader) != self.sizes[shard]:
                raise AmpError(
                    f"{reader.path}: holds {len(reader)} samples; expected {self.sizes[shard]} (from the manifest); "
                    "run amp make_shards again"
                )
            self._readers[shard] = reader
        self._readers.move_to_end(shard)
        return self._readers[shard], index - self._starts[shard]

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
        try:
            return decode(reader.photo(row))
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

    def records(self) -> Iterator[dict]:
        """All records in order."""
        return (self.record(i) for i in range(len(self)))

    def shard_of(self, index: int) -> int:
        """Number of the shard that contains a sample."""
        return bisect_right(self._starts, index) - 1
