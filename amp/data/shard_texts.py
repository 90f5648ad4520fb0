"""Features of a training split's texts, stored per shard, so that a run opens only those of the shards it reads."""

import hashlib
import os
from collections.abc import Callable, Sequence

import numpy as np

from amp.data.recent import Recent
from amp.data.shards import ShardInfo
from amp.data.shared_work import make_missing
from amp.data.split import ShardSplit
from amp.data.text_features import Segment, lookup_rows, open_segment, texts_folder, write_segment
from amp.knowledge.text import tower_texts

Encode = Callable[[Sequence[str], Callable[[int], None]], np.ndarray]
CAPTIONS = "captions"
FORMS = {"both": "states", "states": "states", "template": "template"}
"""Values of `PromptConfig.knowledge` whose knowledge is encoded as texts, and the name of these texts."""


class ShardTexts:
    """Features of the texts of shards: one segment per shard for its captions, and one for the texts of its knowledge.

    A segment depends only on its shard and the text tower. It holds the texts of all triplets, so runs that use other
    kinds or numbers of triplets share it.

    Args:
        root: Cache folder.
        key: Hash of the text tower's weights.
        dim: Width d of a feature.
        dtype: Type on disk: `float32` is exact, `float16` takes half the space.
        setting: Value of `PromptConfig.knowledge`.
    """

    def __init__(self, root: str | os.PathLike, key: str, dim: int, dtype: str, setting: str):
        self._arguments = (root, key, dim, dtype, setting)
        self.folder, self.dim, self.dtype, self.setting = texts_folder(root, key, dtype), dim, np.dtype(dtype), setting
        self._open: Recent[list[Segment]] = Recent()

    def __reduce__(self):
        return ShardTexts, self._arguments

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of texts that the setting needs."""
        return (CAPTIONS, FORMS[self.setting]) if self.setting in FORMS else (CAPTIONS,)

    def names(self, shard: ShardInfo) -> list[str]:
        """Names of a shard's segments."""
        return [_name(shard.texts, kind) for kind in self.kinds]

    def make(
        self,
        split: ShardSplit,
        encode: Encode,
        first: float = 0.0,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Encodes the texts of the shards that have no segments yet, together with other processes (`make_missing`).

        Args:
            split: The split.
            encode: Maps n texts to their features (n, d). It calls its second argument with the number of texts done.
            first: Where in the split this process starts, as a fraction.
            progress: Called as progress(done, total) with numbers of captions.
        """
        jobs = {
            name: (number, kind)
            for number, shard in enumerate(split.shards)
            for kind, name in zip(self.kinds, self.names(shard), strict=True)
        }
        total, left = sum(shard.captions for shard in split.shards), len(jobs)

        def report(missing: float) -> None:
            progress(round(total * (1 - missing / len(jobs))), total)

        def count(missing: int) -> None:
            nonlocal left
            left = missing
            report(left)

        def make(name: str) -> None:
            number, kind = jobs[name]
            texts = sorted(set(self._texts(split, number, kind)), key=lambda text: (len(text), text))
            features = encode(texts, lambda done: report(left - done / len(texts)))
            write_segment(self.folder / name, texts, features.astype(self.dtype))

        make_missing(list(jobs), self.folder, make, first, count)

    def lookup(self, texts: Sequence[str], shards: Sequence[str]) -> np.ndarray:
        """Features float32 (n, d) of n texts, given the `ShardInfo.texts` of each text's shard.

        Raises:
            AmpError: A text has no stored feature.
        """
        out = np.empty((len(texts), self.dim), np.float32)
        owners = np.array(shards)
        for shard in dict.fromkeys(shards):
            rows = np.flatnonzero(owners == shard)
            found = [texts[row] for row in rows.tolist()]
            out[rows] = lookup_rows(self._segments(shard), found, self.dim, self.folder)
        return out

    def _segments(self, shard: str) -> list[Segment]:
        return self._open.get(
            shard, lambda: [open_segment(self.folder / _name(shard, kind), self.dim) for kind in self.kinds]
        )

    def _texts(self, split: ShardSplit, number: int, kind: str) -> list[str]:
        """The texts of one kind in shard `number` of a split; they may repeat."""
        captions = [caption for row in split.rows_of(number) for caption in split.captions(split.record(row))]
        if kind == CAPTIONS:
            return [text for text, _ in captions]
        return [text for _, item in captions for text in tower_texts(item, len(item.triplets), self.setting)]


def _name(texts: str, kind: str) -> str:
    # Hashed again, because a manifest could claim any text to be a hash, even a path.
    return f"shard-{hashlib.sha256(texts.encode()).hexdigest()[:16]}-{kind}"
