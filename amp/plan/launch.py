"""Checks of the launch: processes, precision, the DeepSpeed file and existing checkpoints."""

import os
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from amp.errors import require
from amp.plan.data import Dataset
from amp.plan.findings import Finding, counted, error, note, ok, warning
from amp.train.checkpoints import Checkpoints
from amp.train.config import TrainConfig
from amp.train.launch import launch_problems, precision_problems
from amp.train.resume import find_checkpoint, refuse_other_run, stages_left

OFFLOADS = ("offload_optimizer", "offload_param")
# DeepSpeed ignores unknown top-level keys silently; https://www.deepspeed.ai/docs/config-json/
DEEPSPEED_KEYS = frozenset(
    """
    activation_checkpointing aio amp autotuning bf16 checkpoint comet comms_logger communication_data_type compile
    compression_training csv_monitor curriculum_learning data_efficiency data_types dataloader_drop_last
    disable_allgather dump_state elasticity eigenvalue flops_profiler fp16 gradient_accumulation_steps gradient_clipping
    gradient_predivide_factor graph_harvesting hybrid_engine memory_breakdown nebula optimizer
    pipeline prescale_gradients progressive_layer_drop quantize_training scheduler seq_parallel_communication_data_type
    sparse_attention sparse_gradients steps_per_print tensor_parallel tensorboard timers torch_autocast train_batch_size
    train_micro_batch_size_per_gpu use_data_before_expert_parallelism use_node_local_storage wall_clock_breakdown wandb
    weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
    """.split()  # noqa: SIM905, shorter than a list of 60 lines
)


def check_launch(
    config: TrainConfig, nodes: int, gpus: int, precision: str, deepspeed: str | None
) -> Iterator[Finding]:
    """Reports settings that training refuses at the start."""
    world = nodes * gpus
    engine = "DeepSpeed" if deepspeed else "DDP" if world > 1 else "a single process"
    types = {"no": "fp32", "fp16": "all weights in fp16" if deepspeed else "fp16 autocast", "bf16": "bf16 autocast"}
    yield ok(f"{counted(nodes, 'node')} x {counted(gpus, 'process')}, {engine}, {types[precision]}")
    if nodes > 1:
        yield note(f"{config.out} and {config.data.cache} must be the same folders on all nodes")
    if precision == "no":
        yield warning("mixed_precision is null or 'no': fp32 needs twice the memory; give --mixed_precision bf16")
    if precision == "fp16" and not deepspeed:
        yield note("fp16 autocast needs a GPU; training refuses to start without one")
    yield from map(error, launch_problems(config, world, deepspeed))
    yield from map(error, precision_problems(config, deepspeed, gpu=True))


def check_deepspeed(path: str, settings: dict[str, Any]) -> Iterator[Finding]:
    """Reports keys of a DeepSpeed file that DeepSpeed or Accelerate would reject or ignore."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise importing DeepSpeed looks for a GPU
    zero_settings = require("deepspeed.runtime.zero.config", path).DeepSpeedZeroConfig
    for key in sorted(settings.keys() & {"optimizer", "scheduler"}):
        yield error(f"{path}: {key} is given, but training creates its own; remove the key and set stage1.lr and so on")
    for key in sorted(settings.keys() - DEEPSPEED_KEYS):
        close = get_close_matches(key, DEEPSPEED_KEYS, 1)
        yield warning(
            f"{path}: DeepSpeed ignores the key {key!r}; " + (f"write {close[0]!r}" if close else "remove it")
        )
    zero = settings["zero_optimization"]
    try:
        zero_settings(**zero)
    except ValueError as problem:  # from pydantic, three lines per key
        _, key, reason, *_ = str(problem).splitlines()
        yield error(f"{path}: zero_optimization.{key}: {reason.strip()}; correct or remove the key")
        return
    yield ok(f"{path}: ZeRO stage {zero['stage']}; batch sizes, clipping and precision come from the run's settings")
    for key in OFFLOADS:
        if (zero.get(key) or {}).get("device", "none") != "none":
            yield warning(f"{path}: {key} slows down training and saves little, because CLIP is frozen; try without it")


def check_checkpoints(data: Dataset, config: TrainConfig, world: int) -> Iterator[Finding]:
    """Reports how the run would use the checkpoints in its output folder."""
    if not config.checkpoint.resume:
        checkpoints = Checkpoints(config.out)
        for name in checkpoints.names(*range(config.stages[0], 3))[-1:]:
            yield warning(
                f"{checkpoints.folder / name} and all other checkpoints will be removed: checkpoint.resume is false"
            )
        return
    damaged: list[str] = []
    found = find_checkpoint(config, damaged.append)
    yield from map(warning, damaged)
    if found is None:
        stages = " and ".join(map(str, config.stages))
        yield ok(f"{config.out} has no checkpoint of stage {stages}: the run starts at step 0")
    elif data.simulated:
        yield note(f"{found.folder}: not compared with simulated data")
    else:
        images = config.data.batch_size * world * config.gradient_accumulation
        refuse_other_run(found, config, data.splits[0], images)
        left = stages_left(config.stages, found)
        here = f"{found.folder}: stage {found.stage}, step {found.step:,} of {found.state['steps']:,}"
        yield ok(f"{here}; the run resumes from there" if left else f"{here}; the run is finished")
