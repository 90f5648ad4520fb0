"""Reads Karpathy's JSON format, the usual format of COCO, Flickr30K and Flickr8k: one object with all images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amp.data.captions.base import Caption, CaptionedImage, CaptionSource, Skip, cell, image_path
from amp.data.captions.splits import SplitNames
from amp.data.captions.text_file import json_problem, read_text
from amp.data.images.names import composed
from amp.errors import AmpError, shorten
from amp.json_text import check_id, check_text, parse_json, value_of

_CHECK, _CORRECT = "check the file's format", "correct it"


def read_karpathy(path: Path, splits: SplitNames) -> CaptionSource:
    """See `amp.data.captions.base.Reader`."""
    entries = value_of(_parse(path), "images", list, str(path), _CHECK)
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


def _parse(path: Path) -> Any:
    """Parses the file. For other formats, the error says which format the file seems to have."""
    text = read_text(path)
    try:
        content = parse_json(text)
    except ValueError as error:
        place, reason = json_problem(error)
        first = text.lstrip().partition("\n")[0]
        if not first.startswith(("{", "[")):
            advice = f"the file starts with {shorten(first)}; if it is a table, give --format csv"
        elif reason.startswith("Extra data"):
            advice = "if it has one object per line, give --format jsonl"
        else:
            advice = "download it again, or name another format with --format"
        raise AmpError(f"{path}{place}: not valid JSON ({reason}); expected a Karpathy JSON; {advice}") from None
    if isinstance(content, list):
        keys = ", ".join(content[0]) if content and isinstance(content[0], dict) else ""
        raise AmpError(
            f"{path}: a list of objects with the keys {shorten(keys)}; expected a JSON object with the key 'images' "
            "(Karpathy); or write one object per caption and line with the keys image and caption (JSONL)"
        )
    if isinstance(content, dict) and "annotations" in content:
        raise AmpError(
            f"{path}: key 'annotations' seen; this is COCO's own annotation file; expected the Karpathy split "
            "(dataset_coco.json), which contains the sentences and the splits; download that file"
        )
    return content
