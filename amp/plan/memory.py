"""What a training step takes of a GPU's memory, estimated on a machine without one.

The step itself runs, with the real model and the real objective, on torch's fake tensors: they have shapes and types
but no memory. Torch's fake process group stands for the other ranks: its exchanges return at once, with tensors of the
right shapes. Each storage that an operation makes is counted until the last tensor on it is gone, which is when an
allocator takes it back. What doesn't depend on the batch is computed from the parameters, as the engine (DDP, or a
ZeRO stage) keeps them.
"""

import logging
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import open_clip
import torch
import torch.distributed as dist
from accelerate.utils import convert_outputs_to_fp32
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake" too
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from amp.data.stream import Batch
from amp.errors import AmpError
from amp.knowledge.tensors import KnowledgeBatch
from amp.knowledge.text import SLOT_TOKENS
from amp.model.clip import ActionAwareCLIP
from amp.model.factory import LOADING_ERRORS, LOW_PRECISION, reason, refuse_unsupported_model, to_precision
from amp.train.config import TrainConfig
from amp.train.negatives import draw_negatives
from amp.train.objective import Objective
from amp.train.stages import set_trainable

CONTEXT = 10**9  # assumed, not measured: CUDA context, and workspaces of cuBLAS and cuDNN
NCCL = 10**9  # assumed, not measured: buffers of the exchanges, where there are several processes
MARGIN = 0.1  # assumed: what the caching allocator loses between blocks, as a share of what it hands out
FP32 = 4
OFFLOADS = ("offload_optimizer", "offload_param")
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
    def of(cls, model: torch.nn.Module) -> "Parameters":
        """Of a model after `set_trainable`; buffers count as frozen."""
        trained = [p for p in model.parameters() if p.requires_grad]
        frozen = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]
        elements = [sum(x.numel() for x in part) for part in (trained, frozen)]
        return cls(elements[0], elements[1], bytes_of(trained), bytes_of(frozen))


class StepMemory(NamedTuple):
    """Bytes of one process that depend on the batch.

    Attributes:
        batch: The batches of an optimizer step on the device.
        kept: What the forward pass keeps for the backward pass.
        peak: The most that both hold at a time, `kept` included, the batch, parameters and gradients not.
        gathered: Tensors that exchanges fill with the rows of all ranks, summed up; not all are there at a time.
    """

    batch: int
    kept: int
    peak: int
    gathered: int


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


class StepSimulator:
    """Takes a run's training step without memory.

    The fake tensors are the CPU's: its fused attention keeps what a GPU's keeps, and its autocast has nearly the GPU's
    rules (tests/test_memory.py compares the two). No weights are read or downloaded.

    Args:
        config: The run.
        precision: ``no``, ``bf16`` or ``fp16``.
        deepspeed: Whether DeepSpeed wraps the model: for fp16 it casts all weights.

    Attributes:
        model: With fake parameters.

    Raises:
        AmpError: The prompt settings don't fit the base model, or its towers are not native ones.
    """

    def __init__(self, config: TrainConfig, precision: str = "no", deepspeed: bool = False):
        self.config, self.deepspeed = config, deepspeed
        cast = deepspeed and precision == "fp16"
        self.autocast = None if cast else LOW_PRECISION.get(precision)
        self.model = shapes_only(config)
        if cast:
            self.model.half()
        # Real tensors that the objective draws on the CPU become fake ones.
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.mode:
            self.model.to_empty(device="cpu")
        self.model.tower.recompute = config.activation_checkpointing

    def parameters(self, stage: int) -> Parameters:
        set_trainable(self.model, stage)
        return Parameters.of(self.model)

    def step(self, stage: int, world: int, batch_size: int) -> StepMemory:
        """Forward and backward passes of one rank among `world`, with gradients of a step before in place."""
        model, config, dtype = self.model, self.config, self.autocast
        trained = set_trainable(model, stage)
        objective = SimulatedObjective.of(config, stage, model)
        engine = model if dtype is None or self.deepspeed else convert_outputs_to_fp32(model)
        with fake_world(world), self.mode:
            batches = [empty_batch(model, config, batch_size) for _ in range(config.gradient_accumulation)]
            gradients = [torch.empty_like(parameter) for parameter in trained]
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient
            given = [x for batch in batches for x in tensors_of(batch)]
            kept = 0
            with Allocations([*model.parameters(), *model.buffers(), *gradients, *given]) as counted:
                losses = objective.parts(engine, batches, 0)
                for _ in batches:
                    with torch.autocast("cpu", dtype, enabled=dtype is not None):
                        loss = next(losses)[0]
                    kept = max(kept, counted.live)
                    loss.backward()
        model.zero_grad()
        return StepMemory(bytes_of(given), kept, counted.peak, counted.gathered)


def estimate(simulator: StepSimulator, stage: int, world: int, batch_size: int, zero: Zero | None = None) -> Estimate:
    """Memory of one GPU in a stage.

    Args:
        simulator: Of the run.
        stage: 1 or 2.
        world: Processes, one a GPU.
        batch_size: Images a process.
        zero: How DeepSpeed shards; None is DDP, or one process alone.
    """
    static = static_memory(simulator.parameters(stage), world, zero)
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

    Memory grows almost in proportion to the batch, so a straight line finds the place in a few looks at `total`.
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


class SimulatedObjective(Objective):
    """Draws negatives from noise without content: the real one is made by numpy, N x N numbers of real memory."""

    def _draw(self, cosines, forbidden, own, m, step, direction):
        return draw_negatives(cosines[own], forbidden[own], torch.empty(cosines.shape)[own], m, self.sampling_scale)


class Allocations(TorchDispatchMode):
    """Counts the bytes of storages that operations make while it is active, until nothing holds them any more.

    Args:
        given: Tensors that don't count, since they were there before.

    Attributes:
        live, peak: Bytes now, and the most there were.
        gathered: Bytes that exchanges have filled with the rows of all ranks.
    """

    def __init__(self, given: Iterable[torch.Tensor]):
        super().__init__()
        self.live = self.peak = self.gathered = 0
        self._known = WeakIdKeyDictionary((x.untyped_storage(), None) for x in given)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._count(x.untyped_storage())
        if func.namespace == "c10d" and "allgather" in func.__name__:
            self.gathered += bytes_of([args[0]])
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = None
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.live -= size


@contextmanager
def fake_world(world: int) -> Iterator[None]:
    """Inside, `torch.distributed` takes this process for rank 0 of `world`; exchanges leave their results unset."""
    if world == 1:
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def shapes_only(config: TrainConfig) -> ActionAwareCLIP:
    """The model of a run on the meta device, with neither weights nor tokenizer.

    Raises:
        AmpError: A Hugging Face text tower whose configuration is not on this machine, or an unsupported tower.
    """
    refuse_unsupported_model(config.model.name, prompted=True)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # open_clip warns of the weights that are not there
    try:
        with torch.device("meta"):
            clip = open_clip.create_model(
                config.model.name, None, load_weights=False, device="meta", pretrained_text=False
            )
    except LOADING_ERRORS as error:  # also of transformers, which reads the text tower's configuration
        raise AmpError(
            f"model {config.model.name!r}: open_clip can't build it without its weights "
            f"({reason(error)}). Load it once where there is a network"
        ) from error
    finally:
        root.setLevel(level)
    clip = to_precision(clip, config.model.precision)
    with torch.device("meta"):
        return ActionAwareCLIP(clip, config.prompt)


def empty_batch(model: ActionAwareCLIP, config: TrainConfig, size: int) -> Batch:
    """A batch as the stream gives it, of `size` images, on the current device."""
    backbone, k, s = model.backbone, model.config.max_triplets, SLOT_TOKENS
    knowledge = KnowledgeBatch(
        torch.empty(size, k, 3, s, dtype=torch.long),
        torch.empty(size, k, 3, s, dtype=torch.bool),
        torch.empty(size, k, backbone.embed_dim),
        torch.empty(size, k, dtype=torch.bool),
    )
    images, base = torch.empty(size, 3, *backbone.visual.image_size), None
    if config.data.cache_images:
        dtype = getattr(torch, config.data.cache_dtype)
        images = torch.empty(size, backbone.num_tokens, backbone.vision_width, dtype=dtype)
        base = torch.empty(size, backbone.embed_dim)
    ids = torch.empty(2, size, dtype=torch.long)
    return Batch(images, base, torch.empty(size, backbone.embed_dim), knowledge, ids[0].clone(), ids[1].clone())


def tensors_of(batch: Batch) -> list[torch.Tensor]:
    values = [*vars(batch).values(), *vars(batch.knowledge).values()]
    return [x for x in values if isinstance(x, torch.Tensor)]


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
