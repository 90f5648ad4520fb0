"""Reads COCO's own annotation files, `captions_train2017.json` and `captions_val2017.json`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from amp.data.captions.base import Caption, CaptionedImage, CaptionSource, Skip, cell, image_path
from amp.data.captions.json_file import parse_file
from amp.data.captions.splits import SplitNames
from amp.data.images.names import composed
from amp.errors import AmpError, shorten
from amp.json_text import check_id, value_of

_CHECK, _CORRECT = "check the file's format", "correct it"


def read_coco(path: Path, splits: SplitNames) -> CaptionSource:
    """See `amp.data.captions.base.Reader`."""
    return coco_source(parse_file(path, dict), path, splits)


def coco_source(content: Any, path: Path, splits: SplitNames) -> CaptionSource:
    """Reads the parsed content of an annotation file.

    The file's name gives the split of all its images (`captions_val2017.json`: val) if it names exactly one.
    """
    named = set(re.findall(r"(?<![a-z])(train|val|test)(?![a-z])", path.name.lower()))
    split = named.pop() if len(named) == 1 else splits.default
    images: list[CaptionedImage] = []
    by_id: dict[str, CaptionedImage] = {}
    first_image: dict[str, str] = {}
    for i, entry in enumerate(value_of(content, "images", list, str(path), _CHECK)):
        where = f"{path}: images[{i}]"
        image_id = _id(entry, first_image, where)
        name = cell(value_of(entry, "file_name", object, where, _CHECK), f"{where}: 'file_name'")
        file = image_path(name, where) if name else ""
        by_id[str(image_id)] = CaptionedImage(file, name, image_id, split)
        images.append(by_id[str(image_id)])

    skipped: list[Skip] = []
    first_annotation: dict[str, str] = {}
    hint = "give the file with the captions, such as captions_val2017.json"
    for i, annotation in enumerate(value_of(content, "annotations", list, str(path), _CHECK)):
        where = f"{path}: annotations[{i}]"
        text = cell(value_of(annotation, "caption", object, where, hint), f"{where}: 'caption'")
        caption = Caption(_id(annotation, first_annotation, where), text)
        of = check_id(value_of(annotation, "image_id", object, where, _CHECK), f"{where}: 'image_id'", _CORRECT)
        image = by_id.get(str(of))
        if image is None:
            reason = f"{where}: 'image_id' is {shorten(of)}, which no image has"
            skipped.append(Skip("caption_without_image", "", reason, split, captions=1))
        elif text:
            image.captions.append(caption)
        else:
            skipped.append(Skip("empty_caption", image.path, f"{where}: 'caption' is empty", split, captions=1))

    kept: list[CaptionedImage] = []
    first_with: dict[str, int] = {}
    for i, image in enumerate(images):
        where, lost = f"{path}: images[{i}]", len(image.captions)
        if not image.path:
            reason = f"{where}: 'file_name' is empty"
            skipped.append(Skip("caption_without_image", "", reason, split, captions=lost))
            continue
        first = first_with.setdefault(composed(image.path), i)
        if first == i:
            kept.append(image)
        else:
            reason = f"{where}: images[{first}] is the same file and was kept"
            skipped.append(Skip("duplicate_key", image.path, reason, split, captions=lost))
    return CaptionSource(kept, skipped, [f"{path}: COCO's annotations, all in split {split!r}"])


def _id(entry: Any, first_with: dict[str, str], where: str) -> int | str:
    """The id of an image or an annotation. Raises AmpError if another entry has the same."""
    value = check_id(value_of(entry, "id", object, where, _CHECK), f"{where}: 'id'", _CORRECT)
    first = first_with.setdefault(str(value), where)
    if first != where:
        raise AmpError(
            f"{where}: 'id' is {shorten(value)}, the same as in {first}; expected unique values; renumber them"
        )
    return value
