"""Data classes that captions files are read into, and the registry of captions formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from amp.data.captions.splits import SplitNames
from amp.errors import AmpError, shorten
from amp.json_text import check_text
from amp.plugins import load_plugins

SKIP_KINDS = (
    "unreadable_image",
    "missing_image",
    "image_without_caption",
    "duplicate_key",
    "caption_without_image",
    "empty_caption",
)
DATASET_PREFIX = "datasets:"
"""Start of the name of a dataset in place of a captions file; see `amp.data.captions.hub_dataset`."""

CAPTION_KINDS = ("empty_caption", "caption_without_image")
"""Kinds in `SKIP_KINDS` that concern a single caption; the others concern an image."""


@dataclass(slots=True)
class Caption:
    """A caption.

    Attributes:
        id: `sentid` in a Karpathy file; `id` in COCO's annotations; the 0-based number of the caption in other files.
        text: Text of any length, without surrounding white space.
        knowledge: Validated knowledge as JSON text `{"triplets": ..., "states": ...}`, which takes a third of the
            memory of the objects. None if the caption has no knowledge record.
    """

    id: int | str
    text: str
    knowledge: str | None = None


@dataclass(slots=True)
class CaptionedImage:
    """An image with all its captions.

    Attributes:
        path: Path of the file relative to the images folder, with `/` as separator and without `..`. A reader keeps an
            absolute path, and the conversion, which knows the folder, makes it relative.
        name: File name as spelled in the captions file (COCO: without the `filepath` folder; of a photo that is in
            the captions file: its original name, if it has one).
        id: `cocoid` or `imgid` in a Karpathy file; `id` in COCO's annotations; `image_id` in a list; otherwise `path`.
        split: Name of the image's split, such as `"train"`.
        captions: Captions in the order of the file; may be empty.
    """

    path: str
    name: str
    id: int | str
    split: str
    captions: list[Caption] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Skip:
    """An image or caption that is left out of the shards.

    Attributes:
        kind: One of `SKIP_KINDS`.
        file: Path of the image; "" for a caption without an image.
        reason: Reason in one line, written for the user.
        split: Name of the split.
        captions: Number of captions that are lost.
    """

    kind: str
    file: str
    reason: str
    split: str
    captions: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {"file": self.file, "split": self.split, "captions": self.captions, "reason": self.reason}


@dataclass(slots=True)
class CaptionSource:
    """Content of a captions file.

    Attributes:
        images: One entry per image file, in the order of the captions file.
        skipped: Images and captions left out.
        notes: Lines for the user about how the file was interpreted, where that isn't obvious.
        photos: Function that yields name and content of the image files that the captions file itself contains, some
            of them several times; None if it contains none.
        folder: Folder of the image files if their paths are absolute and the reader knows it.
        sha256: Hash of the content if the captions are not in one file.
    """

    images: list[CaptionedImage]
    skipped: list[Skip]
    notes: list[str] = field(default_factory=list)
    photos: Callable[[], Iterator[tuple[str, bytes]]] | None = None
    folder: Path | None = None
    sha256: str | None = None


Reader = Callable[[Path, SplitNames], CaptionSource]
"""Function that reads a captions file. It passes split names through `SplitNames` and image paths through `image_path`,
and raises AmpError with file and line if the file violates its format."""

_READERS: dict[str, Reader] = {}
_SUFFIXES: dict[str, str] = {}


def register_captions_format(name: str, suffixes: Sequence[str], reader: Reader) -> None:
    """Registers a captions format.

    Args:
        name: Value of `--format` that selects the format.
        suffixes: Suffixes of files that are in this format by default, in lower case with the dot. They override
            earlier registrations of the same suffix.
        reader: Function that reads a file.

    Raises:
        AmpError: The name is already registered.
    """
    if name == "auto" or _READERS.get(name, reader) is not reader:
        raise AmpError(f"captions format {name!r} is already registered; expected a new name; rename the format")
    _READERS[name] = reader
    _SUFFIXES.update(dict.fromkeys(suffixes, name))


def find_reader(format: str, suffix: str) -> Reader | None:
    """The reader of a format, or with `auto` the reader for the suffix; None if no format has the suffix.

    Raises:
        AmpError: There is no such format.
    """
    load_plugins()
    if format not in ("auto", *_READERS):
        raise AmpError(
            f"format is {format!r}; expected one of {', '.join(('auto', *_READERS))}; to use a format of another "
            "package, name its module in AMP_PLUGINS"
        )
    name = _SUFFIXES.get(suffix.lower()) if format == "auto" else format
    return _READERS[name] if name is not None else None


def known_formats() -> tuple[list[str], list[str]]:
    """Names of all formats, and all suffixes."""
    return list(_READERS), list(_SUFFIXES)


def image_path(file: str, where: str) -> str:
    """Normalizes an image's path, which is relative to the images folder or absolute.

    Raises:
        AmpError: A relative path leads out of that folder, or an absolute one contains `..`.
    """
    path = PurePosixPath(file)
    # On other systems a backslash is a separator, so it could hide a "..".
    if ".." in path.parts or "\\" in file or "\0" in file or not path.name:
        raise AmpError(
            f"{where}: image file {shorten(file)} is not allowed; expected a path inside the images folder, without "
            "'..' or backslashes; correct it"
        )
    return str(path)


def is_empty(value: Any) -> bool:
    """Whether a cell is empty: an empty text, null, or NaN, which pandas writes for null."""
    return value is None or value == "" or value != value


def cell(value: Any, where: str) -> str:
    """A cell's text without surrounding white space; "" for an empty cell.

    Raises:
        AmpError: The value is not a string.
    """
    if is_empty(value):
        return ""
    return check_text(value, where, "correct it").strip()
