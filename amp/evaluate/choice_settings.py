"""What a caption choice is told. Imports no torch, for ``--help``."""

from dataclasses import dataclass, field
from typing import Literal

from amp.evaluate.settings import BaseSettings, Kind


@dataclass
class ChooseSettings:
    """What is asked.

    Args:
        shards: Folder that amp make_shards wrote, for the swapped tests; null takes the one that the adapters were
            trained on.
        adapters: ``NAME=FILE`` each.
        model: The base CLIP.
        kinds: Kinds of triplets used in the swapped tests; null takes those of the adapters' training.
        tests: JSON files, or ``swapped-roles`` and ``swapped-actions``, made from the shards.
        images: Folder of the photos of JSON files.
        split: Split of the shards for the swapped tests.
        knowledge: Where knowledge of a JSON file's captions comes from: an engine of amp generate_knowledge, or
            none.
        engine_options: Of that engine, such as {model: Qwen/Qwen2.5-7B-Instruct}.
        limit: At most so many choices of each test, evenly spaced; 0 for all.
        choices_a_batch: Choices at a time.
        max_skipped_entries: Largest fraction of a test's entries that may be skipped: a caption is empty, a photo is
            missing or can't be read, and the like.
        out: CSV file.
    """

    shards: str | None = None
    adapters: list[str] = field(default_factory=list)
    model: BaseSettings = field(default_factory=BaseSettings)
    kinds: list[Kind] | None = None
    tests: list[str] = field(default_factory=lambda: ["swapped-roles", "swapped-actions"])
    images: str | None = None
    split: str = "test"
    knowledge: Literal["rules", "transformers", "openai", "vllm", "none"] = "rules"
    engine_options: dict[str, bool | int | float | str | None] = field(default_factory=dict)
    limit: int = 0
    choices_a_batch: int = 64
    max_skipped_entries: float = 0.01
    out: str = "runs/choices.csv"
