"""The processes of a command, however it was launched: `accelerate launch`, torchrun, srun or plain Python.

Training and evaluation share this; what only training needs is in `amp.train.launch`.
"""

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from amp.errors import AmpError


class BaseWeights(Protocol):
    """Settings of the base model.

    Attributes:
        precision: Type of the frozen weights, ``fp32``, ``bf16`` or ``fp16``.
    """

    precision: Any


class Settings(Protocol):
    """What a command's settings say about its processes.

    Attributes:
        model: The base model.
        mixed_precision: Autocast type, ``auto``, or None for what `accelerate launch` says.
        timeout_minutes: How long a process waits for the others.
    """

    @property
    def model(self) -> BaseWeights: ...

    mixed_precision: Any
    timeout_minutes: float


def start_accelerator(settings: Settings, **more) -> Accelerator:
    """The Accelerator of this process; on machines without an accelerator processes talk over gloo.

    Args:
        settings: Precision and time limit.
        **more: Further arguments of `accelerate.Accelerator`.

    Raises:
        AmpError: Another number of processes than was launched.
    """
    cuda, world = torch.cuda.is_available(), world_of_launcher()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns where it has to find that out itself
    group = InitProcessGroupKwargs(
        backend=None if cuda else "gloo", timeout=timedelta(minutes=settings.timeout_minutes)
    )
    accelerator = Accelerator(
        mixed_precision=None if settings.mixed_precision is None else precision_of(settings),
        kwargs_handlers=[] if world == 1 else [group],
        **more,
    )
    if accelerator.num_processes != world:
        raise AmpError(
            f"this process sees {accelerator.num_processes} processes, the launcher started {world}. Without a GPU "
            "launch with ACCELERATE_USE_CPU=true, under DeepSpeed with DS_ACCELERATOR=cpu, and always without --cpu"
        )
    return accelerator


def world_of_launcher() -> int:
    """How many processes the launcher says it has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank_of_launcher() -> int:
    """Which of them this one is, also before there is an Accelerator."""
    return int(os.environ.get("RANK", "0"))


def precision_problems(settings: Settings, deepspeed: str | None, gpu: bool) -> Iterator[str]:
    """Types of weights and of autocast that don't go together, in training and in evaluation."""
    weights, autocast = settings.model.precision, precision_of(settings, gpu)
    if autocast == "fp16" and not gpu and deepspeed is None:
        yield "mixed_precision is 'fp16' and there is no GPU, expected 'bf16' or 'no' on the CPU"
    casts = deepspeed is not None and autocast == "fp16"  # DeepSpeed's fp16 casts all weights itself
    if {weights, autocast} == {"bf16", "fp16"} and not casts:
        yield (
            f"model.precision is {weights!r} and autocast (mixed_precision) is {autocast!r}, expected one low type at "
            f"most; give --model.precision fp32, --mixed_precision no or --mixed_precision {weights}"
        )


def precision_of(settings: Settings, gpu: bool | None = None) -> str:
    """The autocast type: the settings' own, or what `accelerate launch` says. `gpu`: whether it runs on one; None
    looks."""
    if settings.mixed_precision == "auto":
        gpu = torch.cuda.is_available() if gpu is None else gpu
        return "bf16" if gpu or multiplies_bf16() else "no"
    return settings.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def multiplies_bf16() -> bool:
    """Whether the processor has instructions for it (Linux). Without them a product takes up to sixty times as long as
    in fp32 (docs/performance.md names a processor and its rates)."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return not words.isdisjoint(("avx512_bf16", "amx_bf16", "bf16"))
