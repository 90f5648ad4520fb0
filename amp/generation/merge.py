"""Merges the replies into one file of knowledge and its provenance."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amp.data.captions.base import Caption, CaptionedImage
from amp.errors import AmpError, public_command
from amp.files import sha256_of, whole_file, write_json
from amp.generation.cache import ReplyCache
from amp.generation.foils import FOILS_VERSION
from amp.generation.ladder import Ladder, Outcome, Request
from amp.generation.prompts import readable
from amp.knowledge.schema import KNOWLEDGE_NAME, PROVENANCE_NAME
from amp.version import __version__


@dataclass
class Summary:
    """Counts of a merge.

    Attributes:
        captions: Number of captions written.
        distinct: Number of distinct captions and foils.
        triplets: Number of triplets by source. This and all following counts are over distinct captions.
        states: Number of states by source.
        empty: Number of captions without a triplet, by reason.
        foils: Number of foils of all captions, by kind.
        failed: Number of captions that lost all or some triplets because neither the model nor the rules gave a usable
            reply.
        fallback: Number of captions with a triplet or state from the rules that the model should have written.
    """

    captions: int = 0
    distinct: int = 0
    triplets: Counter = field(default_factory=Counter)
    states: Counter = field(default_factory=Counter)
    empty: Counter = field(default_factory=Counter)
    foils: Counter = field(default_factory=Counter)
    failed: int = 0
    fallback: int = 0

    def add(self, outcome: Outcome, fell_back: bool) -> None:
        """Counts one distinct caption."""
        self.distinct += 1
        self.triplets.update(source["triplet"] for source in outcome.sources)
        self.states.update(source["state"] for source in outcome.sources)
        if outcome.empty:
            self.empty[outcome.empty] += 1
        self.failed += outcome.failed
        self.fallback += fell_back

    def to_dict(self) -> dict[str, Any]:
        return {
            "captions": self.captions,
            "distinct_captions": self.distinct,
            "triplets_by_source": dict(self.triplets),
            "states_by_source": dict(self.states),
            "captions_without_triplets": dict(self.empty),
            **({"foils": {"version": FOILS_VERSION, **self.foils}} if self.foils else {}),
            "captions_failed": self.failed,
            "captions_with_fallback": self.fallback,
        }


def merge_knowledge(
    images: list[CaptionedImage],
    foils: dict[int, dict[str, str]],
    wanted: set[str],
    ladder: Ladder,
    replies: ReplyCache,
    out: Path,
    max_fallback: float,
    captions_sha256: str,
    command: list[str] | None,
) -> Summary:
    """Writes the knowledge of all captions, or nothing.

    Args:
        images: Images whose captions get one record each, in this order.
        foils: Foils by kind, by id() of the `Caption`.
        wanted: Captions and foils to write, as returned by `readable`; other captions are left out.
        ladder: The ladder of the run.
        replies: All replies of the run.
        out: Folder of both files.
        max_fallback: Maximum fraction of `wanted` that may have failed or used the rules as a fallback.
        captions_sha256: SHA-256 of the captions file or of the shards' manifest, for the provenance.
        command: Command line, for the provenance.

    Raises:
        AmpError: Captions are missing, or too many fell back.
    """
    path = out / KNOWLEDGE_NAME
    summary, missing = Summary(), {}
    times = Counter(readable(caption.text) for _, caption in _captions(images))
    times.update(text for own in foils.values() for text in own.values())
    repeated: dict[str, dict[str, Any]] = {}  # knowledge of texts that occur more than once

    def content_of(text: str) -> dict[str, Any] | None:
        content = repeated.get(text)
        if content is None:
            step = ladder.resolve(text, replies.get)
            if isinstance(step, Request):
                missing[text] = step.stage
                return None
            summary.add(step, ladder.fell_back(step))
            content = _content(step)
            if times[text] > 1:
                repeated[text] = content
        return content

    try:
        with whole_file(path, sync=True) as file:
            for image, caption in _captions(images):
                text = readable(caption.text)
                content = content_of(text) if text in wanted else None
                if content is None:
                    continue
                own = [(kind, false, content_of(false)) for kind, false in foils.get(id(caption), {}).items()]
                summary.foils.update(kind for kind, _, _ in own)
                written = [{"kind": kind, "caption": false, **_only(found)} for kind, false, found in own if found]
                record = _place(image, caption) | content | ({"foils": written} if written else {})
                summary.captions += 1
                file.write(f"{json.dumps(record, ensure_ascii=False)}\n".encode())
            _check_merge(summary, Counter(missing.values()), len(wanted), max_fallback, out)
        provenance = {
            **ladder.describe(),
            "created_by": f"open-clip-amp {__version__}",
            "captions_sha256": captions_sha256,
            **summary.to_dict(),
            "knowledge_sha256": sha256_of(path),
            "command": public_command(command) if command is not None else None,
        }
        write_json(out / PROVENANCE_NAME, provenance)
    except OSError as error:
        raise AmpError(
            f"{path}: can't be written ({error.strerror}); make room or fix the folder, then merge again; the replies "
            "are kept"
        ) from None
    return summary


def _check_merge(summary: Summary, missing: Counter, wanted: int, limit: float, out: Path) -> None:
    if missing:
        kinds = ", ".join(f"{count:,} {stage}" for stage, count in missing.items())
        raise AmpError(
            f"{out}: {missing.total():,} of {wanted:,} distinct captions aren't done ({kinds} missing in the cache); "
            "expected all; run the missing parts, or the same command without --merge"
        )
    bad = summary.failed + summary.fallback
    if bad > limit * summary.distinct:
        raise AmpError(
            f"{out}: {bad:,} of {summary.distinct:,} distinct captions ({bad / summary.distinct:.1%}) fell back to "
            f"rules ({summary.fallback:,}) or failed ({summary.failed:,}); expected at most {limit:.1%}; use a better "
            "model or prompt, or accept it with --max_fallback"
        )


def _captions(images: list[CaptionedImage]) -> Iterator[tuple[CaptionedImage, Caption]]:
    for image in images:
        for caption in image.captions:
            yield image, caption


def _place(image: CaptionedImage, caption: Caption) -> dict[str, Any]:
    return {"sentid": caption.id, "image": image.path, "caption": caption.text}


def _only(content: dict[str, Any]) -> dict[str, Any]:
    """The knowledge of a foil, without its sources."""
    return {key: content[key] for key in ("triplets", "states")}


def _content(outcome: Outcome) -> dict[str, Any]:
    content: dict[str, Any] = outcome.knowledge.to_dict()
    return content | ({"empty": outcome.empty} if outcome.empty else {"sources": list(outcome.sources)})
