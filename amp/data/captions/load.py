"""Reads a captions file of any format."""

from __future__ import annotations

from pathlib import Path

from amp.data.captions.base import DATASET_PREFIX, CaptionSource, Skip, find_reader, known_formats
from amp.data.captions.splits import SplitNames
from amp.data.captions.text_file import inner_suffix, text_lines
from amp.errors import AmpError


def load_captions(
    path: str | Path, format: str = "auto", default_split: str = "train", keep_restval: bool = False
) -> CaptionSource:
    """Reads a captions file.

    Args:
        path: A captions file (docs/data.md lists the formats), or a file in a format that a plugin registers. It may be
            compressed with gzip. `datasets:NAME` or `datasets:NAME:CONFIG` is a dataset of Hugging Face's `datasets`.
        format: Name of the format; `auto` chooses by the file's suffix, and by the content of `.json` and `.txt`.
        default_split: Split of images without a split.
        keep_restval: Keep Karpathy's `restval` (COCO's other validation images) as a separate split. By default it
            is added to `train`, as in every published COCO result.

    Raises:
        AmpError: The file can't be used.
    """
    path = Path(path)
    if format == "auto" and str(path).startswith(DATASET_PREFIX):
        format = "datasets"
    splits = SplitNames(default_split, keep_restval)
    reader = find_reader(format, inner_suffix(path))
    if reader is None:
        next(text_lines(path), None)  # raises a more specific error if the file isn't text
        names, suffixes = known_formats()
        raise AmpError(
            f"{path}: the suffix {inner_suffix(path)!r} belongs to no format; expected one of {', '.join(suffixes)}; "
            f"set --format to {', '.join(names[:-1])} or {names[-1]}, or name a plugin in AMP_PLUGINS"
        )
    source = reader(path, splits)
    for image in source.images:
        if not image.captions:
            source.skipped.append(Skip("image_without_caption", image.path, "it has no caption", image.split))
    source.images = [image for image in source.images if image.captions]
    if not source.images:
        first = f"; {len(source.skipped)} skipped, first: {source.skipped[0].reason}" if source.skipped else ""
        raise AmpError(f"{path}: no image with a caption in it; expected at least one; check the file{first}")
    source.notes += splits.notes(path)
    return source
