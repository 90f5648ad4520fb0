"""What a stage takes of a GPU's memory: computed from the parameters and the engine, and simulated for a step.

DeepSpeed's own estimators (estimate_zero2_model_states_mem_needs and others) count every parameter as trained, where
most of CLIP is frozen, and know neither gradients' buffers nor activations. So the sharding is computed here, and
tests/test_memory.py compares it with what DeepSpeed and DDP hold.
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
NCCL = 10**9  # assumed, not measured: buffers of the exchanges, where there are several processes
MARGIN = 0.1  # assumed: what the caching allocator loses between blocks, as a share of what it hands out
FP32 = 4
MOMENTS = 2 * FP32  # AdamW's two, a parameter


@dataclass(frozen=True)
class Zero:
    """How DeepSpeed shards what a stage trains.

    Attributes:
        stage: 1, 2 or 3.
        offload_optimizer, offload_parameters: Whether they lie in the machine's memory.
        buckets: Elements of the buffers through which gradients are exchanged.
        live: Elements of gathered parameters at a time, at most; under stage 3.
    """

    stage: int
    offload_optimizer: bool = False
    offload_parameters: bool = False
    buckets: int = 0
    live: int = 0

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "Zero":
        """Of a checked DeepSpeed file; DeepSpeed's own defaults where a key is absent."""
        zero = settings["zero_optimization"]
        stage = zero["stage"]
        copies = 1 if stage == 3 else int(zero.get("contiguous_gradients", True))
        if stage < 3 and zero.get("overlap_comm", False):  # a second one is filled while the first is under way
            copies *= 2
        optimizer, parameters = ((zero.get(key) or {}).get("device", "none") != "none" for key in OFFLOADS)
        buckets = copies * int(zero.get("reduce_bucket_size", 5e8))
        live = int(zero.get("stage3_max_live_parameters", 1e9)) if stage == 3 else 0
        return cls(stage, optimizer, parameters, buckets, live)


class Parameters(NamedTuple):
    """Parameters of a stage: elements and bytes of those that it trains and of those that are frozen."""

    trained: int
    frozen: int
    trained_bytes: int
    frozen_bytes: int

    @classmethod
    def of(cls, model: ActionAwareCLIP, stage: int) -> "Parameters":
        """Of a model in a stage; buffers count as frozen."""
        trained = set_trainable(model, stage)
        frozen = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]
        elements = [sum(x.numel() for x in part) for part in (trained, frozen)]
        return cls(elements[0], elements[1], bytes_of(trained), bytes_of(frozen))


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process, by what they are for; all on the GPU but `host`, which is in the machine's memory."""

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
        """All of it on the GPU, margin included."""
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
    """Memory of one GPU in a stage.

    Args:
        simulator: Of the run.
        stage: 1 or 2.
        world: Processes, one a GPU.
        batch_size: Images a process.
        zero: How DeepSpeed shards; None is DDP, or one process alone.
    """
    static = static_memory(Parameters.of(simulator.model, stage), world, zero)
    step = simulator.step(stage, world, batch_size)
    return Estimate(**static, step=step, overhead=CONTEXT + (NCCL if world > 1 else 0))


def static_memory(counted: Parameters, world: int, zero: Zero | None) -> dict[str, int]:
    """The part of an `Estimate` that doesn't depend on the batch, by its names."""
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
    width = trained // counted.trained  # bytes an element
    parts["buckets"] = width * zero.buckets
    # Of its share a rank also holds the weights a second time, in fp32.
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
    """The largest batch size with a `total` within `limit`, from `least` to 4 x `start`; 0 if there is none.

    Memory grows almost in proportion to the batch, so a straight line finds the place in about four looks at `total`.
    Each look simulates a step, which takes seconds; bisection would need seven.
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
