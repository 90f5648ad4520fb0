"""A file of packed image states, to which an update of the index appends."""

import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from amp.search.image_states import StateType


class StateFile:
    """Packed states of photos, one row each.

    Rows are never changed. An update appends rows, and then writes the index, which says how many rows there are: rows
    after these, left by an update that was killed, are overwritten. So a file of many gigabytes is not rewritten when a
    photo is added.

    Attributes:
        path: Path of the file.
        key: Key of the model that the states belong to (`StatePacker.key`).
        kind: How the states are packed.
        rows: The rows, uint8 (N, R), memory-mapped.
    """

    def __init__(self, path: Path, key: str, kind: StateType, row_bytes: int, count: int = 0):
        self.path, self.key, self.kind, self.row_bytes, self.count = path, key, kind, row_bytes, count
        self.rows = self._map()

    @classmethod
    def create(cls, folder: Path, key: str, kind: StateType, row_bytes: int) -> "StateFile":
        """Returns a new file without rows."""
        path = folder / f"states-{uuid.uuid4().hex[:8]}.bin"
        path.touch()
        return cls(path, key, kind, row_bytes)

    @classmethod
    def open(cls, folder: Path, description: dict[str, Any]) -> "StateFile":
        """Opens the file that `describe` described.

        Raises:
            FileNotFoundError: The file is gone.
            ValueError, KeyError, TypeError: The description or the file is damaged.
        """
        kind, row_bytes, count = description["kind"], int(description["row_bytes"]), int(description["rows"])
        return cls(folder / Path(description["file"]).name, str(description["key"]), kind, row_bytes, count)

    def describe(self) -> dict[str, Any]:
        """What an index records of the file."""
        return {
            "file": self.path.name,
            "key": self.key,
            "kind": self.kind,
            "row_bytes": self.row_bytes,
            "rows": self.count,
        }

    def append(self, rows: np.ndarray) -> None:
        """Appends rows, uint8 (B, R), and forces them to the disk."""
        with open(self.path, "r+b") as file:
            file.seek(self.count * self.row_bytes)
            file.write(np.ascontiguousarray(rows).data)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        self.count += len(rows)

    def compacted(self, kept: Iterable[int]) -> "StateFile":
        """Returns a new file with some of the rows, in this order."""
        new, kept = StateFile.create(self.path.parent, self.key, self.kind, self.row_bytes), list(kept)
        rows = self._map()
        for low in range(0, len(kept), 1024):
            new.append(rows[kept[low : low + 1024]])
        return new

    def _map(self) -> np.ndarray:
        if self.count == 0:
            return np.empty((0, self.row_bytes), dtype=np.uint8)
        return np.memmap(self.path, dtype=np.uint8, mode="r", shape=(self.count, self.row_bytes))
