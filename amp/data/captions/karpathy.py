"""Reads Karpathy's JSON format, the usual format of COCO, Flickr30K and Flickr8k: one object with all images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amp.data.captions.base import Caption, CaptionedImage, CaptionSource, Skip, cell, image_path
from amp.data.captions.json_file import parse_file
from amp.data.captions.splits import SplitNames
from amp.data.images.names import composed
from amp.errors import AmpError, shorten
from amp.json_text import check_id, check_text, value_of

_CHECK, _CORRECT = "check the file's format", "correct it"


def read_karpathy(path: Path, splits: SplitNames) -> CaptionSource:
    """See `amp.data.captions.base.Reader`."""
    return karpathy_source(parse_file(path, dict), path, splits)


def karpathy_source(content: Any, path: Path, splits: SplitNames) -> CaptionSource:
    """Reads the parsed content of a Karpathy file."""
    entries = value_of(content, "images", list, str(path), _CHECK)
    images: list[CaptionedImage] = []
    skipped: list[Skip] = []
    first_with: dict[str, int] = {}
    first_sentid: dict[str, str] = {}
    number = 0
    for i, entry in enumerate(entries):
        where = f"{path}: images[{i}]"
        name = cell(value_of(entry, "filename", object, where, _CHECK), f"{where}: 'filename'")
        folder = check_text(entry.get("filepath", ""), f"{where}: 'filepath'", _CORRECT).strip()
        split = splits.normal(value_of(entry, "split", object, where, _CHECK), where)
        if split == "restval" and not splits.keep_restval:
            split = "train"
        captions = []
        file = image_path(f"{folder}/{name}" if folder else name, where) if name else ""
        for j, sentence in enumerate(value_of(entry, "sentences", list, where, _CHECK)):
            here = f"{where}.sentences[{j}]"
            text = cell(value_of(sentence, "raw", object, here, _CHECK), f"{here}: 'raw'")
            sentid = check_id(sentence.get("sentid", number), f"{here}: 'sentid'", _CORRECT)
            first = first_sentid.setdefault(str(sentid), here)
            if first != here:
                raise AmpError(
                    f"{here}: 'sentid' is {shorten(sentid)}, the same as in {first}; expected unique values; renumber "
                    "them"
                )
            number += 1
            if text:
                captions.append(Caption(sentid, text))
            else:
                skipped.append(Skip("empty_caption", file, f"{here}: 'raw' is empty", split, captions=1))
        if not name:
            reason = f"{where}: 'filename' is empty"
            skipped.append(Skip("caption_without_image", "", reason, split, captions=len(captions)))
            continue
        kept = first_with.setdefault(composed(file), i)
        if kept != i:
            reason = f"{where}: images[{kept}] (split {entries[kept]['split']}) is the same file and was kept"
            skipped.append(Skip("duplicate_key", file, reason, split, captions=len(captions)))
            continue
        image_id = check_id(entry.get("cocoid", entry.get("imgid", file)), f"{where}: 'imgid'", _CORRECT)
        images.append(CaptionedImage(file, name, image_id, split, captions))
    return CaptionSource(images, skipped)
