"""Makes absolute image paths of a captions file relative to the images folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from amp.data.captions.base import CaptionedImage, CaptionSource
from amp.data.images.names import RelativeNames, composed
from amp.errors import AmpError, shorten


def make_relative(source: CaptionSource, root: Path, captions: str) -> None:
    """Makes the absolute paths relative, in place, as if the captions file had relative paths.

    Args:
        source: Content of the captions file.
        root: The images folder.
        captions: The captions file, for messages.

    Raises:
        AmpError: A path is outside of the images folder, or an image is in two splits.
    """
    if not any(image.path.startswith("/") for image in source.images):
        return
    names = RelativeNames(root)
    kept: dict[str, CaptionedImage] = {}
    for image in source.images:
        file = names.find(image.path)
        if file is None:
            raise AmpError(
                f"{captions}: image file {shorten(image.path)} is not allowed; expected a path inside the images "
                f"folder {root}; correct the path or --images"
            )
        if image.id == image.path:
            image.id = file
        image.path, image.name = file, names.find(image.name) or image.name
        first = kept.setdefault(composed(file), image)  # the file may also have the relative path
        if first is not image:
            if first.split != image.split:
                raise AmpError(
                    f"{captions}: image file {shorten(file)} is in the splits {first.split!r} and {image.split!r}; "
                    "expected one split per image; correct its absolute or its relative path's row"
                )
            first.captions += image.captions
    source.images = list(kept.values())
    source.skipped = [replace(skip, file=names.find(skip.file) or skip.file) for skip in source.skipped]
