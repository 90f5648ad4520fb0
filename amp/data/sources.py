"""Where captions and their knowledge come from: Karpathy JSON, CSV and JSONL, all read to the same list of images.

`amp.data.tables` reads the rows of CSV and JSONL.

Two sorts of trouble are kept apart. A file that isn't in its format (a missing key, a cut line) is an error at once,
with the place, since nothing read from it can be trusted. A gap in the data (an empty caption, an image listed twice)
is recorded as :class:`Skip`, counted, and judged by the caller.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from amp.data.file_names import composed
from amp.data.tables import (
    SourceFormatError,
    csv_rows,
    json_problem,
    jsonl_objects,
    jsonl_rows,
    read_text,
    text_lines,
)
from amp.errors import shorten
from amp.json_text import parse_json
from amp.knowledge.schema import is_unicode, parse_knowledge, parse_origin
from amp.knowledge.text import CONTEXT_TOKENS, FEW_WORDS, state_text, surely_cut

FORMATS = ("auto", "karpathy", "csv", "jsonl")
SKIP_KINDS = (
    "unreadable_image",
    "missing_image",
    "image_without_caption",
    "duplicate_key",
    "caption_without_image",
    "empty_caption",
)

_SUFFIXES = {
    ".json": "karpathy",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".token": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}

# Other names of the three splits, in lower case. Any other name is a split of its own.
_SPLITS = {
    "training": "train",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "development": "val",
    "testing": "test",
} | {name: name for name in ("train", "val", "test")}


@dataclass(slots=True)
class Caption:
    """A caption.

    Attributes:
        id: ``sentid`` of a Karpathy file; else the number of the data row, 0-based.
        text: without surrounding white space, of any length.
        knowledge: its checked record as JSON text ``{"triplets": ..., "states": ...}``, a third of the memory of the
            objects; None where no record belongs to the caption.
    """

    id: int | str
    text: str
    knowledge: str | None = None


@dataclass(slots=True)
class CaptionedImage:
    """An image with all its captions.

    Attributes:
        path: of the file, relative to the images folder, ``/`` as separator, without parent parts.
        name: the file's name as the captions file spells it (COCO: without its ``filepath`` folder).
        id: ``cocoid`` or ``imgid`` of a Karpathy file; else ``path``.
        split: such as ``"train"``.
        captions: in the order of the file; may be empty.
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
        kind: one of ``SKIP_KINDS``; the last two are about a caption, the others about an image.
        file: the image's path ("" where a caption names no image).
        reason: one line for a reader.
        split: where it would have gone.
        captions: captions lost by it.
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
    """What :func:`load_captions` found.

    Attributes:
        images: one entry an image file, in the order of the captions file.
        skipped: gaps in the data.
        notes: lines for the user about how the file was read, where that isn't plain.
    """

    images: list[CaptionedImage]
    skipped: list[Skip]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class KnowledgeReport:
    """What :func:`attach_knowledge` did.

    Attributes:
        records: records in the knowledge file.
        attached: captions that now have knowledge.
        unused: records that belong to no caption.
        states: states of the captions.
        cut_states: those of them whose prompt is surely longer than CLIP reads.
    """

    records: int
    attached: int
    unused: int
    states: int
    cut_states: int


def load_captions(
    path: str | Path, format: str = "auto", default_split: str = "train", keep_restval: bool = False
) -> CaptionSource:
    """Read a captions file.

    Args:
        path: a Karpathy JSON (``dataset_coco.json``, ``dataset_flickr30k.json``), a CSV with a header, or a JSONL;
            the latter two with the columns ``image``, ``caption`` (or another name in `amp.data.tables.ALIASES`) and,
            if wanted, ``split``. Several rows of one image are its several captions.
        format: ``karpathy``, ``csv``, ``jsonl``; ``auto`` goes by the file's suffix.
        default_split: the split of CSV and JSONL rows that name none.
        keep_restval: leave Karpathy's ``restval`` (COCO's other validation images) a split of its own; by default it
            is part of ``train``, as in every published COCO result.

    Raises:
        SourceFormatError: naming the file, the line or entry, the key, the value seen, the value expected.
    """
    path = Path(path)
    if format not in FORMATS:
        raise SourceFormatError(f"format is {format!r}; expected one of {', '.join(FORMATS)}")
    default_split = normal_split(default_split, "default_split")
    if format == "auto":
        format = _SUFFIXES.get(path.suffix.lower(), "")
        if not format:
            next(text_lines(path), None)  # says what the file is, where it isn't text
            raise SourceFormatError(
                f"{path}: the suffix {path.suffix!r} doesn't tell the format; expected one of {', '.join(_SUFFIXES)}; "
                "name it with --format karpathy, csv or jsonl"
            )
    splits = _SplitNames()
    if format == "karpathy":
        source = _load_karpathy(path, keep_restval, splits)
    else:
        notes: list[str] = []
        rows = csv_rows(path, notes) if format == "csv" else jsonl_rows(path, notes)
        source = _load_rows(path, rows, default_split, splits)
        source.notes = notes
    for image in source.images:
        if not image.captions:
            source.skipped.append(Skip("image_without_caption", image.path, "no caption belongs to it", image.split))
    source.images = [image for image in source.images if image.captions]
    if not source.images:
        first = f"; {len(source.skipped)} skipped, first: {source.skipped[0].reason}" if source.skipped else ""
        raise SourceFormatError(f"{path}: no image with a caption in it; expected at least one; check the file{first}")
    source.notes += splits.notes(path)
    return source


def attach_knowledge(images: list[CaptionedImage], path: str | Path) -> KnowledgeReport:
    """Give each caption its knowledge, in place, from a JSONL file of checked records.

    A record is ``{"sentid": 12, "triplets": [...], "states": [...]}`` or ``{"image": "a.jpg", "caption": "A man ...",
    "triplets": [...], "states": [...]}``, with ``sources`` and ``empty`` where known. With a ``sentid``, ``image`` and
    ``caption`` are optional and compared with the captions file where present, since knowledge of another data set
    would fit by number.

    Raises:
        SourceFormatError: a malformed line, two differing records of one caption, a record that contradicts the
            captions file, or a file of which nothing fits.
        KnowledgeFormatError: triplets or states out of form.
    """
    path = Path(path)
    by_id: dict[str, tuple[CaptionedImage, Caption]] = {}
    by_text: dict[tuple[str, str], list[Caption]] = {}
    for image in images:
        for caption in image.captions:
            by_id[str(caption.id)] = (image, caption)
            for name in {composed(image.path), composed(image.name)}:
                by_text.setdefault((name, composed(caption.text)), []).append(caption)

    records = unused = states = cut_states = 0
    lines: dict[int, int] = {}  # id() of a caption -> line that its knowledge came from
    for number, record in jsonl_objects(path):
        where = f"{path} line {number}"
        records += 1
        parsed = parse_knowledge(record, where)
        content = parsed.to_dict() | parse_origin(record, where)
        knowledge = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        for key in ("image", "caption"):
            if key in record:
                record[key] = composed(_check_text(record[key], where, key).strip())
        if "image" in record:
            record["image"] = str(PurePosixPath(record["image"]))  # as `_relative` leaves it
        if "sentid" in record:
            known = by_id.get(str(_check_id(record["sentid"], where, "sentid")))
            if known is not None:
                _check_same(record, *known, where)
            targets = [known[1]] if known else []
        elif "image" in record and "caption" in record:
            targets = by_text.get((record["image"], record["caption"]), [])
        else:
            raise SourceFormatError(
                f"{where}: no key says which caption this is; expected 'sentid', or 'image' and 'caption'; keys seen: "
                f"{shorten(', '.join(record))}; add them"
            )
        unused += not targets
        pairs = zip(parsed.triplets, parsed.states, strict=True)
        # The first test spares all but a few the second, which would take a tenth of a conversion's time.
        cut = sum(state.count(" ") >= FEW_WORDS and surely_cut(state_text(triplet, state)) for triplet, state in pairs)
        for caption in targets:
            first = lines.setdefault(id(caption), number)
            if first != number and caption.knowledge != knowledge:
                raise SourceFormatError(
                    f"{where}: other knowledge of the same caption stands in line {first}; expected one record a "
                    "caption; remove one of them"
                )
            if caption.knowledge is None:
                states += len(parsed.states)
                cut_states += cut
            caption.knowledge = knowledge
    if records and unused == records:
        raise SourceFormatError(
            f"{path}: none of its {records} records belongs to a caption of the captions file; expected matching "
            "'sentid', or 'image' and 'caption'; give the knowledge of this data set"
        )
    if not records:
        raise SourceFormatError(f"{path}: no record in it; expected one JSON object a line; check the file")
    return KnowledgeReport(records, len(lines), unused, states, cut_states)


def cut_note(images: Iterable[CaptionedImage], report: KnowledgeReport | None) -> str | None:
    """A line with the number of captions and states that CLIP doesn't read to their end; None where none was found."""
    captions = [caption.text for image in images for caption in image.captions]
    cut = [text for text in captions if surely_cut(text)]
    counts = [f"{len(cut):,} of {len(captions):,} captions"] if cut else []
    if report is not None and report.cut_states:
        counts.append(f"{report.cut_states:,} of {report.states:,} states")
    if not counts:
        return None
    first = f", the first is {shorten(cut[0])}" if cut else ""
    return (
        f"at least {' and '.join(counts)} are longer than the {CONTEXT_TOKENS} tokens that CLIP reads (counted by "
        f"words); the rest of them is cut off{first}; amp train --plan counts with the tokenizer of a model"
    )


def load_image_list(path: str | Path) -> list[str]:
    """Image file names, one a line; blank lines don't count.

    Raises:
        SourceFormatError: unreadable, or empty.
    """
    names = [line.strip() for _, line in text_lines(Path(path)) if line.strip()]
    if not names:
        raise SourceFormatError(f"{path}: no image named in it; expected one file name a line; check the file")
    return names


def check_split(value: Any, where: str) -> str:
    """A split's name, fit to be part of a shard's file name.

    Raises:
        SourceFormatError: anything but ASCII letters, digits, ``_`` and ``-``.
    """
    if not isinstance(value, str) or not value.isascii() or not value.replace("_", "a").replace("-", "a").isalnum():
        raise SourceFormatError(
            f"{where}: 'split' is {shorten(value)}; expected a name of letters, digits, '_' and '-', such as 'train'; "
            "rename it"
        )
    return value


def normal_split(value: Any, where: str, known: Iterable[str] = ()) -> str:
    """The name under which a split is stored: "train", "val" and "test" for their other spellings.

    Args:
        value: the split's name.
        where: place for the message.
        known: names that are kept as they are, such as those of shards that exist.

    Raises:
        SourceFormatError: as `check_split`.
    """
    name = check_split(value, where)
    return name if name in known else _SPLITS.get(name.lower(), name)


class _SplitNames:
    """The splits of a file as they are spelled there, and as they are stored."""

    def __init__(self) -> None:
        self._stored: dict[str, str] = {}

    def normal(self, value: Any, where: str) -> str:
        """`normal_split`, where two names that differ by more than case don't become one.

        Raises:
            SourceFormatError: as `check_split`; both "val" and "dev" occur.
        """
        name = value.strip() if isinstance(value, str) and value.strip().lower() in _SPLITS else value
        if isinstance(name, str) and name in self._stored:
            return self._stored[name]
        stored = normal_split(name, where)
        for other, its in self._stored.items():
            if its == stored and other.lower() != name.lower():
                raise SourceFormatError(
                    f"{where}: 'split' is {name!r}, and above it is {other!r}; both would be stored as {stored!r}; "
                    "expected one name per split; rename one of them"
                )
        self._stored[name] = stored
        return stored

    def notes(self, path: Path) -> list[str]:
        """A line for the user, where splits are stored under other names."""
        renamed = [f"{name!r} as {stored!r}" for name, stored in self._stored.items() if name != stored]
        return [f"{path}: splits stored: {', '.join(renamed)}"] if renamed else []


def _load_karpathy(path: Path, keep_restval: bool, splits: _SplitNames) -> CaptionSource:
    text = read_text(path)
    try:
        content = parse_json(text)
    except ValueError as error:
        place, reason = json_problem(error)
        first = text.lstrip().partition("\n")[0]
        if not first.startswith(("{", "[")):
            advice = f"the file starts with {shorten(first)}; if it is a table, give --format csv"
        elif reason.startswith("Extra data"):
            advice = "if it holds one object per line, give --format jsonl"
        else:
            advice = "download it again, or name another format with --format"
        raise SourceFormatError(
            f"{path}{place}: not valid JSON ({reason}); expected a Karpathy JSON; {advice}"
        ) from None
    if isinstance(content, list):
        keys = ", ".join(content[0]) if content and isinstance(content[0], dict) else ""
        raise SourceFormatError(
            f"{path}: a list of objects with the keys {shorten(keys)}; expected a JSON object, a Karpathy JSON with "
            "the key 'images'; write one object per caption and line with the keys image and caption (JSONL)"
        )
    if isinstance(content, dict) and "annotations" in content:
        raise SourceFormatError(
            f"{path}: key 'annotations' seen; this is COCO's own annotation file; expected the Karpathy split "
            "(dataset_coco.json), which holds the sentences and the splits; download that one"
        )
    entries = _get(content, "images", list, str(path))
    images: list[CaptionedImage] = []
    skipped: list[Skip] = []
    first_with: dict[str, int] = {}
    first_sentid: dict[str, str] = {}
    number = 0
    for i, entry in enumerate(entries):
        where = f"{path}: images[{i}]"
        name = _cell(_get(entry, "filename", object, where), where, "filename")
        folder = _check_text(entry.get("filepath", ""), where, "filepath").strip()
        split = splits.normal(_get(entry, "split", object, where), where)
        if split == "restval" and not keep_restval:
            split = "train"
        captions = []
        file = _relative(f"{folder}/{name}" if folder else name, where) if name else ""
        for j, sentence in enumerate(_get(entry, "sentences", list, where)):
            here = f"{where}.sentences[{j}]"
            text = _cell(_get(sentence, "raw", object, here), here, "raw")
            sentid = _check_id(sentence.get("sentid", number), here, "sentid")
            first = first_sentid.setdefault(str(sentid), here)
            if first != here:
                raise SourceFormatError(
                    f"{here}: 'sentid' is {shorten(sentid)}, which {first} has too; expected each once; renumber them"
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
        image_id = _check_id(entry.get("cocoid", entry.get("imgid", file)), where, "imgid")
        images.append(CaptionedImage(file, name, image_id, split, captions))
    return CaptionSource(images, skipped)


def _load_rows(
    path: Path, rows: Iterable[tuple[int, dict[str, Any]]], default_split: str, splits: _SplitNames
) -> CaptionSource:
    images: dict[str, CaptionedImage] = {}
    skipped: list[Skip] = []
    first_line: dict[str, int] = {}
    for number, (line, row) in enumerate(rows):
        where = f"{path} line {line}"
        file, text = (_cell(row[key], where, key) for key in ("image", "caption"))
        if re.fullmatch(r"""\[\s*(["']).*\1\s*\]""", text, re.DOTALL):
            raise SourceFormatError(
                f"{where}: the caption is {shorten(text)}, a list; expected a text; write one row per caption"
            )
        split = row.get("split")
        split = default_split if _is_empty(split) else splits.normal(split, where)
        if not file:
            skipped.append(Skip("caption_without_image", "", f"{where}: 'image' is empty", split, captions=1))
            continue
        file = _relative(file, where)
        image = images.setdefault(composed(file), CaptionedImage(file, file, file, split))
        first = first_line.setdefault(image.path, line)
        if image.split != split:
            raise SourceFormatError(
                f"{where}: 'split' is {split!r} but line {first} puts the same image in {image.split!r}; expected one "
                "split an image; correct one of them"
            )
        if text:
            image.captions.append(Caption(number, text))
        else:
            skipped.append(Skip("empty_caption", file, f"{where}: 'caption' is empty", split, captions=1))
    return CaptionSource(list(images.values()), skipped)


def _relative(file: str, where: str) -> str:
    """The normal form of an image's path under the images folder; refuses to leave that folder."""
    path = PurePosixPath(file)
    # A backslash would be a separator elsewhere, so it could hide a parent part.
    if path.is_absolute() or ".." in path.parts or "\\" in file or "\0" in file or not path.parts:
        raise SourceFormatError(
            f"{where}: image file {shorten(file)} is refused; expected a path inside the images folder, without '..', "
            "a leading '/', or backslashes; correct it"
        )
    return str(path)


def _check_same(record: dict[str, Any], image: CaptionedImage, caption: Caption, where: str) -> None:
    """A record found by ``sentid`` must not contradict the captions file."""
    expected = {"image": {composed(image.path), composed(image.name)}, "caption": {composed(caption.text)}}
    for key, values in expected.items():
        if key in record and record[key] not in values:
            raise SourceFormatError(
                f"{where}: '{key}' is {shorten(record[key])} but sentid {record['sentid']} of the captions file has "
                f"{shorten(min(values))}; expected the same; give the knowledge of this captions file"
            )


def _check_id(value: Any, where: str, key: str) -> int | str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise SourceFormatError(
            f"{where}: '{key}' is {shorten(value)}; expected a whole number or a string; correct it"
        )
    return value if isinstance(value, int) else _check_text(value, where, key)


def _is_empty(value: Any) -> bool:
    """Whether a cell is empty; null in JSON, also as pandas writes it (NaN), is."""
    return value is None or value == "" or value != value


def _cell(value: Any, where: str, key: str) -> str:
    """A text without surrounding white space; "" for an empty cell."""
    return "" if _is_empty(value) else _check_text(value, where, key).strip()


def _check_text(value: Any, where: str, key: str) -> str:
    if isinstance(value, list):
        raise SourceFormatError(
            f"{where}: '{key}' is {shorten(value)}; expected a string; write one object per caption"
        )
    if not isinstance(value, str):
        raise SourceFormatError(f"{where}: '{key}' is {shorten(value)}; expected a string; correct it")
    if not is_unicode(value):
        raise SourceFormatError(
            f"{where}: '{key}' is {shorten(value)}, not valid Unicode (a lone surrogate); correct it"
        )
    return value


def _get(content: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(content, dict):
        raise SourceFormatError(f"{where}: {shorten(content)}; expected a JSON object; check the file's format")
    if key not in content:
        raise SourceFormatError(
            f"{where}: key '{key}' is missing; keys seen: {shorten(', '.join(content))}; check the file's format"
        )
    if not isinstance(content[key], kind):
        raise SourceFormatError(f"{where}: '{key}' is {shorten(content[key])}; expected a list; correct it")
    return content[key]
