"""An index of a folder of photos: their names and the frozen CLIP's features, made anew only where photos changed."""

import errno
import hashlib
import io
import json
import os
import stat
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from amp.cores import decoding_workers
from amp.data.images.decode import decode_rgb
from amp.data.images.file import open_photo, read_limited
from amp.data.images.formats import PHOTO_SUFFIXES, UnreadableImageError, unreadable_reason
from amp.errors import AmpError, printable
from amp.files import write_atomically
from amp.json_text import is_unicode, parse_json
from amp.locks import locked_folder
from amp.model.clip import ActionAwareCLIP

FORMAT, VERSION = "open-clip-amp photo index", 2  # version 1 lacks `digest`, `beside` and `pending`
SKIPPED = "skipped.txt"
_MAKE = "make it with amp search --index FOLDER --photos PHOTOS"
# Not the folder: the photos may be in it, too.
MAKE_AGAIN = "remove this file, then make the index again with amp search --index FOLDER --photos PHOTOS"
# Encoded photos are saved at least this many seconds apart, and so rarely that saving takes a twentieth of the time.
SAVE_SECONDS, SAVE_SHARE = 1.0, 20


class Stamp(NamedTuple):
    """What tells that a file is the one that was encoded.

    Attributes:
        size: Size in bytes.
        mtime: Time of its last change, ns.
        digest: SHA-256 of its content, cut to 32 hexadecimal digits; empty where unknown.
    """

    size: int
    mtime: int
    digest: str = ""


@dataclass(frozen=True)
class Update:
    """What an update of an index did.

    Attributes:
        photos: Photos in the index now.
        encoded: How many of these were encoded by this update; the others kept their features.
        removed: Photos of the old index that are gone.
        skipped: Why each of the files and folders that were left out is not in the index, by name.
        hidden: Files and folders that were left out because their name starts with a dot.
        others: Files that are no photos.
    """

    photos: int
    encoded: int
    removed: int
    skipped: dict[str, str]
    hidden: int = 0
    others: int = 0


class PhotoIndex:
    """Names and features of N photos.

    Attributes:
        file: The file that names its photos.
        root: Folder of the photos.
        names: Their paths below `root`.
        stamps: What each was like when it was encoded, by name.
        pending: Photos that an interrupted update has not encoded.
        features: The frozen CLIP's features, float32 (N, d), not normalised, memory-mapped.
        base_hash: SHA-256 of the CLIP's weights.
        transform: Its image transform, as text.
        version: Version of the file's format.
    """

    def __init__(self, folder: str | os.PathLike):
        """Opens the index in `folder`.

        Raises:
            AmpError: There is none, or it is damaged.
        """
        self.file = path = Path(folder) / "index.json"
        try:
            content = self._read(path)
            self.root = Path(content["root"])
            if not self.root.is_dir() and "beside" in content:  # a disk with both, attached at another place
                beside = Path(os.path.normpath(Path(folder).resolve() / content["beside"]))
                self.root = beside if beside.is_dir() else self.root
            self.version: int = content["version"]
            self.base_hash, self.transform = content["base_sha256"], content["transform"]
            self.stamps = {name: Stamp(*stamp) for name, *stamp in content["photos"]}
            self.pending = int(content.get("pending", 0))
            self.names = list(self.stamps)
        except OSError as error:
            name = error.filename or path
            if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
                step = "allow it, or give another folder with --index"
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
                f"{path}: {len(self.names)} names and {len(self.features)} features, expected as many; {MAKE_AGAIN}"
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
                break
            except FileNotFoundError:
                if attempt == 4:
                    raise
                time.sleep(0.1 * attempt)  # an update has just put another index in place
        return content

    def __len__(self) -> int:
        return len(self.names)

    def path(self, number: int) -> Path:
        """Where a photo lies."""
        return self.root / self.names[number]

    def holds(self, path: str | os.PathLike) -> bool:
        """Whether a path is one of the photos."""
        place, root = Path(os.path.realpath(Path(path).parent), Path(path).name), os.path.realpath(self.root)
        return place.is_relative_to(root) and place.relative_to(root).as_posix() in self.stamps

    def image(self, number: int) -> Image.Image:
        """A photo, upright and in RGB.

        Raises:
            UnreadableImageError: It is gone or can't be read.
        """
        self.check_there(number)
        try:
            return open_photo(self.path(number))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UnreadableImageError(f"can't be read ({getattr(error, 'strerror', None) or error})") from error

    def check_there(self, number: int) -> None:
        """Looks whether a photo is still there and the one that was encoded, without decoding it.

        Raises:
            UnreadableImageError: It is gone, another photo has its name, or you may not read it.
        """
        path, stamp = self.path(number), self.stamps[self.names[number]]
        try:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise UnreadableImageError("not a file any more")
            if not os.access(path, os.R_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            # A copy has another time; its content decides, as for an update. Version 1 has no digest.
            same = found.st_size == stamp.size and (
                found.st_mtime_ns == stamp.mtime or stamp.digest in ("", _digest(read_limited(path)))
            )
        except (FileNotFoundError, NotADirectoryError):
            raise UnreadableImageError("gone since it was indexed") from None
        except UnreadableImageError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a name that the system's encoding lacks, or with a NUL
            raise UnreadableImageError(f"can't be read ({getattr(error, 'strerror', None) or error})") from None
        if not same:
            raise UnreadableImageError("changed since it was indexed; --photos encodes it again")


def update_index(
    folder: str | os.PathLike,
    photos: str | os.PathLike,
    model: ActionAwareCLIP,
    preprocess,
    batch_size: int = 64,
    workers: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Update:
    """Makes the index of a folder of photos, or brings one up to date.

    A photo whose name, size and time of change are those in the index keeps its features. Any other is read; if the
    index has features of the same content, under any name, they are kept, too. So photos that were moved, copied
    or renamed are not encoded again. What was encoded is saved every few seconds: after an interruption, the same call
    encodes the rest. Searches go on meanwhile.

    Args:
        folder: Folder of the index; `skipped.txt` in it lists the skipped files.
        photos: Folder of photos, with sub-folders and links to folders.
        model: The model, on its device; only its frozen CLIP is used.
        preprocess: The validation transform.
        batch_size: Images per forward pass.
        workers: Decoding processes.
        progress: Called as progress(done, total).

    Raises:
        AmpError: No such folder, no readable photo in it, an index of another model or of other photos, or one that
            another process is updating.
    """
    root, folder = Path(photos).resolve(), Path(folder)
    if not root.is_dir():
        raise AmpError(f"{photos}: no such folder, expected one with photos ({', '.join(PHOTO_SUFFIXES)})")
    walk = _Walk(root)
    if not walk.stamps and not walk.closed:
        raise _no_photo(root, walk.skipped)
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            busy = "another process is updating this index; wait for its end, or give another folder with --index"
            stack.enter_context(locked_folder(folder, busy))
        except OSError as error:
            raise AmpError(
                f"{folder}: can't be written ({error.strerror}), expected a folder that you may write to; search "
                "without --photos, or give another folder with --index"
            ) from error
        for path in folder.glob(".*.tmp"):  # of an update that was killed
            path.unlink(missing_ok=True)
        workers = decoding_workers(workers, model.logit_scale.device.type == "cuda")
        return _update(folder, walk, model, preprocess, batch_size, workers, progress)


@torch.no_grad()
def _update(
    folder: Path,
    walk: "_Walk",
    model: ActionAwareCLIP,
    preprocess,
    batch_size: int,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> Update:
    base_hash, transform = model.backbone.weights_hash(), repr(preprocess)
    old = PhotoIndex(folder) if (folder / "index.json").exists() else None
    rows: dict[str, tuple[Stamp, np.ndarray]] = {}
    if old is not None:
        if (old.base_hash, old.transform) != (base_hash, transform):
            raise AmpError(
                f"{folder}: holds {old.root} as another model or transform sees it, expected this one; give another "
                "folder with --index"
            )
        if old.root != walk.root:
            _check_moved(folder, old, walk)
        rows = {
            name: (stamp, row)
            for (name, stamp), row in zip(old.stamps.items(), old.features, strict=True)
            # Version 1 saw some PNG and TIFF files (16 bits, alpha) otherwise than they are seen now.
            if old.version > 1 or name.lower().endswith((".jpg", ".jpeg"))
        }
        walk.keep_closed(rows)
    known = {stamp.digest: row for stamp, row in rows.values() if stamp.digest}
    wanted = [name for name, stamp in walk.stamps.items() if name not in rows or rows[name][0][:2] != stamp[:2]]
    skipped = dict(walk.skipped)

    def save(pending: int) -> None:
        names = [name for name in walk.stamps if name in rows]
        if not names:
            return
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "root": str(walk.root),
            "beside": os.path.relpath(walk.root, folder.resolve()),
            "base_sha256": base_hash,
            "transform": transform,
            "features": f"features-{uuid.uuid4().hex[:8]}.npy",
            "photos": [[name, *rows[name][0]] for name in names],
            "pending": pending,
        }
        buffer = io.BytesIO()
        np.save(buffer, np.stack([rows[name][1] for name in names]).astype(np.float32))
        write_atomically(folder / content["features"], buffer.getbuffer())
        write_atomically(folder / "index.json", json.dumps(content, ensure_ascii=False).encode())
        for path in folder.glob("features-*.npy"):  # one that reads the old file keeps it open
            if path.name != content["features"]:
                path.unlink(missing_ok=True)

    reader = _Photos(walk.root, wanted, preprocess, frozenset(known))
    loader = DataLoader(reader, batch_size, num_workers=workers, collate_fn=list)
    done = encoded = 0
    saved, pause = time.monotonic(), SAVE_SECONDS
    try:
        for batch in loader:
            named = dict(zip(wanted[done : done + len(batch)], batch, strict=True))
            new = {photo.digest: photo.pixels for photo in batch if photo.pixels is not None}
            if new:
                images = torch.stack(list(new.values())).to(model.logit_scale.device)
                base = model(images).base.float().cpu().numpy()
                known |= zip(new, base, strict=True)
            for name, photo in named.items():
                if photo.reason:
                    skipped[name] = photo.reason
                    rows.pop(name, None)
                else:
                    rows[name] = (walk.stamps[name]._replace(digest=photo.digest), known[photo.digest])
                    encoded += photo.pixels is not None
            done += len(batch)
            if progress is not None:
                progress(done, len(wanted))
            if (begin := time.monotonic()) > saved + pause:
                save(len(wanted) - done)
                saved = time.monotonic()
                pause = max(SAVE_SECONDS, SAVE_SHARE * (saved - begin))
    except BaseException:  # Ctrl-C, say
        if done:
            save(len(wanted) - done)
        raise
    if not any(name in rows for name in walk.stamps):
        raise _no_photo(walk.root, skipped)
    save(0)
    lines = "".join(f"{printable(name)}\t{printable(reason)}\n" for name, reason in skipped.items())
    write_atomically(folder / SKIPPED, lines.encode())
    names = rows.keys() & walk.stamps.keys()
    before = {} if old is None else old.stamps
    added = {rows[name][0].digest for name in names - before.keys()}  # a photo that was renamed is not gone
    removed = sum(name not in walk.stamps and stamp.digest not in added for name, stamp in before.items())
    return Update(len(names), encoded, removed, skipped, walk.hidden, walk.others)


def _check_moved(folder: Path, old: PhotoIndex, walk: "_Walk") -> None:
    """Refuses another folder than the index's, unless it holds most of the index's photos, as one that was moved."""
    there = {(os.path.basename(name), stamp.size) for name, stamp in walk.stamps.items()}
    found = sum((os.path.basename(name), stamp.size) in there for name, stamp in old.stamps.items())
    if 2 * found < len(old):
        raise AmpError(
            f"{folder}: holds {len(old):,} photos of {old.root}, of which {found:,} are in {walk.root}, expected most "
            "of them, as in a folder that was moved; give another folder with --index"
        )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _no_photo(root: Path, skipped: dict[str, str]) -> AmpError:
    reason = f"; first file skipped: {': '.join(next(iter(skipped.items())))}" if skipped else ""
    return AmpError(f"{root}: no photo that can be read, expected files of {', '.join(PHOTO_SUFFIXES)}{reason}")


class _Walk:
    """The photos below a folder, and what is left out.

    Links to folders are followed after all other folders, each folder once, so that they can't loop.

    Attributes:
        root: The folder.
        stamps: Size and time of change of each photo, by its path below `root`, in order.
        skipped: Why other files and folders are left out, by their paths below `root`.
        closed: Files and folders of these that can't be opened: whether the photos in the index are gone is not known.
        hidden, others: Numbers of files and folders whose name starts with a dot, and of files that are no photos.

    Raises:
        AmpError: `root` can't be opened.
    """

    def __init__(self, root: Path):
        self.root = root
        self.stamps: dict[str, Stamp] = {}
        self.skipped: dict[str, str] = {}
        self.closed: list[str] = []
        self.hidden = self.others = 0
        self._links: list[Path] = []
        self._seen: set[tuple[int, int]] = set()
        self._add_below(root)
        for link in self._links:  # which grows
            if root.is_relative_to(os.path.realpath(link)):
                self.skipped[self._name(link)] = "a link to a folder that holds this one"
            else:
                self._add_below(link)

    def keep_closed(self, rows: dict[str, tuple[Stamp, np.ndarray]]) -> None:
        """Adds the photos of an older index that can't be looked at, or whose folders can't be opened."""
        closed, folders = set(self.closed), tuple(f"{name}/" for name in self.closed)
        for name, (stamp, _) in rows.items():
            if name in closed or name.startswith(folders):
                self.stamps.setdefault(name, stamp)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _skip(self, path: Path, reason: str, closed: bool = False) -> None:
        name = self._name(path)
        self.skipped[printable(name)] = reason
        if closed:
            self.closed.append(name)

    def _cannot_open(self, error: OSError) -> None:
        path = Path(error.filename)
        if path == self.root:
            raise AmpError(f"{path}: can't be opened ({error.strerror}), expected a folder of photos") from error
        if not isinstance(error, FileNotFoundError):  # removed meanwhile
            self._skip(path, f"a folder that can't be opened ({error.strerror})", closed=True)

    def _add_below(self, top: Path) -> None:
        for here, folders, files in os.walk(top, onerror=self._cannot_open):
            folder = Path(here)
            try:
                found = folder.stat()
            except OSError as error:
                self._cannot_open(error)
                folders.clear()
                continue
            if (found.st_dev, found.st_ino) in self._seen:
                self._skip(folder, "a folder that is read already under another name")
                folders.clear()
                continue
            self._seen.add((found.st_dev, found.st_ino))
            self.hidden += sum(name.startswith(".") for name in (*folders, *files))
            visible = sorted(name for name in folders if not name.startswith("."))
            self._links += [folder / name for name in visible if os.path.islink(folder / name)]
            folders[:] = visible
            for name in sorted(name for name in files if not name.startswith(".")):
                self._add_file(folder / name)

    def _add_file(self, path: Path) -> None:
        suffix = path.suffix.lower()
        if suffix not in PHOTO_SUFFIXES:
            if reason := unreadable_reason(suffix):
                self._skip(path, reason)
            elif path.is_symlink() and not path.exists():
                self._skip(path, "a link whose target is not there", closed=True)  # a disk that is not attached, say
            else:
                self.others += 1
            return
        if not is_unicode(self._name(path)):  # can't be written to JSON
            self._skip(path, "its name is not valid UTF-8")
            return
        try:
            found = path.stat()
        except OSError as error:  # gone, a link to nowhere or to itself, or a folder or disk that refuses for now
            self._skip(path, f"can't be read ({error.strerror})", closed=not isinstance(error, FileNotFoundError))
        else:
            if stat.S_ISREG(found.st_mode):
                self.stamps[self._name(path)] = Stamp(found.st_size, found.st_mtime_ns)
            else:
                self._skip(path, "not a file, but a pipe or a device")


class _Photo(NamedTuple):
    """A photo that was read.

    Attributes:
        digest: As of `Stamp`.
        pixels: As the model wants them; None where the features of this content are known.
        reason: Why it can't be read; empty where it can.
    """

    digest: str = ""
    pixels: torch.Tensor | None = None
    reason: str = ""


class _Photos(Dataset):
    """Reads photos, and decodes those of unknown content."""

    def __init__(self, root: Path, names: list[str], preprocess, known: frozenset[str]):
        self.root, self.names, self.preprocess, self.known = root, names, preprocess, known

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> _Photo:
        try:
            content = read_limited(self.root / self.names[index])
            digest = _digest(content)
            if digest in self.known:
                return _Photo(digest)
            return _Photo(digest, self.preprocess(Image.fromarray(decode_rgb(content))))
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
            return _Photo(reason=f"can't be read ({getattr(error, 'strerror', None) or error or type(error).__name__})")
