"""Gives captions their knowledge, from a JSONL file with one record per caption."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from amp.data.captions.base import Caption, CaptionedImage
from amp.data.captions.text_file import jsonl_objects
from amp.data.images.names import composed
from amp.errors import AmpError, shorten
from amp.json_text import check_id, check_text
from amp.knowledge.schema import parse_knowledge, parse_origin
from amp.knowledge.text import CONTEXT_TOKENS, FEW_WORDS, state_text, surely_cut


@dataclass(frozen=True, slots=True)
class KnowledgeReport:
    """Counts of `attach_knowledge`.

    Attributes:
        records: Records in the knowledge file.
        attached: Captions that now have knowledge.
        unused: Records that belong to no caption.
        states: States of the captions.
        cut_states: Number of these whose prompt is surely longer than CLIP reads.
    """

    records: int
    attached: int
    unused: int
    states: int
    cut_states: int


def attach_knowledge(images: list[CaptionedImage], path: str | Path) -> KnowledgeReport:
    """Gives each caption its knowledge, in place, from a JSONL file of checked records.

    A record is `{"sentid": 12, "triplets": [...], "states": [...]}` or ``{"image": "a.jpg", "caption": "A man ...",
    "triplets": [...], "states": [...]}`, with `sources` and `empty` where known. With a `sentid`, `image`` and
    `caption` are optional. They are compared with the captions file if present, since the numbers of another data
    set's knowledge would fit too.

    Raises:
        AmpError: A malformed line, triplets or states out of form, two differing records of one caption, a record that
            contradicts the captions file, or a file of which nothing fits.
    """
    path = Path(path)
    captions = _Captions(images)
    records = unused = states = cut_states = 0
    lines: dict[int, int] = {}  # id() of a caption -> line that its knowledge came from
    for number, record in jsonl_objects(path):
        where = f"{path} line {number}"
        records += 1
        parsed = parse_knowledge(record, where)
        content = parsed.to_dict() | parse_origin(record, where)
        knowledge = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        targets = captions.find(record, where)
        unused += not targets
        pairs = zip(parsed.triplets, parsed.states, strict=True)
        # The first test makes the second one rare, which would take a tenth of a conversion's time.
        cut = sum(state.count(" ") >= FEW_WORDS and surely_cut(state_text(triplet, state)) for triplet, state in pairs)
        for caption in targets:
            first = lines.setdefault(id(caption), number)
            if first != number and caption.knowledge != knowledge:
                raise AmpError(
                    f"{where}: line {first} has other knowledge of the same caption; expected one record per caption; "
                    "remove one of them"
                )
            if caption.knowledge is None:
                states += len(parsed.states)
                cut_states += cut
            caption.knowledge = knowledge
    if not records:
        raise AmpError(f"{path}: no record in it; expected one JSON object per line; check the file")
    if unused == records:
        raise AmpError(
            f"{path}: none of its {records} records belongs to a caption of the captions file; expected matching "
            "'sentid', or 'image' and 'caption'; give the knowledge of this data set"
        )
    return KnowledgeReport(records, len(lines), unused, states, cut_states)


def cut_note(images: Iterable[CaptionedImage], report: KnowledgeReport | None) -> str | None:
    """A line with the number of captions and states that CLIP doesn't read to their end; None if there are none."""
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


class _Captions:
    """Captions by `sentid`, and by image and text."""

    def __init__(self, images: list[CaptionedImage]) -> None:
        self._by_id: dict[str, tuple[CaptionedImage, Caption]] = {}
        self._by_text: dict[tuple[str, str], list[Caption]] = {}
        for image in images:
            for caption in image.captions:
                self._by_id[str(caption.id)] = (image, caption)
                for name in {composed(image.path), composed(image.name)}:
                    self._by_text.setdefault((name, composed(caption.text)), []).append(caption)

    def find(self, record: dict[str, Any], where: str) -> list[Caption]:
        """The captions that a record belongs to.

        Raises:
            AmpError: The record names none, or contradicts the captions file.
        """
        given = {
            key: composed(check_text(record[key], f"{where}: '{key}'", "correct it").strip())
            for key in ("image", "caption")
            if key in record
        }
        if "image" in given:
            given["image"] = str(PurePosixPath(given["image"]))  # the form that `image_path` gives
        if "sentid" in record:
            known = self._by_id.get(str(check_id(record["sentid"], f"{where}: 'sentid'", "correct it")))
            if known is None:
                return []
            image, caption = known
            expected = {"image": {composed(image.path), composed(image.name)}, "caption": {composed(caption.text)}}
            for key, value in given.items():
                if value not in expected[key]:
                    raise AmpError(
                        f"{where}: '{key}' is {shorten(value)} but sentid {record['sentid']} of the captions file has "
                        f"{shorten(min(expected[key]))}; expected the same; give the knowledge of this captions file"
                    )
            return [caption]
        if given.keys() != {"image", "caption"}:
            raise AmpError(
                f"{where}: no key says which caption this is; expected 'sentid', or 'image' and 'caption'; keys seen: "
                f"{shorten(', '.join(record))}; add them"
            )
        return self._by_text.get((given["image"], given["caption"]), [])
