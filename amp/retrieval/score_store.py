"""Stores scores of pairs on disk during an evaluation, so that an interrupted evaluation can resume."""

import hashlib
import io
import os
import time
import uuid
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from amp.distributed import all_reduce_sum, rank
from amp.files import write_atomically

SAVE_SECONDS = 20.0


class ScoreStore:
    """Scores of the pairs of one direction from this run and earlier runs.

    Each process writes its own files, atomically. The next run reads all files, with any number of processes.
    Unreadable files are ignored.

    Args:
        folder: Folder of the files. Its name must depend on everything that the scores depend on (`content_key`).
        pairs: Number of pairs, Q * k.
        device: Device for the exchange between processes.

    Attributes:
        done: Which pairs earlier runs have scored, bool (Q * k,), the same on all ranks.
        scores: Scores from earlier runs, float32 (Q * k,); 0 except on the main process.
        seconds: Time that these scores took, summed over the processes; 0 except on the main process.
    """

    def __init__(self, folder: str | os.PathLike, pairs: int, device: torch.device | str = "cpu"):
        self.folder = Path(folder)
        self.done = torch.zeros(pairs, dtype=torch.bool)
        self.scores = torch.zeros(pairs)
        self.seconds = 0.0
        if rank() == 0:  # only one process reads, because others may see fewer files on a shared file system
            for path in sorted(self.folder.glob("scores-*.npz")):
                self._read(path)
        self.done = all_reduce_sum(self.done.to(device, torch.int32)).bool().cpu()
        self._pairs: list[Tensor] = []
        self._values: list[Tensor] = []
        self._saved = time.monotonic()

    def _read(self, path: Path) -> None:
        try:
            with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
                pairs, values = torch.from_numpy(file["pairs"]), torch.from_numpy(file["scores"])
                seconds = float(file["seconds"])
        except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile):
            return
        if (
            pairs.shape == values.shape
            and ((pairs >= 0) & (pairs < len(self.done))).all()
            and torch.isfinite(values).all()
        ):
            self.done[pairs], self.scores[pairs] = True, values
            self.seconds += seconds

    def add(self, pairs: Tensor, scores: Tensor) -> None:
        """Adds scores (P,) of pairs (P,). Writes the new scores to disk every `SAVE_SECONDS`."""
        self._pairs.append(pairs.cpu())
        self._values.append(scores.cpu())
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes the scores that are not on disk yet."""
        if self._pairs:
            content = io.BytesIO()
            np.savez(
                content,
                pairs=torch.cat(self._pairs).numpy(),
                scores=torch.cat(self._values).float().numpy(),
                seconds=time.monotonic() - self._saved,
            )
            write_atomically(self.folder / f"scores-{uuid.uuid4().hex}.npz", content.getvalue())
        self._pairs, self._values, self._saved = [], [], time.monotonic()


def content_key(parts: Iterable[Tensor | np.ndarray | str]) -> str:
    """Hash of tensors and strings: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().cpu().contiguous()
            part = part.view(torch.uint8).numpy() if part.ndim else part[None].view(torch.uint8).numpy()
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
        else:
            digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()[:16]
