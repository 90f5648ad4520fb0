"""Attaches knowledge to captions, from a JSONL file with one record per caption."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from amp.data.captions.base import Caption, CaptionedImage
from amp.data.captions.text_file import jsonl_objects
from amp.data.images.names import RelativeNames, composed
from amp.errors import AmpError, shorten
from amp.json_text import check_id, check_text
from amp.knowledge.schema import parse_foils, parse_knowledge, parse_origin
from amp.knowledge.text import CONTEXT_TOKENS, FEW_WORDS, state_text, surely_cut


@dataclass(frozen=True, slots=True)
class KnowledgeReport:
    """Counts of `attach_knowledge`.

    Attributes:
        records: Number of records in the knowledge file.
        attached: Number of captions that now have knowledge.
        unused: Number of records that match no caption.
        states: Number of states attached to captions.
        cut_states: Number of attached states whose prompt is certainly longer than CLIP's context.
    """

    records: int
    attached: int
    unused: int
    states: int
    cut_states: int


def attach_knowledge(
    images: list[CaptionedImage], path: str | Path, images_root: Path | None = None
) -> KnowledgeReport:
    """Attaches knowledge to captions, in place, from a JSONL file.

    A record has `triplets` and `states`, and optionally `sources`, `empty` and `foils`. It names its caption by
    `sentid`, or by `image` and `caption`. If a record with `sentid` also has `image` or `caption`, they are compared
    with the captions file, because knowledge of another dataset may use the same numbers.

    Args:
        images: The images with their captions.
        path: The knowledge file.
        images_root: The images folder. Absolute paths in the knowledge file are made relative to it. Without it, the
            absolute path of a record with `sentid` only has to end with the path of the image.

    Raises:
        AmpError: A line, its triplets or its states are malformed, two records of one caption differ, a record
            contradicts the captions file, or no record matches a caption.
    """
    path = Path(path)
    captions = _Captions(images, images_root)
    records = unused = states = cut_states = 0
    lines: dict[int, int] = {}  # id() of a caption -> line that its knowledge came from
    for number, record in jsonl_objects(path):
        where = f"{path} line {number}"
        records += 1
        parsed = parse_knowledge(record, where)
        content: dict[str, Any] = parsed.to_dict() | parse_origin(record, where)
        if foils := parse_foils(record, where):
            content["foils"] = [foil.to_dict() for foil in foils]
        knowledge = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        targets = captions.find(record, where)
        unused += not targets
        pairs = zip(parsed.triplets, parsed.states, strict=True)
        # The cheap word count makes `surely_cut` rare; for all states it would take a tenth of a conversion's time.
        cut = sum(state.count(" ") >= FEW_WORDS and surely_cut(state_text(triplet, state)) for triplet, state in pairs)
        for caption in targets:
            first = lines.setdefault(id(caption), number)
            if first != number and caption.knowledge != knowledge:
                raise AmpError(
                    f"{where}: line {first} has different knowledge for the same caption; expected one record per "
                    "caption; remove one of them"
                )
            if caption.knowledge is None:
                states += len(parsed.states)
                cut_states += cut
            caption.knowledge = knowledge
    if not records:
        raise AmpError(f"{path}: no record in it; expected one JSON object per line; check the file")
    if unused == records:
        raise AmpError(
            f"{path}: none of its {records} records matches a caption of the captions file; expected matching "
            "'sentid', or 'image' and 'caption'; give the knowledge of this dataset"
        )
    return KnowledgeReport(records, len(lines), unused, states, cut_states)


def cut_note(images: Iterable[CaptionedImage], report: KnowledgeReport | None) -> str | None:
    """A note with the number of captions and states that are too long for CLIP; None if there are none."""
    captions = [caption.text for image in images for caption in image.captions]
    cut = [text for text in captions if surely_cut(text)]
    counts = [f"{len(cut):,} of {len(captions):,} captions"] if cut else []
    if report is not None and report.cut_states:
        counts.append(f"{report.cut_states:,} of {report.states:,} states")
    if not counts:
        return None
    first = f"; first: {shorten(cut[0])}" if cut else ""
    return (
        f"at least {' and '.join(counts)} are longer than the {CONTEXT_TOKENS} tokens that CLIP reads (estimated from "
        f"words) and will be cut off{first}; amp train --plan counts exactly, with the tokenizer of a model"
    )


class _Captions:
    """Index of captions by `sentid`, and by image and text."""

    def __init__(self, images: list[CaptionedImage], images_root: Path | None) -> None:
        self._names = RelativeNames(images_root) if images_root is not None else None
        self._by_id: dict[str, tuple[CaptionedImage, Caption]] = {}
        # Tar files of other tools are numbered from 0 in each split, so several splits have the same ids.
        self._same_id: dict[str, list[tuple[CaptionedImage, Caption]]] = {}
        self._by_text: dict[tuple[str, str], list[Caption]] = {}
        for image in images:
            for caption in image.captions:
                if self._by_id.setdefault(str(caption.id), (image, caption))[1] is not caption:
                    self._same_id.setdefault(str(caption.id), []).append((image, caption))
                for name in {composed(image.path), composed(image.name)}:
                    self._by_text.setdefault((name, composed(caption.text)), []).append(caption)

    def find(self, record: dict[str, Any], where: str) -> list[Caption]:
        """The captions that a record matches.

        Raises:
            AmpError: The record doesn't name a caption, or contradicts the captions file.
        """
        given: dict[str, str] = {
            key: composed(check_text(record[key], f"{where}: '{key}'", "correct it").strip())
            for key in ("image", "caption")
            if key in record
        }
        if "image" in given:
            given["image"] = str(PurePosixPath(given["image"]))  # normalized like `image_path`
            if self._names is not None:
                given["image"] = self._names.find(given["image"]) or given["image"]
        if "sentid" in record:
            return self._with_id(str(check_id(record["sentid"], f"{where}: 'sentid'", "correct it")), given, where)
        if given.keys() != {"image", "caption"}:
            raise AmpError(
                f"{where}: no key identifies the caption; keys seen: {shorten(', '.join(record))}; expected 'sentid', "
                "or 'image' and 'caption'; add them"
            )
        return self._by_text.get((given["image"], given["caption"]), [])

    def _with_id(self, sentid: str, given: dict[str, str], where: str) -> list[Caption]:
        """The captions with a `sentid` that have the given image and text."""
        if sentid not in self._by_id:
            return []
        known = [self._by_id[sentid], *self._same_id.get(sentid, ())]
        if len(known) > 1 and not given:
            splits = ", ".join(dict.fromkeys(image.split for image, _ in known))
            raise AmpError(
                f"{where}: 'sentid' is {sentid}, which {len(known)} captions have (splits {splits}); expected 'image' "
                "and 'caption' too; add them"
            )
        contradictions = [self._contradiction(given, *one) for one in known]
        if all(contradictions):
            key, expected = contradictions[0]
            raise AmpError(
                f"{where}: '{key}' is {shorten(given[key])}; expected {shorten(expected)}, which sentid {sentid} has "
                "in the captions file; give the knowledge of this captions file"
            )
        return [caption for (_, caption), wrong in zip(known, contradictions, strict=True) if not wrong]

    def _contradiction(self, given: dict[str, str], image: CaptionedImage, caption: Caption) -> tuple[str, ...]:
        """The first key whose given value isn't that of a caption, and the expected value; empty if there is none."""
        expected = {"image": {composed(image.path), composed(image.name)}, "caption": {composed(caption.text)}}
        for key, value in given.items():
            relative = self._names is None and key == "image" and value.startswith("/")
            if value not in expected[key] and not (relative and any(value.endswith(f"/{n}") for n in expected[key])):
                return key, min(expected[key])
        return ()
