"""Whether a run may go on from what its folder holds, with which stages, and what the folder says of it afterwards."""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from amp.data.split import ShardSplit
from amp.errors import AmpError
from amp.model.adapter import read_adapter
from amp.train.checkpoints import ADAPTER, Checkpoint, Checkpoints
from amp.train.config import TrainConfig

# Settings that don't touch the result, or that are compared by their effect: batch size, accumulation and processes by
# images a step, shards by their content, the base model by the hash in the adapter file.
FREE = (
    "out",
    "trackers",
    "log_every",
    "validate_every",
    "validation_queries",
    "checkpoint",
    "max_skipped",
    "timeout_minutes",
    "deepspeed",
    "activation_checkpointing",
    "stages",
    "gradient_accumulation",
    "data.batch_size",
    "data.shards",
    "data.workers",
    "data.cache",
    "data.val_split",
    "model.name",
    "model.pretrained",
)
UNSAID = ("out", "checkpoint")  # of these nothing is worth saying where they differ
ANEW = "Give another --out, or --checkpoint.resume false, which removes the checkpoints and starts anew"
Differing = dict[str, tuple[Any, Any]]


def stages_left(stages: list[int], found: Checkpoint | None) -> list[int]:
    """The stages that `found`, the newest checkpoint, leaves to do."""
    if found is None:
        return stages
    return [stage for stage in stages if stage > found.stage or (stage == found.stage and not found.finished)]


def identity(config: TrainConfig, split: ShardSplit, images_a_step: int) -> dict[str, Any]:
    """What a checkpoint records of its run, as JSON values."""
    return {
        "settings": asdict(config),
        "images_a_step": images_a_step,
        "shards": [shard.sha256 for shard in split.shards],
    }


def find_checkpoint(config: TrainConfig, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint of the run's stages in its folder; None where the run starts at its first step.

    Args:
        config: Of the run.
        say: Called with the name of each damaged checkpoint.

    Raises:
        AmpError: A stage that would start at its first step has left an adapter there, which it would replace.
    """
    if not config.checkpoint.resume:
        return None
    found = Checkpoints(config.out).newest(config.stages, say)
    for stage in stages_left(config.stages, found):
        path = adapter_path(config.out, stage)
        if (found is None or found.stage < stage) and settings_of(path) is not None:
            raise AmpError(
                f"{path}: was trained by an earlier run, and {config.out} has no whole checkpoint of stage {stage} to "
                f"go on from. {ANEW}"
            )
    return found


def adapter_path(out: str | os.PathLike, stage: int) -> Path:
    """Where a stage leaves its adapter."""
    return Path(out) / f"stage{stage}" / ADAPTER


def settings_of(adapter: Path) -> dict[str, Any] | None:
    """The settings that an adapter file was trained with; None where there is no such file, or it holds none."""
    try:
        settings = read_adapter(adapter)[0].training.get("config")
    except AmpError:
        return None
    return settings if isinstance(settings, dict) else None


def refuse_other_run(found: Checkpoint, config: TrainConfig, split: ShardSplit, images_a_step: int) -> Differing:
    """Refuses to go on with settings under which the result would be neither run's.

    Returns:
        The keys of `FREE` that differ, with their values there and here.

    Raises:
        AmpError: With each other key that differs.
    """
    theirs, ours = found.state["run"], identity(config, split, images_a_step)
    other = 3 - found.stage
    free = FREE if other in theirs["settings"]["stages"] else (*FREE, f"stage{other}")
    refused, allowed = compare(theirs["settings"], ours["settings"], free)
    if theirs["images_a_step"] != images_a_step:
        refused["images a step (data.batch_size x processes x gradient_accumulation)"] = (
            theirs["images_a_step"],
            images_a_step,
        )
    if theirs["shards"] != ours["shards"]:
        refused["content of the training shards"] = (f"{len(theirs['shards'])} shards", "others")
    if refused:
        raise AmpError(
            f"{found.folder}: was saved by a run with other settings: {in_words(refused)}. Give another --out, the old "
            "settings, or --checkpoint.resume false, which removes the checkpoints and starts anew"
        )
    return allowed


def compare(theirs: dict[str, Any], ours: dict[str, Any], free: tuple[str, ...] = ()) -> tuple[Differing, Differing]:
    """The differing keys of two nested settings, without those that one of them lacks and those of `UNSAID`; the second
    part holds the keys in `free`."""
    before, now = flat(theirs), flat(ours)
    parts: tuple[Differing, Differing] = ({}, {})
    for key in sorted(before.keys() & now.keys()):
        if before[key] != now[key] and not _within(key, UNSAID):
            parts[_within(key, free)][key] = (before[key], now[key])
    return parts


def _within(key: str, groups: tuple[str, ...]) -> bool:
    return any(f"{key}.".startswith(f"{group}.") for group in groups)


def in_words(differing: Differing) -> str:
    """Such as "seed is 0 there and 1 here"."""
    return ", ".join(f"{key} is {there!r} there and {here!r} here" for key, (there, here) in differing.items())


def record(config: TrainConfig) -> tuple[bytes, Differing]:
    """Content of OUT/config.yaml: the settings of the run, and for a stage that it leaves out those that the adapter of
    this stage in its folder was trained with.

    Returns:
        YAML, and what else that adapter was trained with other settings of.
    """
    settings, differing = asdict(config), {}
    for stage in {1, 2}.difference(config.stages):
        there = settings_of(adapter_path(config.out, stage))
        if there is not None:
            differing = compare(there, settings, (*FREE, "init", "stage1", "stage2"))[0]
            key = f"stage{stage}"
            settings[key] |= {name: value for name, value in there[key].items() if name in settings[key]}
    return yaml.safe_dump(settings, sort_keys=False).encode(), differing


def flat(tree: dict, prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested settings as one level of scalars, which is what trackers store."""
    out: dict[str, str | int | float | bool] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return out
