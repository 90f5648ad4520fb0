"""The index of a folder of photos: a JSON file with names, and a NumPy file with the frozen CLIP's features."""

import errno
import io
import json
import os
import stat
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from amp.data.images.file import open_photo, read_limited
from amp.data.images.formats import UnreadableImageError
from amp.errors import AmpError
from amp.files import write_atomically
from amp.json_text import parse_json
from amp.search.state_file import StateFile
from amp.search.walk import Stamp, digest_of

FORMAT, VERSION = "open-clip-amp photo index", 2  # version 1 lacks `digest`, `beside` and `pending`
_MAKE = "make it with amp search --index FOLDER --photos PHOTOS"
# "This file" rather than "this folder", because the folder may also contain the photos.
MAKE_AGAIN = "remove this file, then make the index again with amp search --index FOLDER --photos PHOTOS"


class PhotoIndex:
    """Names and features of N photos, read from an index.

    Attributes:
        file: Path of the index's `index.json`.
        root: Folder of the photos.
        names: Paths of the photos relative to `root`.
        stamps: `Stamp` of each photo when it was encoded, by name.
        pending: Number of photos that an interrupted update has not encoded.
        features: The frozen CLIP's features, float32 (N, d), not normalized, memory-mapped.
        states: Packed states of the photos; None if the index has none.
        state_rows: Row in `states` of each photo, by name.
        base_hash: SHA-256 of the CLIP's weights.
        transform: Image transform of the CLIP, as text.
        version: Version of the index's format.
    """

    def __init__(self, folder: str | os.PathLike):
        """Opens the index in `folder`.

        Raises:
            AmpError: There is no index, or it is damaged.
        """
        self.file = path = Path(folder) / "index.json"
        try:
            content = self._read(path)
            self.root = Path(content["root"])
            if not self.root.is_dir() and "beside" in content:  # the index and the photos were moved together
                beside = Path(os.path.normpath(Path(folder).resolve() / content["beside"]))
                self.root = beside if beside.is_dir() else self.root
            self.version: int = content["version"]
            self.base_hash, self.transform = content["base_sha256"], content["transform"]
            self.stamps = {name: Stamp(*stamp) for name, *stamp in content["photos"]}
            self.pending = int(content.get("pending", 0))
            self.names = list(self.stamps)
            rows = content["state_rows"] if self.states is not None else []
            self.state_rows: dict[str, int] = {n: row for n, row in zip(self.names, rows, strict=False) if row >= 0}
            if self.states is not None and max(self.state_rows.values(), default=-1) >= self.states.count:
                raise ValueError(f"state_rows exceeds {self.states.count}, the number of states")
        except OSError as error:
            name = error.filename or path
            if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
                step = "make it readable, or give another folder with --index"
                raise AmpError(f"{name}: can't be read ({error.strerror}), expected an index; {step}") from error
            if path.is_file():
                raise AmpError(f"{path}: damaged ({name}: {error.strerror}); {MAKE_AGAIN}") from error
            raise AmpError(f"{path}: can't be read ({error.strerror}), expected an index; {_MAKE}") from error
        except (ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            if isinstance(error, AmpError):
                raise
            raise AmpError(f"{path}: damaged ({error}); {MAKE_AGAIN}") from error
        if len(self.features) != len(self.names):
            raise AmpError(
                f"{path}: {len(self.names)} names and {len(self.features)} features, expected equal numbers; "
                f"{MAKE_AGAIN}"
            )

    def _read(self, path: Path) -> dict[str, Any]:
        for attempt in range(5):
            content = parse_json(path.read_text(encoding="utf-8"))
            kind, version = content.get("format"), content.get("version")
            if kind != FORMAT or version not in range(1, VERSION + 1):
                newer = isinstance(version, int) and version > VERSION
                step = ("update open-clip-amp, or " if newer else "") + "give another folder with --index"
                raise AmpError(f"{path}: format {kind!r} {version!r}, expected {FORMAT!r} 1 to {VERSION}; {step}")
            try:
                self.features = np.load(path.parent / content["features"], mmap_mode="r", allow_pickle=False)
                states = content.get("states")
                self.states = None if states is None else StateFile.open(path.parent, states)
                break
            except FileNotFoundError:
                if attempt == 4:
                    raise
                time.sleep(0.1 * attempt)  # an update has just replaced the index
        return content

    def __len__(self) -> int:
        return len(self.names)

    def path(self, number: int) -> Path:
        """Path of a photo."""
        return self.root / self.names[number]

    def holds(self, path: str | os.PathLike) -> bool:
        """Whether a path is one of the photos."""
        place, root = Path(os.path.realpath(Path(path).parent), Path(path).name), os.path.realpath(self.root)
        return place.is_relative_to(root) and place.relative_to(root).as_posix() in self.stamps

    def image(self, number: int) -> Image.Image:
        """Opens a photo, upright and in RGB.

        Raises:
            UnreadableImageError: The photo is gone or can't be read.
        """
        self.check_there(number)
        try:
            return open_photo(self.path(number))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UnreadableImageError(f"can't be read ({getattr(error, 'strerror', None) or error})") from error

    def state(self, number: int, key: str) -> np.ndarray | None:
        """Packed state of a photo, uint8 (R,); None if the index has none from the model with this key."""
        row = self.state_rows.get(self.names[number])
        return None if row is None or self.states is None or self.states.key != key else self.states.rows[row]

    def check_there(self, number: int) -> None:
        """Checks without decoding that a photo still exists and is the one that was encoded.

        Raises:
            UnreadableImageError: The photo is gone, has changed, or can't be read.
        """
        path, stamp = self.path(number), self.stamps[self.names[number]]
        try:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise UnreadableImageError("no longer a regular file")
            if not os.access(path, os.R_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            # A copied file has another time, so its content decides, as in an update. Version 1 has no digest.
            same = found.st_size == stamp.size and (
                found.st_mtime_ns == stamp.mtime or stamp.digest in ("", digest_of(read_limited(path)))
            )
        except (FileNotFoundError, NotADirectoryError):
            raise UnreadableImageError("gone since it was indexed") from None
        except UnreadableImageError:
            raise
        except (
            OSError,
            ValueError,
        ) as error:  # ValueError: for example, a name with a NUL
            raise UnreadableImageError(f"can't be read ({getattr(error, 'strerror', None) or error})") from None
        if not same:
            raise UnreadableImageError("changed since it was indexed; --photos encodes it again")


def write_index(
    folder: Path,
    root: Path,
    base_hash: str,
    transform: str,
    rows: dict[str, tuple[Stamp, np.ndarray]],
    pending: int,
    states: StateFile | None = None,
    state_rows: dict[str, int] | None = None,
) -> None:
    """Writes an index, replacing the one in `folder`. Processes that have opened the old index can still use it.

    Args:
        folder: Folder of the index.
        root: Folder of the photos.
        base_hash, transform: See `PhotoIndex`.
        rows: Stamp and feature (d,) of each photo by name.
        pending: Number of photos that are not encoded yet.
        states: Packed states, already on disk; None if the index has none.
        state_rows: Row in `states` of each photo that has one, by name.
    """
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "root": str(root),
        "beside": os.path.relpath(root, folder.resolve()),
        "base_sha256": base_hash,
        "transform": transform,
        "features": f"features-{uuid.uuid4().hex[:8]}.npy",
        "photos": [[name, *stamp] for name, (stamp, _) in rows.items()],
        "pending": pending,
    }
    if states is not None:
        places = state_rows or {}
        content |= {"states": states.describe(), "state_rows": [places.get(name, -1) for name in rows]}
    buffer = io.BytesIO()
    np.save(buffer, np.stack([row for _, row in rows.values()]).astype(np.float32))
    write_atomically(folder / content["features"], buffer.getbuffer())
    write_atomically(folder / "index.json", json.dumps(content, ensure_ascii=False).encode())
    kept = (content["features"], None if states is None else states.path.name)
    for path in (*folder.glob("features-*.npy"), *folder.glob("states-*.bin")):
        if path.name not in kept:  # processes that have an old file open can still read it
            path.unlink(missing_ok=True)
