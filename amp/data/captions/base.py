"""What every captions format is read to, and the registry of formats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
CAPTION_KINDS = ("empty_caption", "caption_without_image")
"""Kinds of `SKIP_KINDS` that are about a caption; the others are about an image."""


@dataclass(slots=True)
class Caption:
    """A caption.

    Attributes:
        id: `sentid` of a Karpathy file; else the number of the data row, 0-based.
        text: Text of any length, without surrounding white space.
        knowledge: Its checked record as JSON text `{"triplets": ..., "states": ...}`, which takes a third of the
            memory of the objects. None without a record.
    """

    id: int | str
    text: str
    knowledge: str | None = None


@dataclass(slots=True)
class CaptionedImage:
    """An image with all its captions.

    Attributes:
        path: Path of the file relative to the images folder, with `/` as separator and without parent parts.
        name: The file's name as the captions file spells it (COCO: without its `filepath` folder).
        id: `cocoid` or `imgid` of a Karpathy file; else `path`.
        split: Name of its split, such as `"train"`.
        captions: In the order of the file; may be empty.
    """

    path: str
    name: str
    id: int | str
    split: str
    captions: list[Caption] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Skip:
    """Something that is left out of the shards.

    Attributes:
        kind: One of `SKIP_KINDS`.
        file: Path of the image; "" where a caption names no image.
        reason: One line for a reader.
        split: The split it belongs to.
        captions: Number of captions that are lost with it.
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
    """What was read from a captions file.

    Attributes:
        images: One entry per image file, in the order of the captions file.
        skipped: Gaps in the data.
        notes: Lines for the user about how the file was read, where that isn't obvious.
    """

    images: list[CaptionedImage]
    skipped: list[Skip]
    notes: list[str] = field(default_factory=list)


Reader = Callable[[Path, SplitNames], CaptionSource]
"""Reads a captions file. Names of splits go through `SplitNames`, and paths of images through `image_path`. Raises
AmpError with file and line where the file isn't in its format."""

_READERS: dict[str, Reader] = {}
_SUFFIXES: dict[str, str] = {}


def register_captions_format(name: str, suffixes: Sequence[str], reader: Reader) -> None:
    """Adds a captions format.

    Args:
        name: What `--format` calls it.
        suffixes: Suffixes of files that are read with it unless `--format` names another, in lower case with the
            dot. A suffix that another format has goes over to this one.
        reader: Function that reads a file.

    Raises:
        AmpError: The name is taken.
    """
    if name == "auto" or _READERS.get(name, reader) is not reader:
        raise AmpError(f"captions format {name!r} is already registered; expected a new name; rename the format")
    _READERS[name] = reader
    _SUFFIXES.update(dict.fromkeys(suffixes, name))


def find_reader(format: str, suffix: str) -> Reader | None:
    """The reader of a format, or with `auto` of a file's suffix; None where no format has the suffix.

    Raises:
        AmpError: No such format.
    """
    load_plugins()
    if format not in ("auto", *_READERS):
        raise AmpError(
            f"format is {format!r}; expected one of {', '.join(('auto', *_READERS))}; a format of another package is "
            "found where AMP_PLUGINS names its module"
        )
    name = _SUFFIXES.get(suffix.lower()) if format == "auto" else format
    return _READERS[name] if name is not None else None


def known_formats() -> tuple[list[str], list[str]]:
    """Names of all formats, and all suffixes."""
    return list(_READERS), list(_SUFFIXES)


def image_path(file: str, where: str) -> str:
    """The normal form of an image's path below the images folder.

    Raises:
        AmpError: The path leads out of that folder.
    """
    path = PurePosixPath(file)
    # On other systems a backslash is a separator, so it could hide a parent part.
    if path.is_absolute() or ".." in path.parts or "\\" in file or "\0" in file or not path.parts:
        raise AmpError(
            f"{where}: image file {shorten(file)} is refused; expected a path inside the images folder, without '..', "
            "a leading '/', or backslashes; correct it"
        )
    return str(path)


def is_empty(value: Any) -> bool:
    """Whether a cell is empty. Null in JSON is, also as pandas writes it (NaN)."""
    return value is None or value == "" or value != value


def cell(value: Any, where: str) -> str:
    """A cell's text without surrounding white space; "" for an empty cell.

    Raises:
        AmpError: No string.
    """
    if is_empty(value):
        return ""
    return check_text(value, where, "write one object per caption" if isinstance(value, list) else "correct it").strip()
