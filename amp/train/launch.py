"""The Accelerator of a training run: trackers, gradient accumulation and DeepSpeed on top of `amp.launch`."""

import os
from collections.abc import Iterator
from pathlib import Path

import accelerate
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DeepSpeedPlugin, LoggerType

from amp.errors import AmpError
from amp.json_text import parse_json
from amp.launch import precision_of, precision_problems, start_accelerator, world_of_launcher
from amp.train.config import TrainConfig


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Creates the Accelerator of a training run.

    Args:
        config: Settings of the run.

    Raises:
        AmpError: `launch_problems` or `precision_problems` found a problem, the DeepSpeed file is wrong, or the number
            of processes differs from the launcher's.
    """
    cuda, world, file = torch.cuda.is_available(), world_of_launcher(), deepspeed_file(config)
    for problem in (*launch_problems(config, world, file), *precision_problems(config, file, cuda)):
        raise AmpError(problem)
    if not cuda and file is not None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.pop("ACCELERATE_USE_CPU", None)  # with it Accelerate silently ignores DeepSpeed
        leave_inference_out()
        if precision_of(config) == "fp16" and not computes_fp16():
            raise AmpError(
                "mixed_precision is 'fp16' under DeepSpeed, and there is neither a GPU nor a processor that "
                "computes in fp16, expected 'bf16' or 'no'"
            )
    accelerator = start_accelerator(
        config,
        gradient_accumulation_steps=config.gradient_accumulation,
        log_with=config.trackers or None,  # an empty list would make Accelerate warn
        project_dir=config.out,
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_settings(file, config, world)) if file else None,
    )
    if (file is None) == (accelerator.distributed_type == DistributedType.DEEPSPEED):
        raise AmpError(
            f"Accelerate chose {accelerator.distributed_type.value}, the DeepSpeed file is {file}; launch without --cpu"
        )
    return accelerator


def leave_inference_out() -> None:
    """Stops DeepSpeed from JIT-compiling its CPU all-reduce kernel, which only tensor-parallel inference uses.

    Compiling takes a minute and needs a compiler. Training communicates over gloo either way.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def computes_fp16() -> bool:
    """Whether DeepSpeed's CPU backend supports fp16 on this processor."""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().is_fp16_supported()


def launch_problems(config: TrainConfig, world: int, deepspeed: str | None) -> Iterator[str]:
    """Yields reasons why `world` processes can't run this training. A launch stops at the first; a plan lists all."""
    known = sorted(tracker.value for tracker in LoggerType)
    unknown = sorted(set(config.trackers) - set(known))
    if unknown:
        yield (
            f"trackers holds {unknown}, which Accelerate {accelerate.__version__} doesn't know; expected some of "
            f"{', '.join(known)}"
        )
    if deepspeed and len(config.stages) > 1:
        yield (
            "stages is [1, 2] under DeepSpeed, expected one stage per launch: an engine can't change what it trains. "
            "Launch --stages '[1]', then --stages '[2]' --init OUT/stage1/adapter.safetensors"
        )
    if world * config.data.batch_size < 2:
        yield (
            "data.batch_size is 1 on one process, expected 2 or more images over all processes: both losses need "
            "negatives"
        )


def deepspeed_file(config: TrainConfig) -> str | None:
    """The DeepSpeed file of `--deepspeed`, or of `accelerate launch --use_deepspeed`; None trains without DeepSpeed."""
    if config.deepspeed is not None:
        return config.deepspeed
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() not in ("true", "1"):
        return None
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if path is None:
        raise AmpError(
            "launched with --use_deepspeed and without a DeepSpeed file; add "
            "--deepspeed_config_file ds_configs/zero2.json"
        )
    return path


def deepspeed_settings(path: str, config: TrainConfig, world: int) -> dict:
    """Reads DeepSpeed's settings and fills in the run's own values.

    DeepSpeed's "auto" can't read them from a data stream that Accelerate doesn't own.

    Raises:
        AmpError: The file is not a JSON object, its ZeRO stage is not 1 to 3, or it sets a key that the run fills in to
            another value.
    """
    try:
        settings = parse_json(Path(path).read_text())
        stage = settings["zero_optimization"]["stage"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AmpError(
            f"{path}: not a DeepSpeed file ({error!r}), expected JSON with zero_optimization.stage; copy "
            "ds_configs/zero2.json"
        ) from None
    if stage not in (1, 2, 3):
        raise AmpError(
            f"{path}: zero_optimization.stage is {stage!r}, expected 1, 2 or 3; without ZeRO, leave out the file"
        )
    precision = precision_of(config)
    filled = {
        "train_micro_batch_size_per_gpu": config.data.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "train_batch_size": config.data.batch_size * config.gradient_accumulation * world,
        "gradient_clipping": config.max_grad_norm,
        # Autocast leaves the weights in fp32, as without DeepSpeed. DeepSpeed's bf16 mode would round the temperature,
        # the gates and everything that stage 2 keeps. Gradients are not sent in bf16 either.
        "torch_autocast": {
            "enabled": precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "bf16": {"enabled": False},
        # Under autocast, DeepSpeed 0.19 clips before it unscales the loss, so fp16 uses the fp16 mode, with fp32 master
        # weights.
        "fp16": {"enabled": precision == "fp16"},
    }
    for key, value in filled.items():
        if settings.get(key, value) not in (value, "auto"):
            raise AmpError(
                f"{path}: {key} is {settings[key]}, but the run's own settings make it {value}; remove the key from "
                "the file and set data.batch_size, gradient_accumulation, max_grad_norm or mixed_precision"
            )
    return settings | filled
