"""Statistics of knowledge, and the agreement of two versions."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from amp.data.captions.text_file import jsonl_objects
from amp.data.shards import ShardManifest
from amp.errors import AmpError
from amp.generation.words import stem
from amp.knowledge.schema import KNOWLEDGE_NAME, Knowledge, Triplet, parse_knowledge, parse_origin
from amp.knowledge.text import CONTEXT_TOKENS, SLOT_TOKENS, state_text


@dataclass(frozen=True, slots=True)
class Entry:
    """The knowledge of one caption.

    Attributes:
        caption: Text of the caption; "" if the file doesn't contain it.
        knowledge: Triplets and states.
        origin: `sources` and `empty` of the record, if it has them.
    """

    caption: str
    knowledge: Knowledge
    origin: dict[str, Any] = field(default_factory=dict)


def load_entries(path: Path) -> dict[str, Entry]:
    """Reads knowledge by caption id from a JSONL file, the folder that holds it, or a folder of shards.

    Raises:
        AmpError: The path is none of these, or a record has the wrong form.
    """
    if (path / KNOWLEDGE_NAME).is_file():
        path = path / KNOWLEDGE_NAME
    if path.is_dir():
        return _from_shards(ShardManifest.load(path))
    entries = {}
    for number, record in jsonl_objects(path):
        where = f"{path} line {number}"
        knowledge = parse_knowledge(record, where)
        name = str(record["sentid"]) if "sentid" in record else f"{record.get('image')}: {record.get('caption')}"
        entries[name] = Entry(str(record.get("caption", "")), knowledge, parse_origin(record, where))
    if not entries:
        raise AmpError(f"{path}: has no records; expected one JSON object per line; check the file")
    return entries


def describe(entries: Sequence[Entry], tokenize: Callable[[str], Sequence[int]]) -> dict[str, Any]:
    """Computes counts, lengths and fractions of one version.

    Args:
        entries: The knowledge of all captions.
        tokenize: Turns a text into CLIP tokens, without start and end tokens.
    """
    triplets = [triplet for entry in entries for triplet in entry.knowledge.triplets]
    states = [state for entry in entries for state in entry.knowledge.states]
    pairs = [(t, s) for entry in entries for t, s in zip(entry.knowledge.triplets, entry.knowledge.states, strict=True)]
    lengths = {
        text: len(tokenize(text)) for text in dict.fromkeys(state_text(triplet, state) for triplet, state in pairs)
    }
    prompts = np.array([lengths[state_text(triplet, state)] + 2 for triplet, state in pairs] or [0])
    slots = Counter(slot for t in triplets for slot in (t.subject, t.action, t.object) if slot)
    long_slots = sum(count for slot, count in slots.items() if len(tokenize(slot)) > SLOT_TOKENS)
    actions = [triplet for triplet in triplets if triplet.kind == "action"]
    per_caption = Counter(len(entry.knowledge.triplets) for entry in entries)
    return {
        "captions": len(entries),
        "captions with an action": _share(any(t.kind == "action" for t in e.knowledge.triplets) for e in entries),
        "captions with a triplet": _share(bool(entry.knowledge.triplets) for entry in entries),
        "triplets": len(triplets),
        "action triplets": len(actions),
        "triplets per caption": len(triplets) / len(entries),
        "captions by number of triplets": {str(number): per_caption[number] for number in sorted(per_caption)},
        "distinct actions": len({triplet.action for triplet in actions}),
        "distinct states": len(set(states)),
        "words per state": float(np.mean([len(state.split()) for state in states] or [0])),
        "tokens per state prompt, median": float(np.median(prompts)),
        "tokens per state prompt, maximum": int(prompts.max()),
        "state prompts cut at 77 tokens": float((prompts > CONTEXT_TOKENS).mean()),
        "slots longer than 5 tokens": long_slots / max(slots.total(), 1),
        "most frequent actions": dict(Counter(triplet.action for triplet in actions).most_common(20)),
        "triplets by source": dict(_sources(entries, "triplet")),
        "states by source": dict(_sources(entries, "state")),
        "reasons for no triplet": dict(Counter(entry.origin["empty"] for entry in entries if "empty" in entry.origin)),
    }


def agreement(a: dict[str, Entry], b: dict[str, Entry]) -> dict[str, Any]:
    """Compares the triplets and states of two versions, for the captions that both have.

    Triplets that differ only in endings count as equal ("jumps over" = "jumping over"). The overlap of a caption is the
    number of triplets in both versions divided by the number in either; 1 if both have none.
    """
    both = [name for name in a if name in b]
    if not both:
        raise AmpError("the two versions have no caption in common; expected knowledge of the same captions")
    overlaps, same_states = [], 0
    gained: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    for name in both:
        first, second = ({_normal(t): t for t in entries[name].knowledge.triplets} for entries in (a, b))
        union = first.keys() | second.keys()
        overlaps.append(len(first.keys() & second.keys()) / len(union) if union else 1.0)
        same_states += a[name].knowledge.states == b[name].knowledge.states
        lost.update(first[key].action for key in first.keys() - second.keys())
        gained.update(second[key].action for key in second.keys() - first.keys())
    return {
        "captions in both": len(both),
        "captions with the same triplets": float(np.mean(np.array(overlaps) == 1)),
        "mean overlap of triplets per caption": float(np.mean(overlaps)),
        "captions with the same states": same_states / len(both),
        "actions only in the first": dict(lost.most_common(10)),
        "actions only in the second": dict(gained.most_common(10)),
    }


def sample(names: Sequence[str], count: int, seed: int) -> list[str]:
    """Draws `count` caption ids at random and returns them in their original order.

    Raises:
        AmpError: `count` is negative.
    """
    if count < 0:
        raise AmpError(f"sample is {count}; expected 0 or more captions")
    chosen = set(random.Random(seed).sample(list(names), min(count, len(names))))
    return [name for name in names if name in chosen]


def _from_shards(manifest: ShardManifest) -> dict[str, Entry]:
    entries = {}
    for shard in (shard for split in manifest.splits for shard in manifest.split(split)):
        with shard.open() as reader:
            for index in range(len(reader)):
                for caption in reader.record(index)["captions"]:
                    where = f"{shard.path}: caption {caption['id']}"
                    entries[str(caption["id"])] = Entry(
                        caption["text"], parse_knowledge(caption, where), parse_origin(caption, where)
                    )
    return entries


def _sources(entries: Sequence[Entry], key: str) -> Counter:
    return Counter(source[key] for entry in entries for source in entry.origin.get("sources", ()))


def _normal(triplet: Triplet) -> tuple[str, ...]:
    slots = (triplet.subject, triplet.action, triplet.object)
    return tuple(" ".join(stem(word) for word in slot.lower().split()) for slot in slots)


def _share(flags) -> float:
    return float(np.mean(list(flags)))
