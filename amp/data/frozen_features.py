"""Output of the frozen blocks for each image of a split, computed once: early tokens and base features.

The blocks before the first prompted one see no knowledge and no prompts, and without random augmentation their output
never changes: (F + M) x d_v numbers per image, memory-mapped.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from amp.cores import decoding_workers
from amp.data.images.decode import DECODING_VERSION
from amp.data.split import ShardSplit
from amp.errors import AmpError
from amp.folders import build_folder
from amp.model.clip import ActionAwareCLIP


class FrozenFeatures:
    """Early tokens (I, F + M, d_v), or None, and base features (I, d) of the I images of a split, as arrays."""

    def __init__(self, early: np.ndarray | None, base: np.ndarray):
        self.early, self.base = early, base

    def __len__(self) -> int:
        return len(self.base)

    @property
    def tokens(self) -> np.ndarray:
        """`early`, for those who read images by them."""
        assert self.early is not None, "these features were loaded without their tokens"
        return self.early

    @classmethod
    def load(cls, folder: str | os.PathLike, tokens: bool = True) -> "FrozenFeatures":
        """Maps what `compute_frozen_features` left in a folder.

        Raises:
            AmpError: A file is missing or cut short.
        """
        try:
            early = np.load(Path(folder) / "early.npy", mmap_mode="r", allow_pickle=False) if tokens else None
            return cls(early, np.load(Path(folder) / "base.npy", mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise AmpError(f"{folder}: can't be read ({error}). Remove the folder; it is made again") from error


class SplitImages(Dataset):
    """The images of a split as a model wants them."""

    def __init__(self, split: ShardSplit, preprocess):
        self.split, self.preprocess = split, preprocess

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.preprocess(self.split.image(index))


def features_folder(root: str | os.PathLike, split: ShardSplit, model: ActionAwareCLIP, preprocess, dtype: str) -> Path:
    """Where a split's features lie: the name depends on all that they depend on."""
    parts = [model.backbone.weights_hash("vision"), str(model.tower.first), repr(preprocess), dtype]
    parts += [f"pixels {DECODING_VERSION}"]
    parts += [shard.sha256 for shard in split.shards]
    return Path(root) / f"image-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}"


@torch.no_grad()
def compute_frozen_features(
    split: ShardSplit,
    model: ActionAwareCLIP,
    preprocess,
    batch_size: int,
    workers: int,
    folder: Path | None = None,
    dtype: str = "float32",
    progress: Callable[[int, int], None] | None = None,
    tokens: bool = True,
) -> FrozenFeatures:
    """Runs the frozen blocks over a split, or opens what an earlier call has left in `folder`.

    In the weights' own precision, never under autocast: runs of any mixed precision share a folder.

    Args:
        split: The images.
        model: On its device.
        preprocess: The validation transform; it must not be random.
        batch_size: Images a forward pass.
        workers: Processes that decode.
        folder: Where to keep the arrays; None keeps them in memory.
        dtype: Of the early tokens; base features are always float32.
        progress: Called as progress(done, total).
        tokens: False keeps only the base features.
    """
    if folder is not None and folder.is_dir():
        return FrozenFeatures.load(folder, tokens)
    backbone, device = model.backbone, model.logit_scale.device
    shape = (len(split), backbone.num_tokens, backbone.vision_width)
    workers = decoding_workers(workers, device.type == "cuda")
    loader = DataLoader(
        SplitImages(split, preprocess), batch_size, num_workers=workers, pin_memory=device.type == "cuda"
    )

    def fill(early: np.ndarray | None) -> np.ndarray:
        base, done = np.empty((len(split), backbone.embed_dim), np.float32), 0
        for images in loader:
            features = model(images.to(device, non_blocking=True))
            stop = done + len(images)
            if early is not None:
                early[done:stop] = features.early.float().cpu().numpy()
            base[done:stop] = features.base.float().cpu().numpy()
            done = stop
            if progress is not None:
                progress(done, len(split))
        return base

    if folder is None:
        early = np.empty(shape, dtype) if tokens else None
        return FrozenFeatures(early, fill(early))
    with build_folder(folder) as temporary:
        early = None
        if tokens:
            early = np.lib.format.open_memmap(temporary / "early.npy", mode="w+", dtype=dtype, shape=shape)
            with open(temporary / "early.npy", "r+b") as file:  # a disk that fills up later would end it by SIGBUS
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        np.save(temporary / "base.npy", fill(early))
        if early is not None:
            early.flush()
    return FrozenFeatures.load(folder, tokens)
