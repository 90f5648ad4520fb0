"""Whether a run may go on from a checkpoint, and with which stages."""

from dataclasses import asdict
from typing import Any

from amp.data.split import ShardSplit
from amp.errors import AmpError
from amp.train.checkpoints import Checkpoint
from amp.train.config import TrainConfig

# Settings that don't touch the result, or that are compared by their effect: batch size, accumulation and processes by
# images a step, shards by their content, the base model by the hash in the adapter file.
FREE = (
    "out", "trackers", "log_every", "validate_every", "validation", "checkpoint", "max_skipped", "timeout_minutes",
    "deepspeed", "activation_checkpointing", "compile_frozen", "stages", "gradient_accumulation", "data.batch_size",
    "data.shards", "data.workers", "data.cache", "data.val_split", "model.name", "model.pretrained",
)  # fmt: skip


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


def refuse_other_run(found: Checkpoint, config: TrainConfig, split: ShardSplit, images_a_step: int) -> None:
    """Refuses to go on with settings under which the result would be neither run's.

    Raises:
        AmpError: With each key that differs.
    """
    theirs, ours = found.state["run"], identity(config, split, images_a_step)
    other_stage = f"stage{3 - found.stage}"
    before, now = flat(theirs["settings"]), flat(ours["settings"])
    free = (*FREE, other_stage)
    differing = {
        key: (before[key], now[key])
        for key in before.keys() & now.keys()
        if before[key] != now[key] and not any(f"{key}.".startswith(f"{part}.") for part in free)
    }
    if theirs["images_a_step"] != images_a_step:
        differing["images a step (data.batch_size x processes x gradient_accumulation)"] = (
            theirs["images_a_step"], images_a_step,
        )  # fmt: skip
    if theirs["shards"] != ours["shards"]:
        differing["content of the training shards"] = (f"{len(theirs['shards'])} shards", "others")
    if differing:
        said = ", ".join(f"{key} is {a!r} there and {b!r} here" for key, (a, b) in sorted(differing.items()))
        raise AmpError(
            f"{found.folder}: was saved by a run with other settings: {said}. Give another --out, the old settings, or "
            "--checkpoint.resume false, which removes the checkpoints and starts anew"
        )


def flat(tree: dict, prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested settings as one level of scalars, which is what trackers store."""
    out: dict[str, str | int | float | bool] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return out
