"""An index of a folder of photos: their names and the frozen CLIP's features, made anew only where photos changed."""

import io
import json
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from amp.cores import decoding_workers
from amp.data.image_file import open_photo
from amp.errors import AmpError, printable
from amp.json_text import parse_json
from amp.knowledge.schema import is_unicode
from amp.model import ActionAwareCLIP
from amp.retrieval.results import write_atomically

FORMAT, VERSION = "open-clip-amp photo index", 1
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Update:
    """What an update of an index did.

    Attributes:
        photos: In the index now.
        encoded: Of these, new or changed since the last time.
        removed: Names that are gone.
        skipped: Why each unreadable file is not in the index, by name.
    """

    photos: int
    encoded: int
    removed: int
    skipped: dict[str, str]


class PhotoIndex:
    """Names and features of N photos.

    Attributes:
        root: Folder of the photos.
        names: Their paths below `root`.
        stamps: Size and time of change of each, by name.
        skipped: Why files of the folder are not in the index, by name.
        features: The frozen CLIP's features, float32 (N, d), not normalised, memory-mapped.
        base_hash: SHA-256 of the CLIP's weights.
        transform: Its image transform, as text.
    """

    def __init__(self, folder: str | os.PathLike):
        """Opens the index in `folder`.

        Raises:
            AmpError: There is none, or it is damaged.
        """
        again = "make it with amp search --index FOLDER --photos PHOTOS"
        path = Path(folder) / "index.json"
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
            if (content.get("format"), content.get("version")) != (FORMAT, VERSION):
                raise AmpError(f"{path}: format {content.get('format')!r}, expected {FORMAT!r} {VERSION}; {again}")
            self.root = Path(content["root"])
            self.base_hash, self.transform = content["base_sha256"], content["transform"]
            self.stamps: dict[str, tuple[int, int]] = {name: tuple(stamp) for name, *stamp in content["photos"]}
            self.skipped: dict[str, str] = content["skipped"]
            self.names = list(self.stamps)
            self.features = np.load(Path(folder) / content["features"], mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise AmpError(f"{path}: can't be read ({error.strerror}), expected an index; {again}") from error
        except (ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            if isinstance(error, AmpError):
                raise
            raise AmpError(f"{path}: damaged ({error}); remove the folder and {again}") from error
        if len(self.features) != len(self.names):
            raise AmpError(f"{path}: {len(self.names)} names and {len(self.features)} features; remove the folder and "
                           f"{again}")  # fmt: skip

    def __len__(self) -> int:
        return len(self.names)

    def image(self, number: int) -> Image.Image:
        """The photo, upright and in RGB.

        Raises:
            AmpError: It can't be read any more.
        """
        try:
            return open_photo(self.root / self.names[number])
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise AmpError(f"{self.root / self.names[number]}: can't be read ({error}); update the index") from error


@torch.no_grad()
def update_index(
    folder: str | os.PathLike,
    photos: str | os.PathLike,
    model: ActionAwareCLIP,
    preprocess,
    batch_size: int = 64,
    workers: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Update:
    """Makes the index of a folder of photos, or brings one up to date: photos whose size and time of change are those
    of the index keep their features.

    Args:
        folder: Of the index; the new one takes the old one's place at the end.
        photos: Folder of photos, with sub-folders; hidden files and folders are left out.
        model: The model, on its device; its frozen CLIP alone is used.
        preprocess: The validation transform.
        batch_size: Images a forward pass.
        workers: Decoding processes.
        progress: Called as progress(done, total).

    Raises:
        AmpError: No such folder, no readable photo in it, or an index of another model.
    """
    root = Path(photos).resolve()
    if not root.is_dir():
        raise AmpError(f"{photos}: no such folder, expected one with photos ({', '.join(SUFFIXES)})")
    base_hash, transform = model.backbone.weights_hash(), repr(preprocess)
    old = PhotoIndex(folder) if (Path(folder) / "index.json").exists() else None
    if old is not None and (old.base_hash, old.transform, old.root) != (base_hash, transform, root):
        raise AmpError(f"{folder}: holds {old.root} as another model or transform sees it, expected {root} by this "
                       "one; give another folder with --index")  # fmt: skip
    skipped: dict[str, str] = {}
    stamps = {name: stamp for name, stamp in _photos(root, skipped)}
    known: dict[str, np.ndarray] = {}
    if old is not None:
        known = {n: row for n, row in zip(old.names, old.features, strict=True) if stamps.get(n) == old.stamps[n]}
    wanted = [name for name in stamps if name not in known]
    loader = DataLoader(_Photos(root, wanted, preprocess), batch_size, collate_fn=list,
                        num_workers=decoding_workers(workers, model.logit_scale.device.type == "cuda"))  # fmt: skip
    fresh: dict[str, np.ndarray] = {}
    done = 0
    for batch in loader:
        names = wanted[done : done + len(batch)]
        done += len(batch)
        skipped |= {name: item for name, item in zip(names, batch, strict=True) if isinstance(item, str)}
        good = [(name, item) for name, item in zip(names, batch, strict=True) if not isinstance(item, str)]
        if good:
            images = torch.stack([item for _, item in good]).to(model.logit_scale.device)
            base = model(images, only_frozen=True).base.float().cpu().numpy()
            fresh |= {name: row for (name, _), row in zip(good, base, strict=True)}
        if progress is not None:
            progress(done, len(wanted))
    names = [name for name in stamps if name in known or name in fresh]
    if not names:
        reason = f"; first file skipped: {next(iter(skipped.items()))}" if skipped else ""
        raise AmpError(f"{root}: no photo that can be read, expected files of {', '.join(SUFFIXES)}{reason}")
    features = np.stack([fresh[name] if name in fresh else known[name] for name in names])
    content: dict[str, Any] = {
        "format": FORMAT, "version": VERSION, "root": str(root), "base_sha256": base_hash, "transform": transform,
        "features": f"features-{uuid.uuid4().hex[:8]}.npy", "photos": [[name, *stamps[name]] for name in names],
        "skipped": skipped,
    }  # fmt: skip
    buffer = io.BytesIO()
    np.save(buffer, features.astype(np.float32))
    write_atomically(Path(folder) / content["features"], buffer.getbuffer())
    write_atomically(Path(folder) / "index.json", json.dumps(content, ensure_ascii=False).encode())
    for path in Path(folder).glob("features-*.npy"):  # one that reads the old file keeps it open
        if path.name != content["features"]:
            path.unlink(missing_ok=True)
    removed = 0 if old is None else sum(name not in stamps for name in old.names)
    return Update(len(names), len(fresh), removed, skipped)


def _photos(root: Path, skipped: dict[str, str]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names below the root in order, with size and time of change; says in `skipped` why others are left out."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                path = Path(folder) / name
                name = path.relative_to(root).as_posix()
                if not is_unicode(name):  # can't be written to JSON
                    skipped[printable(name)] = "its name is not valid UTF-8"
                    continue
                try:
                    found = path.stat()
                except OSError as error:  # gone, or a link to nowhere or to itself
                    skipped[name] = f"can't be read ({error.strerror})"
                    continue
                if not stat.S_ISREG(found.st_mode):
                    skipped[name] = "not a file, but a pipe or a device"
                    continue
                yield name, (found.st_size, found.st_mtime_ns)


class _Photos(Dataset):
    """Photos as the model wants them, or why one can't be read."""

    def __init__(self, root: Path, names: list[str], preprocess):
        self.root, self.names, self.preprocess = root, names, preprocess

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        try:
            return self.preprocess(open_photo(self.root / self.names[index]))
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
            return f"{type(error).__name__}: {error}"
