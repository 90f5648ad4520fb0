"""Settings of amp choose. Does not import torch, so that `--help` is fast."""

from dataclasses import dataclass, field
from typing import Literal

from amp.evaluate.settings import BaseSettings, Kind


@dataclass
class ChooseSettings:
    """Settings of caption-choice tests.

    Args:
        shards: Folder written by amp make_shards, for the swapped tests; null uses the shards that the adapters were
            trained on.
        adapters: Adapters to test, each as `NAME=FILE`.
        model: The base CLIP.
        kinds: Kinds of triplets to use in the swapped tests; null uses those that the adapters were trained with.
        tests: JSON files; `swapped-roles` and `swapped-actions`, which are made from the shards; or `foils`, those in
            the shards.
        images: Folder of the photos that the JSON files name.
        split: Split of the shards for the swapped tests.
        knowledge: Engine that generates knowledge for the captions of JSON files, as in amp generate_knowledge, or
            `none` for no knowledge.
        engine_options: Options of that engine, such as {model: Qwen/Qwen2.5-7B-Instruct}.
        limit: Maximum number of choices per test, evenly spaced; 0 uses all.
        choices_a_batch: Choices per batch.
        max_skipped_entries: Largest fraction of a test's entries that may be skipped, for example because a caption is
            empty or a photo is missing or can't be read.
        out: CSV file of the results.
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
