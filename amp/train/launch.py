"""The Accelerator of a run, however it was launched."""

import json
import os
from pathlib import Path

import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs, LoggerType

from amp.errors import AmpError
from amp.train.config import TrainConfig


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The Accelerator of a run; on machines without an accelerator processes talk over gloo."""
    unknown = sorted(set(config.trackers) - {tracker.value for tracker in LoggerType})
    if unknown:
        raise AmpError(
            f"trackers holds {unknown}, which Accelerate {accelerate.__version__} doesn't know; expected some of "
            f"{', '.join(sorted(tracker.value for tracker in LoggerType))}"
        )
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns where it has to find that out itself
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    handlers = [] if alone or torch.cuda.is_available() else [InitProcessGroupKwargs(backend="gloo")]
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation,
        log_with=config.trackers or None,  # an empty list would make Accelerate warn
        project_dir=config.out,
        kwargs_handlers=handlers,
        deepspeed_plugin=deepspeed_plugin(config),
    )
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise AmpError(
            f"this process sees {accelerator.num_processes} processes, the launcher started {expected}. Without a GPU "
            "launch with DS_ACCELERATOR=cpu and without --cpu"
        )
    return accelerator


def deepspeed_plugin(config: TrainConfig) -> DeepSpeedPlugin | None:
    """DeepSpeed's settings with our integers filled in: its "auto" can't read a stream that Accelerate doesn't own."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() not in ("true", "1"):
        return None
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if path is None:
        raise AmpError(
            "launched with --use_deepspeed and without a DeepSpeed file; add "
            "--deepspeed_config_file ds_configs/zero2.json"
        )
    settings = json.loads(Path(path).read_text())
    world = int(os.environ.get("WORLD_SIZE", "1"))
    precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    settings |= {
        "train_micro_batch_size_per_gpu": config.data.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "train_batch_size": config.data.batch_size * config.gradient_accumulation * world,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
    }
    return DeepSpeedPlugin(hf_ds_config=settings)
