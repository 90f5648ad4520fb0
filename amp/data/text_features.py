"""Features of the frozen text tower, computed once per text and stored on disk.

The text tower never runs in a training step: captions and state prompts are encoded before training, each distinct text
once. A store is named after the weights that made it, so runs, splits and datasets can share a folder.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from amp.errors import AmpError
from amp.folders import build_folder
from amp.model.towers.base import Backbone


class TextFeatureStore:
    """Maps texts to features (d,), stored in memory-mapped segments. Segments are added, but never changed.

    Args:
        root: Cache folder; the store is a sub-folder named after `key`.
        key: Hash of the text tower's weights and of how texts are tokenized.
        dim: Width d of a feature.
        dtype: Type on disk: `float32` is exact, `float16` takes half the space.
    """

    def __init__(self, root: str | os.PathLike, key: str, dim: int, dtype: str = "float32"):
        self.folder = texts_folder(root, key, dtype)
        self.dim, self.dtype = dim, np.dtype(dtype)
        self._segments: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Maps segments that other processes have added."""
        for path in sorted(self.folder.glob("segment-*")):
            if path.name not in self._segments:
                self._segments[path.name] = open_segment(path, self.dim)

    def __len__(self) -> int:
        return sum(len(keys) for keys, _ in self._segments.values())

    def __reduce__(self):
        # Workers map the files themselves instead of receiving the content.
        root, key = self.folder.parent, self.folder.name.split("-")[1]
        return TextFeatureStore, (root, key, self.dim, self.dtype.name)

    def missing(self, texts: Iterable[str]) -> list[str]:
        """The distinct texts without a feature, shortest first, so that texts of similar length share a batch."""
        distinct = list(dict.fromkeys(texts))
        where, _ = find_rows(list(self._segments.values()), text_keys(distinct))
        return sorted((t for t, w in zip(distinct, where, strict=True) if w < 0), key=lambda t: (len(t), t))

    def add(self, texts: Sequence[str], features: np.ndarray) -> None:
        """Stores features (n, d) of n distinct texts as one segment, atomically."""
        name = f"segment-{hashlib.blake2b(np.sort(text_keys(texts)).tobytes(), digest_size=8).hexdigest()}"
        write_segment(self.folder / name, texts, features.astype(self.dtype))
        self.refresh()

    def lookup(self, texts: Sequence[str]) -> np.ndarray:
        """Features float32 (n, d) of n texts.

        Raises:
            AmpError: A text has no stored feature.
        """
        return lookup_rows(list(self._segments.values()), texts, self.dim, self.folder)


Segment = tuple[np.ndarray, np.ndarray]
"""Sorted hashes of n texts, uint64 (n,), and their features (n, d)."""


def write_segment(folder: Path, texts: Sequence[str], features: np.ndarray) -> None:
    """Writes features (n, d) of n distinct texts to a new folder, atomically.

    Raises:
        AmpError: A text is given twice, or the folder can't be written.
    """
    keys = text_keys(texts)
    order = np.argsort(keys)
    if len(keys) and (np.diff(keys[order]) == 0).any():
        raise AmpError("two texts have the same 64-bit hash, or a text is given twice; expected distinct texts")
    with build_folder(folder) as temporary:
        np.save(temporary / "keys.npy", keys[order])
        np.save(temporary / "features.npy", features[order])


def open_segment(folder: Path, dim: int) -> Segment:
    """Memory-maps a folder written by `write_segment`.

    Raises:
        AmpError: The folder is missing or damaged, or its features don't have the width `dim`.
    """
    try:
        keys, features = (
            np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("keys", "features")
        )
    except (OSError, ValueError, EOFError) as error:
        raise AmpError(f"{folder}: can't be read ({error}); remove the folder; it will be made again") from error
    if features.shape != (len(keys), dim):
        raise AmpError(
            f"{folder}: features of shape {features.shape}; expected {(len(keys), dim)}; remove the folder; it will be "
            "made again"
        )
    return keys, features


def find_rows(segments: Sequence[Segment], keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Segment number and row of each key; -1 if it is in no segment."""
    where, row = np.full(len(keys), -1), np.full(len(keys), -1)
    for number, (known, _) in enumerate(segments):
        if len(known):
            place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
            hit = (where < 0) & (known[place] == keys)
            where[hit], row[hit] = number, place[hit]
    return where, row


def lookup_rows(segments: Sequence[Segment], texts: Sequence[str], dim: int, folder: Path) -> np.ndarray:
    """Features float32 (n, dim) of n texts in segments of `folder`.

    Raises:
        AmpError: A text has no stored feature.
    """
    where, row = find_rows(segments, text_keys(texts))
    if (where < 0).any():
        text = texts[int(np.argmax(where < 0))]
        raise AmpError(f"{folder}: no feature for {text[:80]!r}; encode the split's texts first")
    out = np.empty((len(texts), dim), dtype=np.float32)
    for number, (_, features) in enumerate(segments):
        rows = where == number
        out[rows] = features[row[rows]]
    return out


def texts_folder(root: str | os.PathLike, key: str, dtype: str) -> Path:
    """Folder of the features of a text tower in a cache folder; arguments as in `TextFeatureStore`."""
    return Path(root) / f"text-{key[:16]}-{dtype}"


def text_keys(texts: Sequence[str]) -> np.ndarray:
    """64-bit hashes of texts, uint64 (n,)."""
    digests = b"".join(hashlib.blake2b(t.encode("utf-8"), digest_size=8).digest() for t in texts)
    return np.frombuffer(digests, dtype=np.uint64)


def cut_texts(texts: Sequence[str], tokenizer, length: int) -> int:
    """Counts the texts that a tokenizer truncates.

    Args:
        texts: Any texts.
        tokenizer: Tokenizer of the base model.
        length: Context length of the base model.

    Raises:
        AmpError: The tokenizer uses all positions even for an empty text, so truncation can't be detected.
    """
    # With a context one token longer, the tokens of a text that fits stay the same. In a truncated text, the end token
    # moves.
    rows, longer = (tokenizer(["", *texts], context_length=places) for places in (length, length + 1))
    cut = (rows != longer[:, :length]).any(dim=1)
    if cut[0]:
        raise AmpError("the model's tokenizer fills the whole context, so cut texts can't be counted")
    return int(cut.sum())


@torch.no_grad()
def encode_texts(
    texts: Sequence[str],
    backbone: Backbone,
    tokenizer,
    batch_size: int = 256,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Features float32 (n, d) of n texts.

    Args:
        texts: The texts. Sorted by length they take less time, because a batch is padded to its longest text.
        backbone: The frozen CLIP on its device.
        tokenizer: Tokenizer of the base model. It truncates longer texts to its context length, as in open_clip.
        batch_size: Texts per forward pass.
        progress: Called after each batch with the number of texts done.
    """
    rows = np.empty((len(texts), backbone.embed_dim), np.float32)
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        rows[start : start + len(batch)] = (
            backbone.encode_text(tokenizer(batch).to(backbone.device)).float().cpu().numpy()
        )
        if progress is not None:
            progress(start + len(batch))
    return rows


def encode_missing(
    store: TextFeatureStore,
    texts: Iterable[str],
    backbone: Backbone,
    tokenizer,
    batch_size: int = 256,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int, int], None] | None = None,
    segment: int = 200_000,
) -> None:
    """Encodes the texts that are missing in the store. Each rank encodes and adds a share.

    Afterwards, wait for all ranks and call `store.refresh()`.

    Args:
        store: Store that features are added to.
        texts: Any texts; they may repeat.
        backbone, tokenizer, batch_size: See `encode_texts`.
        rank, world: Rank of this process, and number of processes.
        progress: Called as progress(done, total) after each batch.
        segment: Maximum number of texts per segment, which bounds memory.
    """
    mine = store.missing(texts)[rank::world]
    for low in range(0, len(mine), segment):
        part = mine[low : low + segment]

        def report(done: int, low: int = low) -> None:
            if progress is not None:
                progress(low + done, len(mine))

        store.add(part, encode_texts(part, backbone, tokenizer, batch_size, report))
