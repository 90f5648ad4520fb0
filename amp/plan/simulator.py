"""A training step on tensors without memory, and how much memory it would take.

The step itself runs, with the real model and the real objective, on torch's fake tensors: they have shapes and types
but no memory. Torch's fake process group replaces the other ranks: its collectives return at once, with tensors of the
right shapes. Each storage that an operation allocates is counted until its last tensor is deleted, which is when an
allocator frees it.

`Allocations` is our own because torch.distributed._tools.MemTracker can't run this model: it registers gradient hooks
on the inputs of all modules, including those that get no gradient (torch 2.14).
"""

import logging
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

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


class StepMemory(NamedTuple):
    """Bytes of one process that depend on the batch.

    Attributes:
        batch: The batches of an optimizer step on the device.
        kept: Saved by the forward pass for the backward pass.
        peak: Maximum during both passes, including `kept`, excluding the batch, parameters and gradients.
        gathered: Sum of the tensors that collectives fill with the rows of all ranks; not all exist at the same time.
    """

    batch: int
    kept: int
    peak: int
    gathered: int


class StepSimulator:
    """Simulates a run's training step without allocating memory.

    The fake tensors are the CPU's: its fused attention saves the same tensors as a GPU's, and its autocast has nearly
    the same rules (tests/test_memory.py compares the two). No weights are read or downloaded.

    Args:
        config: Settings of the run.
        precision: `no`, `bf16` or `fp16`.
        deepspeed: Whether DeepSpeed wraps the model; for fp16 it casts all weights.

    Attributes:
        model: The model, with fake parameters.

    Raises:
        AmpError: The prompt settings don't fit the base model, or its towers are not supported.
    """

    def __init__(self, config: TrainConfig, precision: str = "no", deepspeed: bool = False):
        self.config, self.deepspeed = config, deepspeed
        cast = deepspeed and precision == "fp16"
        self.autocast = None if cast else LOW_PRECISION.get(precision)
        self.model = shapes_only(config)
        if cast:
            self.model.half()
        # The objective draws real tensors on the CPU; the mode converts them.
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.mode:
            self.model.to_empty(device="cpu")
        self.model.tower.recompute = config.activation_checkpointing

    def step(self, stage: int, world: int, batch_size: int) -> StepMemory:
        """Runs forward and backward passes of one of `world` ranks, with gradients of a previous step allocated."""
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


class SimulatedObjective(Objective):
    """Draws negatives from empty noise, since the real noise would be N x N numbers in real memory."""

    def _draw(self, cosines, forbidden, own, m, step, direction):
        return draw_negatives(cosines[own], forbidden[own], torch.empty(cosines.shape)[own], m, self.sampling_scale)


class Allocations(TorchDispatchMode):
    """Counts the bytes of storages that operations allocate while it is active, until they are freed.

    Args:
        given: Tensors that existed before and are not counted.

    Attributes:
        live, peak: Current and maximum number of bytes.
        gathered: Bytes that collectives have filled with the rows of all ranks.
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
    """Makes this process rank 0 of `world` fake ranks while the block runs; collectives leave their results unset."""
    if world == 1:
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def shapes_only(config: TrainConfig) -> ActionAwareCLIP:
    """Builds the model of a run on the meta device, without weights and tokenizer.

    Raises:
        AmpError: The configuration of a Hugging Face text tower is not on this machine, or a tower is unsupported.
    """
    refuse_unsupported_model(config.model.name, prompted=True)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # open_clip warns about missing weights
    try:
        with torch.device("meta"):
            clip = open_clip.create_model(
                config.model.name, None, load_weights=False, device="meta", pretrained_text=False
            )
    except LOADING_ERRORS as error:  # includes transformers, which reads the text tower's configuration
        raise AmpError(
            f"model {config.model.name!r}: open_clip can't build it without its weights "
            f"({reason(error)}); load it once on a machine with a network"
        ) from error
    finally:
        root.setLevel(level)
    clip = to_precision(clip, config.model.precision)
    with torch.device("meta"):
        return ActionAwareCLIP(clip, config.prompt)


def empty_batch(model: ActionAwareCLIP, config: TrainConfig, size: int) -> Batch:
    """Builds a batch of `size` images with the shapes of the stream's batches, on the current device."""
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
