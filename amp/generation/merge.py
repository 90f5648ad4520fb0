"""The last step: replies to one file of knowledge and its provenance, or a refusal."""

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
from amp.generation.ladder import Ladder, Outcome, Request
from amp.generation.prompts import readable
from amp.knowledge.schema import KNOWLEDGE_NAME, PROVENANCE_NAME
from amp.version import __version__


@dataclass
class Summary:
    """Counts of a merge.

    Attributes:
        captions: Number of rows of the captions file.
        distinct: Number of different captions among them.
        triplets: Source -> number of triplets. This and all other counts are over distinct captions.
        states: Source -> number of states.
        empty: Reason -> number of captions without a triplet.
        failed: Number of captions for which neither the model nor the rules gave something usable, in whole or in part.
        fallback: Number of captions with a triplet or a state that comes from the rules although a model was asked.
    """

    captions: int = 0
    distinct: int = 0
    triplets: Counter = field(default_factory=Counter)
    states: Counter = field(default_factory=Counter)
    empty: Counter = field(default_factory=Counter)
    failed: int = 0
    fallback: int = 0

    def add(self, outcome: Outcome, asked: bool) -> None:
        """Counts one distinct caption; `asked` is whether a model was."""
        self.distinct += 1
        self.triplets.update(source["triplet"] for source in outcome.sources)
        self.states.update(source["state"] for source in outcome.sources)
        if outcome.empty:
            self.empty[outcome.empty] += 1
        self.failed += outcome.failed
        self.fallback += asked and any("rules" in source.values() for source in outcome.sources)

    def to_dict(self) -> dict[str, Any]:
        return {
            "captions": self.captions,
            "distinct_captions": self.distinct,
            "triplets_by_source": dict(self.triplets),
            "states_by_source": dict(self.states),
            "captions_without_triplets": dict(self.empty),
            "captions_failed": self.failed,
            "captions_with_fallback": self.fallback,
        }


def merge_knowledge(
    images: list[CaptionedImage],
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
        wanted: Captions, as `readable` gives them, that must be done; others are left out.
        ladder: The ladder of the run.
        replies: Replies to walk it with.
        out: Folder of both files.
        max_fallback: Largest fraction of `wanted` that may have ended with rules or nothing.
        captions_sha256: SHA-256 of the captions file or the manifest of the shards, for the provenance.
        command: Command line, for the provenance.

    Raises:
        AmpError: Naming how many captions are missing or fell back.
    """
    path = out / KNOWLEDGE_NAME
    summary, missing = Summary(), {}
    times = Counter(readable(caption.text) for _, caption in _captions(images))
    repeated: dict[str, dict[str, Any]] = {}  # what is written again later
    try:
        with whole_file(path, sync=True) as file:
            for image, caption in _captions(images):
                text = readable(caption.text)
                if text not in wanted:
                    continue
                content = repeated.get(text)
                if content is None:
                    step = ladder.resolve(text, replies.get)
                    if isinstance(step, Request):
                        missing[text] = step.stage
                        continue
                    summary.add(step, asked=ladder.engine is not None)
                    content = _content(step)
                    if times[text] > 1:
                        repeated[text] = content
                summary.captions += 1
                file.write(f"{json.dumps(_place(image, caption) | content, ensure_ascii=False)}\n".encode())
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
            f"{path}: can't be written ({error.strerror}); make room or fix the folder, and merge again: the replies "
            "are kept"
        ) from None
    return summary


def _check_merge(summary: Summary, missing: Counter, wanted: int, limit: float, out: Path) -> None:
    if missing:
        kinds = ", ".join(f"{count:,} {stage}" for stage, count in missing.items())
        raise AmpError(
            f"{out}: {missing.total():,} of {wanted:,} different captions aren't done ({kinds} missing in the cache); "
            "expected all; run the parts that are missing, or the same command without --merge"
        )
    bad = summary.failed + summary.fallback
    if bad > limit * summary.distinct:
        raise AmpError(
            f"{out}: {bad:,} of {summary.distinct:,} different captions ({bad / summary.distinct:.1%}) came down to "
            f"rules ({summary.fallback:,}) or to nothing ({summary.failed:,}); expected at most {limit:.1%}; take a "
            "better model or prompt, or accept it with --max_fallback"
        )


def _captions(images: list[CaptionedImage]) -> Iterator[tuple[CaptionedImage, Caption]]:
    for image in images:
        for caption in image.captions:
            yield image, caption


def _place(image: CaptionedImage, caption: Caption) -> dict[str, Any]:
    return {"sentid": caption.id, "image": image.path, "caption": caption.text}


def _content(outcome: Outcome) -> dict[str, Any]:
    content: dict[str, Any] = outcome.knowledge.to_dict()
    return content | ({"empty": outcome.empty} if outcome.empty else {"sources": list(outcome.sources)})
