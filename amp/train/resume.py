"""Decides whether a run may resume from its folder and with which stages, and records its settings there."""

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

# Settings that may differ when resuming. They don't affect the result, or are compared by their effect: batch size,
# accumulation and processes by images per step, shards by content, the base model by the hash in the adapter file.
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
    "data.cache_texts",
    "data.val_split",
    "model.name",
    "model.pretrained",
)
UNSAID = ("out", "checkpoint")  # differences in these are not reported
ANEW = "Give another --out, or --checkpoint.resume false, which removes the checkpoints and starts anew"
Differing = dict[str, tuple[Any, Any]]


def stages_left(stages: list[int], found: Checkpoint | None) -> list[int]:
    """The stages left to train after `found`, the newest checkpoint."""
    if found is None:
        return stages
    return [stage for stage in stages if stage > found.stage or (stage == found.stage and not found.finished)]


def identity(config: TrainConfig, split: ShardSplit, images_a_step: int) -> dict[str, Any]:
    """Returns the description of a run that checkpoints contain, as JSON values."""
    return {
        "settings": asdict(config),
        "images_a_step": images_a_step,
        "shards": [" ".join(dict.fromkeys([*shard.photos, shard.texts])) for shard in split.shards],
    }


def find_checkpoint(config: TrainConfig, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest complete checkpoint of the run's stages in its folder; None if the run starts at its first step.

    Args:
        config: Settings of the run.
        say: Called with a message for each damaged checkpoint.

    Raises:
        AmpError: A stage would start at its first step and replace the adapter of an earlier run.
    """
    if not config.checkpoint.resume:
        return None
    found = Checkpoints(config.out).newest(config.stages, say)
    for stage in stages_left(config.stages, found):
        path = adapter_path(config.out, stage)
        if (found is None or found.stage < stage) and settings_of(path) is not None:
            raise AmpError(
                f"{path}: was trained by an earlier run, and {config.out} has no complete checkpoint of stage {stage} "
                f"to resume from. {ANEW}"
            )
    return found


def adapter_path(out: str | os.PathLike, stage: int) -> Path:
    """Path of a stage's adapter."""
    return Path(out) / f"stage{stage}" / ADAPTER


def settings_of(adapter: Path) -> dict[str, Any] | None:
    """The settings that an adapter file was trained with; None if there is no such file, or it contains none."""
    try:
        settings = read_adapter(adapter)[0].training.get("config")
    except AmpError:
        return None
    return settings if isinstance(settings, dict) else None


def refuse_other_run(found: Checkpoint, config: TrainConfig, split: ShardSplit, images_a_step: int) -> Differing:
    """Refuses to resume with settings that would mix two different runs.

    Returns:
        The keys of `FREE` that differ, with their values in the checkpoint and now.

    Raises:
        AmpError: Other keys differ. The message lists all of them.
    """
    theirs, ours = found.state["run"], identity(config, split, images_a_step)
    other = 3 - found.stage
    free = FREE if other in theirs["settings"]["stages"] else (*FREE, f"stage{other}")
    refused, allowed = compare(theirs["settings"], ours["settings"], free)
    if theirs["images_a_step"] != images_a_step:
        refused["images per step (data.batch_size x processes x gradient_accumulation)"] = (
            theirs["images_a_step"],
            images_a_step,
        )
    if theirs["shards"] != ours["shards"]:
        refused["content of the training shards"] = (f"{len(theirs['shards'])} shards", "other shards")
    if refused:
        raise AmpError(
            f"{found.folder}: was saved by a run with other settings: {in_words(refused)}. Give another --out, the old "
            "settings, or --checkpoint.resume false, which removes the checkpoints and starts anew"
        )
    return allowed


def compare(theirs: dict[str, Any], ours: dict[str, Any], free: tuple[str, ...] = ()) -> tuple[Differing, Differing]:
    """The keys that differ between two nested settings: first those not in `free`, then those in `free`.

    Keys that one of them lacks and keys in `UNSAID` are ignored.
    """
    before, now = flat(theirs), flat(ours)
    parts: tuple[Differing, Differing] = ({}, {})
    for key in sorted(before.keys() & now.keys()):
        if before[key] != now[key] and not _within(key, UNSAID):
            parts[_within(key, free)][key] = (before[key], now[key])
    return parts


def _within(key: str, groups: tuple[str, ...]) -> bool:
    return any(f"{key}.".startswith(f"{group}.") for group in groups)


def in_words(differing: Differing) -> str:
    """Describes differences, such as "seed was 0 and is now 1"."""
    return ", ".join(f"{key} was {there!r} and is now {here!r}" for key, (there, here) in differing.items())


def record(config: TrainConfig) -> tuple[bytes, Differing]:
    """Content of OUT/config.yaml: the settings of the run.

    For a stage that the run leaves out, they are the settings of that stage's adapter in the folder.

    Returns:
        The YAML, and the other settings in which that adapter's training differed.
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
    """Flattens nested settings to one level of scalars, as trackers store them."""
    out: dict[str, str | int | float | bool] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return out
