"""GPU memory of a training stage: computed from the parameters and the engine, and simulated for a step.

DeepSpeed's own estimators (estimate_zero2_model_states_mem_needs and others) count every parameter as trained, but
most of CLIP is frozen, and they ignore gradient buffers and activations. So the sharding is computed here, and
tests/test_memory.py compares it with the memory that DeepSpeed and DDP use.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from amp.model.clip import ActionAwareCLIP
from amp.plan.launch import OFFLOADS
from amp.plan.simulator import StepMemory, StepSimulator, bytes_of
from amp.train.stages import set_trainable

CONTEXT = 10**9  # assumed, not measured: CUDA context, and workspaces of cuBLAS and cuDNN
NCCL = 10**9  # assumed, not measured: communication buffers, with several processes
MARGIN = 0.1  # assumed: fragmentation of the caching allocator, as a fraction of the allocated memory
FP32 = 4
MOMENTS = 2 * FP32  # AdamW's two moments, in bytes per parameter


@dataclass(frozen=True)
class Zero:
    """How DeepSpeed shards the trained parameters of a stage.

    Attributes:
        stage: ZeRO stage, 1, 2 or 3.
        offload_optimizer, offload_parameters: Whether they are kept in host memory.
        buckets: Number of elements of the buffers for gradient communication.
        live: Maximum number of gathered parameter elements at a time; stage 3 only.
    """

    stage: int
    offload_optimizer: bool = False
    offload_parameters: bool = False
    buckets: int = 0
    live: int = 0

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "Zero":
        """Reads a checked DeepSpeed file; missing keys have DeepSpeed's defaults."""
        zero = settings["zero_optimization"]
        stage = zero["stage"]
        copies = 1 if stage == 3 else int(zero.get("contiguous_gradients", True))
        if stage < 3 and zero.get("overlap_comm", False):  # a second buffer is filled while the first is sent
            copies *= 2
        optimizer, parameters = ((zero.get(key) or {}).get("device", "none") != "none" for key in OFFLOADS)
        buckets = copies * int(zero.get("reduce_bucket_size", 5e8))
        live = int(zero.get("stage3_max_live_parameters", 1e9)) if stage == 3 else 0
        return cls(stage, optimizer, parameters, buckets, live)


class Parameters(NamedTuple):
    """Number of elements and bytes of the trained and of the frozen parameters of a stage."""

    trained: int
    frozen: int
    trained_bytes: int
    frozen_bytes: int

    @classmethod
    def of(cls, model: ActionAwareCLIP, stage: int) -> "Parameters":
        """Counts the parameters of a model in a stage; buffers count as frozen."""
        trained = set_trainable(model, stage)
        frozen = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]
        elements = [sum(x.numel() for x in part) for part in (trained, frozen)]
        return cls(elements[0], elements[1], bytes_of(trained), bytes_of(frozen))


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process by purpose; all on the GPU, except `host`, which is in host memory."""

    frozen: int
    trained: int
    gathered_parameters: int
    gradients: int
    buckets: int
    optimizer: int
    host: int
    step: StepMemory
    overhead: int

    @property
    def margin(self) -> int:
        return round(MARGIN * (self._counted - self.overhead))

    @property
    def total(self) -> int:
        """Total on the GPU, including the margin."""
        return self._counted + self.margin

    @property
    def _counted(self) -> int:
        return (
            self.frozen
            + self.trained
            + self.gathered_parameters
            + self.gradients
            + self.buckets
            + self.optimizer
            + self.step.batch
            + self.step.peak
            + self.overhead
        )


def estimate(simulator: StepSimulator, stage: int, world: int, batch_size: int, zero: Zero | None = None) -> Estimate:
    """Estimates the memory of one GPU in a stage.

    Args:
        simulator: Simulator of the run's training step.
        stage: Training stage, 1 or 2.
        world: Number of processes, one per GPU.
        batch_size: Images per process.
        zero: How DeepSpeed shards the parameters; None means DDP, or a single process.
    """
    static = static_memory(Parameters.of(simulator.model, stage), world, zero)
    step = simulator.step(stage, world, batch_size)
    return Estimate(**static, step=step, overhead=CONTEXT + (NCCL if world > 1 else 0))


def static_memory(counted: Parameters, world: int, zero: Zero | None) -> dict[str, int]:
    """Returns the fields of an `Estimate` that don't depend on the batch."""
    trained = counted.trained_bytes
    parts = {
        "frozen": counted.frozen_bytes,
        "trained": trained,
        "gathered_parameters": 0,
        "gradients": trained,
        "buckets": 0,
        "optimizer": MOMENTS * counted.trained,
        "host": 0,
    }
    if zero is None:
        if world > 1:  # DDP exchanges copies of the gradients
            parts["buckets"] = trained
        return parts
    width = trained // counted.trained  # bytes per element
    parts["buckets"] = width * zero.buckets
    # A rank also keeps a second copy, in fp32, of its share of the weights.
    parts["optimizer"] = (FP32 + MOMENTS) * math.ceil(counted.trained / world)
    if zero.stage >= 2:
        parts["gradients"] = math.ceil(trained / world)
    if zero.stage == 3:
        parts |= {name: math.ceil(parts[name] / world) for name in ("frozen", "trained")}
        parts["gathered_parameters"] = min(width * zero.live, counted.frozen_bytes + trained)
    moved = ["optimizer", "gradients"] if zero.offload_optimizer else []
    moved += ["frozen", "trained"] if zero.offload_parameters else []
    for name in moved:
        parts["host"] += parts[name]
        parts[name] = 0
    return parts


def largest_batch(total: Callable[[int], int], limit: float, start: int, least: int = 1) -> int:
    """Finds the largest batch size from `least` to 4 x `start` whose `total` is within `limit`; 0 if there is none.

    Memory grows almost in proportion to the batch, so linear interpolation finds the limit with about four calls of
    `total`. Each call simulates a step, which takes seconds; bisection would need seven.
    """
    seen = {size: total(size) for size in (start, 2 * start)}
    while True:
        fit, too_large = ([n for n in sorted(seen) if (seen[n] <= limit) == within] for within in (True, False))
        low, high = fit[-1] if fit else least - 1, too_large[0] if too_large else 4 * start + 1
        if high == low + 1:
            return low if fit else 0
        a, b = (low, high) if fit and too_large else sorted(seen)[-2:] if fit else sorted(seen)[:2]
        size = int(a + (limit - seen[a]) * (b - a) / (seen[b] - seen[a]))
        size = min(max(size, low + 1), high - 1)
        seen[size] = total(size)
