"""Outputs of the frozen image tower for each image of a split, computed once: early tokens and base features.

The blocks before the first prompted block see neither knowledge nor prompts. Without random augmentation their output
never changes, so it is stored: (F + M) x d_v numbers per image, memory-mapped.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from amp.cores import decoding_workers
from amp.data.images.decode import DECODING_VERSION
from amp.data.recent import Recent
from amp.data.split import ShardSplit
from amp.errors import AmpError
from amp.folders import build_folder
from amp.model.clip import ActionAwareCLIP


class Rows:
    """The rows of several arrays, memory-mapped when they are first needed, as one array.

    Args:
        files: One `.npy` file per part.
        sizes: Number of rows of each file.
    """

    def __init__(self, files: Sequence[Path], sizes: Sequence[int]):
        self.files, self._starts = list(files), np.concatenate([[0], np.cumsum(sizes)])
        self._open: Recent[np.ndarray] = Recent()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self):
        return Rows, (self.files, np.diff(self._starts))

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self._part(0).shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return self._part(0).dtype

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(np.concatenate([self._part(i) for i in range(len(self.files))]), dtype)

    def __getitem__(self, index) -> np.ndarray:
        """Selects one row, or the rows of an int64 array (n,)."""
        if np.ndim(index) == 0:
            part = int(np.searchsorted(self._starts, index, side="right")) - 1
            return self._part(part)[index - self._starts[part]]
        parts = np.searchsorted(self._starts, index, side="right") - 1
        out = np.empty((len(index), *self.shape[1:]), self.dtype)
        for part in np.unique(parts):
            out[parts == part] = self._part(part)[index[parts == part] - self._starts[part]]
        return out

    def _part(self, number: int) -> np.ndarray:
        return self._open.get(number, lambda: self._load(number))

    def _load(self, number: int) -> np.ndarray:
        file, rows = self.files[number], int(self._starts[number + 1] - self._starts[number])
        try:
            found = np.load(file, mmap_mode="r", allow_pickle=False)
            if len(found) != rows:
                raise ValueError(f"{len(found)} rows; expected {rows}")
        except (OSError, ValueError, EOFError) as error:
            raise AmpError(f"{file}: can't be read ({error}); remove its folder; it will be made again") from error
        return found


class FrozenFeatures:
    """Frozen features of the I images of a split.

    Args:
        early: Tokens before the first prompted block (I, F + M, d_v); None if only base features are loaded.
        base: The frozen CLIP's image features (I, d).
    """

    def __init__(self, early: np.ndarray | Rows | None, base: np.ndarray | Rows):
        self.early, self.base = early, base

    def __len__(self) -> int:
        return len(self.base)

    @property
    def tokens(self) -> np.ndarray | Rows:
        """`early`, which must have been loaded."""
        assert self.early is not None, "these features were loaded without their tokens"
        return self.early

    @classmethod
    def load(cls, folders: Sequence[Path], sizes: Sequence[int], tokens: bool = True) -> "FrozenFeatures":
        """Opens folders that `compute_frozen_features` wrote, one per shard; `early` only if `tokens`.

        Raises:
            AmpError: A file is missing or truncated. Files are opened when they are first needed.
        """
        early = Rows([folder / "early.npy" for folder in folders], sizes) if tokens else None
        return cls(early, Rows([folder / "base.npy" for folder in folders], sizes))


class SplitImages(Dataset):
    """The preprocessed images of a split."""

    def __init__(self, split: ShardSplit, preprocess):
        self.split, self.preprocess = split, preprocess

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        """The images of a batch, for DataLoader."""
        self.split.prefetch(indices)
        return [self[index] for index in indices]

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.preprocess(self.split.image(index))


def features_folders(
    root: str | os.PathLike, split: ShardSplit, model: ActionAwareCLIP, preprocess, dtype: str
) -> list[Path]:
    """Folder of each shard's features. Its name depends on everything that determines the features."""
    parts = [model.backbone.weights_hash("vision"), str(model.tower.first), repr(preprocess), dtype]
    parts += [f"pixels {DECODING_VERSION}"]
    return [
        Path(root) / f"image-{hashlib.sha256('|'.join([*parts, *shard.photos]).encode()).hexdigest()[:16]}"
        for shard in split.shards
    ]


class ImageBatches:
    """Batches of preprocessed images of a split. Its decoding workers stay alive from one shard to the next.

    Args:
        split: Split with the images.
        preprocess: The validation transform; it must not be random.
        batch_size: Images per batch. Batches end with their shard.
        workers: Number of decoding processes.
        gpu: Whether batches are copied to page-locked memory.
    """

    def __init__(self, split: ShardSplit, preprocess, batch_size: int, workers: int, gpu: bool):
        workers = decoding_workers(workers, gpu)
        self.split, self.batch_size, self._batches = split, batch_size, list[list[int]]()
        images = SplitImages(split, preprocess)
        self._loader = DataLoader(
            images, batch_sampler=self._batches, num_workers=workers, pin_memory=gpu, persistent_workers=workers > 0
        )

    def of_shards(self, shards: range) -> Iterator[torch.Tensor]:
        """The images of consecutive shards, given by their numbers."""
        for rows in map(self.split.rows_of, shards):
            self._batches[:] = [list(rows[low : low + self.batch_size]) for low in range(0, len(rows), self.batch_size)]
            yield from self._loader


@torch.no_grad()
def compute_frozen_features(
    images: ImageBatches,
    model: ActionAwareCLIP,
    shards: range | None = None,
    folder: Path | None = None,
    dtype: str = "float32",
    progress: Callable[[int, int], None] | None = None,
    tokens: bool = True,
) -> FrozenFeatures:
    """Computes the frozen features of the images of a split.

    The computation uses the weights' own precision, never autocast, so that runs of any mixed precision share a folder.

    Args:
        images: The preprocessed images.
        model: Model on its device.
        shards: Numbers of consecutive shards; None for all.
        folder: New folder to store the arrays in; None keeps them in memory.
        dtype: Type of the early tokens; base features are always float32.
        progress: Called as progress(done, total).
        tokens: Whether to keep the early tokens in addition to the base features.
    """
    backbone, device = model.backbone, model.logit_scale.device
    shards = range(len(images.split.shards)) if shards is None else shards
    total = sum(images.split.sizes[number] for number in shards)
    shape = (total, backbone.num_tokens, backbone.vision_width)

    def fill(early: np.ndarray | None) -> np.ndarray:
        base, done = np.empty((total, backbone.embed_dim), np.float32), 0
        for batch in images.of_shards(shards):
            features = model(batch.to(device, non_blocking=True))
            stop = done + len(batch)
            if early is not None:
                early[done:stop] = features.early.float().cpu().numpy()
            base[done:stop] = features.base.float().cpu().numpy()
            done = stop
            if progress is not None:
                progress(done, total)
        return base

    if folder is None:
        early = np.empty(shape, dtype) if tokens else None
        return FrozenFeatures(early, fill(early))
    with build_folder(folder) as temporary:
        early = None
        if tokens:
            early = np.lib.format.open_memmap(temporary / "early.npy", mode="w+", dtype=dtype, shape=shape)
            with open(temporary / "early.npy", "r+b") as file:  # writing to a full disk later would raise SIGBUS
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        np.save(temporary / "base.npy", fill(early))
        if early is not None:
            early.flush()
    return FrozenFeatures.load([folder], [total], tokens)
