"""The folder of the photos, and photos that the captions file itself contains, which are first written to it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from amp.data.captions.base import CaptionedImage, CaptionSource
from amp.errors import AmpError
from amp.files import whole_file
from amp.terminal import PlainConsole


def photo_folder(images: str | None, source: CaptionSource, out: Path, captions: str) -> Path:
    """The folder that the images' paths are relative to.

    Args:
        images: The option `--images`.
        source: Content of the captions file.
        out: Folder of the shards.
        captions: The captions file, for messages.

    Raises:
        AmpError: The folder is unknown.
    """
    if images is not None:
        return Path(images)
    if source.photos is not None:
        return out / "photos"
    if source.folder is not None:
        return source.folder
    raise AmpError(f"{captions}: contains the names of photos, not the photos; expected their folder; add --images")


def write_photos(source: CaptionSource, images: Iterable[CaptionedImage], folder: Path, console: PlainConsole) -> None:
    """Writes photos that the captions file contains as files, except those that exist.

    Args:
        source: Content of the captions file.
        images: The images whose photos are needed.
        folder: Folder to write to; created if it doesn't exist.
        console: Console for progress output.

    Raises:
        AmpError: A photo can't be written, or the captions file can't be read any more.
    """
    missing = {image.path for image in images if not (folder / image.path).exists()}
    if source.photos is None or not missing:
        return
    total = len(missing)
    with console.progress(f"extracting photos to {folder}", "images", keep=True) as report:
        for name, content in source.photos():
            if name in missing:
                _write(folder / name, content)
                missing.discard(name)
                report(total - len(missing), total)
            if not missing:
                break


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():  # another part has written it
            return
        with whole_file(path) as file:
            file.write(content)
            file.flush()
            # The name depends on the content. With a constant time, shards stay valid if the photo is written again.
            os.utime(file.name, (0, 0))
    except OSError as error:
        raise AmpError(
            f"{path}: can't be written ({error.strerror}); give a folder that you may write to with --images"
        ) from None
