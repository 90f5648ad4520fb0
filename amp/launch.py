"""Processes of a command launched by `accelerate launch`, torchrun, srun or plain Python.

Training and evaluation share this module; what only training needs is in `amp.train.launch`.
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
        precision: Type of the frozen weights, `fp32`, `bf16` or `fp16`.
    """

    precision: Any


class Settings(Protocol):
    """The settings of a command that concern its processes.

    Attributes:
        model: The base model.
        mixed_precision: Autocast type, `auto`, or None to use the setting of `accelerate launch`.
        timeout_minutes: How long a process waits for the others, in minutes.
    """

    @property
    def model(self) -> BaseWeights: ...

    mixed_precision: Any
    timeout_minutes: float


def start_accelerator(settings: Settings, **more) -> Accelerator:
    """Creates the Accelerator of this process. Without a GPU, processes communicate over gloo.

    Args:
        settings: Precision and time limit.
        **more: Further arguments of `accelerate.Accelerator`.

    Raises:
        AmpError: The Accelerator sees a different number of processes than the launcher started.
    """
    cuda, world = torch.cuda.is_available(), world_of_launcher()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it had to guess
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
            f"this process sees {accelerator.num_processes} processes, but the launcher started {world}. Without "
            "a GPU, set ACCELERATE_USE_CPU=true, or DS_ACCELERATOR=cpu under DeepSpeed. Don't use --cpu"
        )
    return accelerator


def world_of_launcher() -> int:
    """Number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank_of_launcher() -> int:
    """Rank of this process, available before the Accelerator is created."""
    return int(os.environ.get("RANK", "0"))


def precision_problems(settings: Settings, deepspeed: str | None, gpu: bool) -> Iterator[str]:
    """Yields a message for each combination of weight and autocast types that doesn't work."""
    weights, autocast = settings.model.precision, precision_of(settings, gpu)
    if autocast == "fp16" and not gpu and deepspeed is None:
        yield "mixed_precision is 'fp16' and there is no GPU, expected 'bf16' or 'no' on the CPU"
    casts = deepspeed is not None and autocast == "fp16"  # DeepSpeed's fp16 mode casts all weights itself
    if {weights, autocast} == {"bf16", "fp16"} and not casts:
        yield (
            f"model.precision is {weights!r} and autocast (mixed_precision) is {autocast!r}, expected at most "
            f"one low-precision type; give --model.precision fp32, --mixed_precision no or --mixed_precision {weights}"
        )


def precision_of(settings: Settings, gpu: bool | None = None) -> str:
    """The autocast type of the settings, or else of `accelerate launch`.

    `gpu` says whether the run uses a GPU; None detects it.
    """
    if settings.mixed_precision == "auto":
        gpu = torch.cuda.is_available() if gpu is None else gpu
        return "bf16" if gpu or multiplies_bf16() else "no"
    return settings.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def multiplies_bf16() -> bool:
    """Whether the CPU has bf16 instructions (detected on Linux only).

    Without them, a matrix product takes up to sixty times as long in bf16 as in fp32 (measured in docs/performance.md).
    """
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return not words.isdisjoint(("avx512_bf16", "amx_bf16", "bf16"))
