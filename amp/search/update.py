"""Makes or updates the index of a folder of photos. Only photos that changed are encoded."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from amp.cores import decoding_workers
from amp.data.images.decode import decode_rgb
from amp.data.images.file import read_limited
from amp.data.images.formats import PHOTO_SUFFIXES
from amp.errors import AmpError, printable
from amp.files import write_atomically
from amp.locks import locked_folder
from amp.search.image_states import StateType
from amp.search.index import PhotoIndex, write_index
from amp.search.reranker import Reranker
from amp.search.state_file import StateFile
from amp.search.walk import Stamp, Walk, digest_of

SKIPPED = "skipped.txt"
# Minimum seconds between two saves, which are also so rare that saving takes at most a twentieth of the time.
SAVE_SECONDS, SAVE_SHARE = 1.0, 20


@dataclass(frozen=True)
class Update:
    """Outcome of an update of an index.

    Attributes:
        photos: Number of photos in the index now.
        encoded: How many of them this update encoded; the others kept their features.
        removed: Number of photos of the old index that are gone.
        skipped: Reason for each file and folder that was skipped, by name.
        hidden: Number of files and folders that were left out because their name starts with a dot.
        others: Number of files that are not photos.
    """

    photos: int
    encoded: int
    removed: int
    skipped: dict[str, str]
    hidden: int = 0
    others: int = 0


def update_index(
    folder: str | os.PathLike,
    photos: str | os.PathLike,
    reranker: Reranker,
    states: StateType | None = None,
    workers: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Update:
    """Makes or updates the index of a folder of photos.

    A photo with the same name, size and modification time as in the index keeps its features. Any other photo is read;
    if the index has features of the same content under another name, they are reused. So photos that were moved,
    copied or renamed are not encoded again. Encoded photos are saved every few seconds. After an interruption, the same
    call encodes the rest. Other processes can search the index during an update.

    Args:
        folder: Folder of the index; `skipped.txt` in it lists the skipped files.
        photos: Folder of photos, with sub-folders and links to folders.
        reranker: Encodes the photos.
        states: How the photos' states for re-ranking are stored; None stores only the frozen CLIP's features. States of
            another adapter or type are replaced.
        workers: Number of decoding processes.
        progress: Called as progress(done, total).

    Raises:
        AmpError: The folder is missing or has no readable photo, the index is of another model or of other photos, or
            another process is updating it.
    """
    root, folder = Path(photos).resolve(), Path(folder)
    if not root.is_dir():
        raise AmpError(f"{photos}: no such folder, expected one with photos ({', '.join(PHOTO_SUFFIXES)})")
    walk = Walk(root)
    if not walk.stamps and not walk.closed:
        raise _no_photo(root, walk.skipped)
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            busy = "another process is updating this index; wait until it has finished, or give another --index"
            stack.enter_context(locked_folder(folder, busy))
        except OSError as error:
            raise AmpError(
                f"{folder}: can't be written ({error.strerror}), expected a writable folder; search without --photos, "
                "or give another folder with --index"
            ) from error
        for path in folder.glob(".*.tmp"):  # left by an update that was killed
            path.unlink(missing_ok=True)
        workers = decoding_workers(workers, reranker.device.type == "cuda")
        return _update(folder, walk, reranker, states, workers, progress)


@torch.no_grad()
def _update(
    folder: Path,
    walk: Walk,
    reranker: Reranker,
    kind: StateType | None,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> Update:
    base_hash, transform = reranker.model.backbone.weights_hash(), repr(reranker.preprocess)
    old = PhotoIndex(folder) if (folder / "index.json").exists() else None
    rows: dict[str, tuple[Stamp, np.ndarray]] = {}
    if old is not None:
        if (old.base_hash, old.transform) != (base_hash, transform):
            raise AmpError(
                f"{folder}: the index of {old.root} was made with another model or transform, expected this model; "
                "give another folder with --index"
            )
        if old.root != walk.root:
            _check_moved(folder, old, walk)
        rows = {
            name: (stamp, row)
            for (name, stamp), row in zip(old.stamps.items(), old.features, strict=True)
            # Features of other formats in version 1 may be outdated: some PNG and TIFF files were decoded differently.
            if old.version > 1 or name.lower().endswith((".jpg", ".jpeg"))
        }
        walk.keep_closed({name: stamp for name, (stamp, _) in rows.items()})
    known = {stamp.digest: row for stamp, row in rows.values() if stamp.digest}
    states, state_of = _states(folder, old, reranker, kind)
    if states is not None:  # photos without a state are encoded again
        known = {digest: row for digest, row in known.items() if digest in state_of}
    wanted = [
        name
        for name, stamp in walk.stamps.items()
        if name not in rows
        or rows[name][0][:2] != stamp[:2]
        or (states is not None and rows[name][0].digest not in known)
    ]
    skipped = dict(walk.skipped)
    unsaved: list[np.ndarray] = []

    def save(pending: int) -> None:
        nonlocal states, state_of
        kept = {name: rows[name] for name in walk.stamps if name in rows}
        if not kept:
            return
        if states is not None:
            if unsaved:
                states.append(np.concatenate(unsaved))
                unsaved.clear()
            used = {stamp.digest: state_of[stamp.digest] for stamp, _ in kept.values() if stamp.digest in state_of}
            if pending == 0 and 2 * len(used) < states.count:  # mostly rows of photos that are gone
                states, state_of = states.compacted(used.values()), {digest: row for row, digest in enumerate(used)}
        places = {name: state_of[stamp.digest] for name, (stamp, _) in kept.items() if stamp.digest in state_of}
        write_index(folder, walk.root, base_hash, transform, kept, pending, states, places)

    reader = _Photos(walk.root, wanted, reranker.preprocess, frozenset(known))
    loader = DataLoader(reader, reranker.batch_size, num_workers=workers, collate_fn=list)
    done = encoded = 0
    saved, pause = time.monotonic(), SAVE_SECONDS
    try:
        for batch in loader:
            named = dict(zip(wanted[done : done + len(batch)], batch, strict=True))
            new = {photo.digest: photo.pixels for photo in batch if photo.pixels is not None}
            if new:
                pixels = torch.stack(list(new.values()))
                if states is None:
                    base = reranker.model(pixels.to(reranker.device)).base
                else:
                    images = reranker.encode_pixels(pixels)
                    base = images.base
                    state_of |= zip(new, range(states.count + sum(map(len, unsaved)), 1 << 62), strict=False)
                    unsaved.append(reranker.packer.pack(images, states.kind))
                known |= zip(new, base.float().cpu().numpy(), strict=True)
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
    except BaseException:  # also KeyboardInterrupt
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
    added = {rows[name][0].digest for name in names - before.keys()}  # renamed photos don't count as removed
    removed = sum(name not in walk.stamps and stamp.digest not in added for name, stamp in before.items())
    return Update(len(names), encoded, removed, skipped, walk.hidden, walk.others)


def _states(
    folder: Path, old: PhotoIndex | None, reranker: Reranker, kind: StateType | None
) -> tuple[StateFile | None, dict[str, int]]:
    """The file of states to append to, and the row of each photo in it by digest; None and {} to store none."""
    if kind is None:
        return None, {}
    packer = reranker.packer
    if old is not None and old.states is not None and (old.states.key, old.states.kind) == (packer.key, kind):
        rows = {old.stamps[name].digest: row for name, row in old.state_rows.items()}
        return old.states, {digest: row for digest, row in rows.items() if digest}
    return StateFile.create(folder, packer.key, kind, packer.row_bytes[kind]), {}


def _check_moved(folder: Path, old: PhotoIndex, walk: Walk) -> None:
    """Raises AmpError unless `walk` contains most of the index's photos, as a moved folder does."""
    present = {(os.path.basename(name), stamp.size) for name, stamp in walk.stamps.items()}
    found = sum((os.path.basename(name), stamp.size) in present for name, stamp in old.stamps.items())
    if 2 * found < len(old):
        raise AmpError(
            f"{folder}: only {found:,} of the {len(old):,} indexed photos of {old.root} are in {walk.root}, expected "
            "most of them, as in a moved folder; give another folder with --index"
        )


def _no_photo(root: Path, skipped: dict[str, str]) -> AmpError:
    reason = f"; first file skipped: {': '.join(next(iter(skipped.items())))}" if skipped else ""
    return AmpError(f"{root}: no photo that can be read, expected files of {', '.join(PHOTO_SUFFIXES)}{reason}")


class _Photo(NamedTuple):
    """A photo that was read.

    Attributes:
        digest: As in `Stamp`.
        pixels: Preprocessed photo (3, H, W); None if the features of this content are known.
        reason: Why the photo can't be read; empty if it can.
    """

    digest: str = ""
    pixels: torch.Tensor | None = None
    reason: str = ""


class _Photos(Dataset):
    """Reads photos, and decodes those whose features are not known."""

    def __init__(self, root: Path, names: list[str], preprocess, known: frozenset[str]):
        self.root, self.names, self.preprocess, self.known = root, names, preprocess, known

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> _Photo:
        try:
            content = read_limited(self.root / self.names[index])
            digest = digest_of(content)
            if digest in self.known:
                return _Photo(digest)
            return _Photo(digest, self.preprocess(Image.fromarray(decode_rgb(content))))
        except Exception as error:  # Pillow's decoders raise almost any exception on damaged data
            return _Photo(reason=f"can't be read ({getattr(error, 'strerror', None) or error or type(error).__name__})")
