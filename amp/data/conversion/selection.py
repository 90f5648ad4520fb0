"""Selects the images that go into the shards: by split, by the list of excluded images, and by existing files."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from amp.data.captions.base import CaptionedImage, Skip
from amp.data.captions.splits import normal_split
from amp.data.captions.text_file import text_lines
from amp.data.images.formats import PHOTO_SUFFIXES, unreadable_reason
from amp.data.images.names import composed, find_file
from amp.errors import AmpError


@dataclass(frozen=True, slots=True)
class Sample:
    """An image whose file exists.

    Attributes:
        key: Key of the image in the shards.
        image: The image with its captions.
        state: Size of the file in bytes, and its modification time in ns.
    """

    key: str
    image: CaptionedImage
    state: tuple[int, int]


def choose_splits(images: list[CaptionedImage], splits: list[str] | None) -> list[str]:
    """The splits to write, in the order of the captions file.

    Raises:
        AmpError: A chosen split has no image.
    """
    present = list(dict.fromkeys(image.split for image in images))
    chosen = {normal_split(split, "--splits", present): split for split in splits or present}
    for name, split in chosen.items():
        if name not in present:
            raise AmpError(
                f"--splits names {split!r}, but no image is in it; expected splits out of {', '.join(present)}; "
                "correct --splits"
            )
    return [split for split in present if split in chosen]


def split_notes(captions: str, images: list[CaptionedImage]) -> list[str]:
    """A note for the user if no split is called train, the default of training."""
    present = dict.fromkeys(image.split for image in images)
    if "train" in present:
        return []
    return [
        f"{captions}: no split 'train' in it; splits seen: {', '.join(present)}; these are enough for an evaluation; "
        "to train on one of them, use --data.train_split NAME"
    ]


def load_image_list(path: str | Path) -> list[str]:
    """Reads a list of image file names, one per line. Blank lines are ignored.

    Raises:
        AmpError: The file is unreadable or empty.
    """
    names = [line.strip() for _, line in text_lines(Path(path)) if line.strip()]
    if not names:
        raise AmpError(f"{path}: no file name in it; expected one image file name per line; check the file")
    return names


def exclude(
    keyed: list[tuple[str, CaptionedImage]], names: set[str], split: str, list_file: str
) -> list[tuple[str, CaptionedImage]]:
    """Drops the named images from one split.

    Raises:
        AmpError: None of the named images is in the split.
    """
    names = set(map(composed, names))
    kept = [
        (key, image)
        for key, image in keyed
        if image.split != split or names.isdisjoint((composed(image.path), composed(image.name)))
    ]
    if len(kept) == len(keyed):
        raise AmpError(
            f"{list_file}: none of its {len(names)} names is an image of split {split!r}; expected file names as in "
            "the captions file; check the list and --exclude_split"
        )
    return kept


def find_samples(
    root: Path, members: list[tuple[str, CaptionedImage]], limit: int | None
) -> tuple[list[Sample], list[Skip]]:
    """The first `limit` images whose file exists, and the images skipped on the way."""
    found: list[Sample] = []
    skipped: list[Skip] = []
    for key, image in members:
        if len(found) == limit:
            break
        suffix = PurePosixPath(image.path).suffix
        kind, reason = "missing_image", ""
        if suffix.lower() not in PHOTO_SUFFIXES:
            kind = "unreadable_image"
            reason = unreadable_reason(suffix) or f"suffix {suffix!r} isn't one of {', '.join(PHOTO_SUFFIXES)}"
        else:
            try:
                state = os.stat(find_file(root, image.path))
            except OSError as error:
                reason = f"{error.strerror} in the images folder"
            else:
                if not stat.S_ISREG(state.st_mode):
                    reason = "not a file"
        if reason:
            skipped.append(Skip(kind, image.path, reason, image.split, captions=len(image.captions)))
        else:
            found.append(Sample(key, image, (state.st_size, state.st_mtime_ns)))
    return found, skipped
