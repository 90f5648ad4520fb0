"""The estimated memory of a step, compared with a real step measured by torch's profiler and tensor sizes."""

import json
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
from support.processes import run_ranks
from support.repository import QUIET_ENVIRONMENT, ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import amp
from amp.knowledge.text import SLOT_TOKENS
from amp.plan.memory import Parameters, Zero, estimate, largest_batch, static_memory
from amp.plan.simulator import (
    Allocations,
    SimulatedObjective,
    StepSimulator,
    bytes_of,
    empty_batch,
    shapes_only,
    tensors_of,
)
from amp.train.config import DataSettings, ModelSettings, TrainConfig
from amp.train.objective import Objective
from amp.train.schedule import adamw
from amp.train.stages import set_trainable

pytestmark = [pytest.mark.system, pytest.mark.usefixtures("fresh_accelerate")]

# Kernels allocate small tensors, which matter for a tiny model. The tolerance of a larger step is a tenth of this.
TOLERANCE = 0.02
MATH = partial(sdpa_kernel, SDPBackend.MATH)  # as in training on the CPU in bf16
MICRO_CLIP = f"local-dir:{ROOT / 'tools/scenes/micro-clip'}"


def settings(name: str, interaction: str = "aim", batch_size: int = 8, layer: int = 1, **more) -> TrainConfig:
    own = {} if interaction == "readout" else {"bottleneck": 4}
    prompt = amp.PromptConfig(interaction=interaction, interaction_options=own, depth=layer / 3, num_prompts=4)
    data = DataSettings("none", batch_size=batch_size)
    return TrainConfig(model=ModelSettings(name, None), prompt=prompt, data=data, **more)


class RealStep:
    """A training step of a real model on the CPU with Accelerate. The first call allocates gradients and moments."""

    def __init__(self, config: TrainConfig, stage: int, precision: str):
        from accelerate import Accelerator

        self.accelerator = Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=config.gradient_accumulation
        )
        self.model, _, _ = amp.create_model_and_transforms(
            config.model.name, None, precision=config.model.precision, prompt_config=config.prompt
        )
        self.model.tower.recompute = config.activation_checkpointing
        self.trained = set_trainable(self.model, stage)
        self.engine, self.optimizer = self.accelerator.prepare(self.model, adamw(self.model, 1e-3, 0.01))
        self.engine.train()
        self.objective = Objective.of(config, stage, self.model)
        size = config.data.batch_size
        self.batches = [empty_batch(self.model, config, size) for _ in range(config.gradient_accumulation)]
        rank = dist.get_rank() if dist.is_initialized() else 0
        for number, batch in enumerate(self.batches):
            for x in tensors_of(batch):
                x.copy_(torch.rand(x.shape) if x.is_floating_point() else torch.ones_like(x))
            batch.image_ids.copy_(torch.arange(size) + (rank * len(self.batches) + number) * size)
        self()
        self.optimizer.step()
        self.optimizer.optimizer.zero_grad(set_to_none=False)

    def __call__(self) -> None:
        losses = self.objective.parts(self.engine, self.batches, 0)
        for _ in self.batches:
            with self.accelerator.accumulate(self.engine):
                with self.accelerator.autocast():
                    loss = next(losses)[0]
                self.accelerator.backward(loss)


def most_allocated(function) -> tuple[int, int]:
    """Peak bytes during a call, and bytes left after it, from the records of the CPU allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    live = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak, live


@pytest.mark.parametrize(
    ("interaction", "precision", "recompute", "stage"),
    [  # pairwise: every two values of different columns occur together
        ("aim", "no", False, 1),
        ("aim", "bf16", True, 2),
        ("cat", "no", True, 1),
        ("cat", "bf16", False, 2),
        ("readout", "no", False, 2),
        ("readout", "bf16", True, 1),
    ],
)
def test_peak_of_a_step(interaction, precision, recompute, stage, clip_folder):
    config = settings(clip_folder, interaction, activation_checkpointing=recompute)
    with MATH():
        real, left = most_allocated(RealStep(config, stage, precision))
        found = StepSimulator(config, precision).step(stage, 1, config.data.batch_size)
    assert left == 0
    assert found.peak == pytest.approx(real, rel=TOLERANCE)
    assert 0 < found.kept <= found.peak


@pytest.mark.parametrize("interaction", ["aim", "readout"])
def test_peak_of_accumulated_batches(interaction, clip_folder):
    """With a readout the other micro-batches are encoded without gradients."""
    config = settings(clip_folder, interaction, gradient_accumulation=3)
    with MATH():
        real, _ = most_allocated(RealStep(config, 1, "no"))
        found = StepSimulator(config, "no").step(1, 1, 8)
    assert found.peak == pytest.approx(real, rel=TOLERANCE)


def test_peak_with_fused_attention(clip_folder):
    """No attention maps are kept, as on a GPU, for which the estimate is made."""
    config = settings(clip_folder)
    real, _ = most_allocated(RealStep(config, 1, "no"))
    simulator = StepSimulator(config, "no")
    assert simulator.step(1, 1, 8).peak == pytest.approx(real, rel=TOLERANCE)
    with MATH():
        assert simulator.step(1, 1, 8).peak > 1.02 * real


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_peak_of_a_larger_step(precision, recompute):
    """The micro CLIP of this repository with 64 images. `pytest -s` prints the figures in docs/plan.md."""
    config = settings(MICRO_CLIP, "aim", 64, 1, activation_checkpointing=recompute)
    with MATH():
        real, _ = most_allocated(RealStep(config, 1, precision))
        found = StepSimulator(config, precision).step(1, 1, 64)
    print(
        f"\n{precision}, {'recomputed' if recompute else 'kept'}: measured {real / 1e6:.1f} MB, estimated "
        f"{found.peak / 1e6:.1f} MB ({found.peak / real - 1:+.2%})"
    )
    assert found.peak == pytest.approx(real, rel=TOLERANCE / 10)


@pytest.mark.parametrize(("weights", "stage"), [("fp32", 1), ("bf16", 2)])
def test_parameters_gradients_and_moments(weights, stage, clip_folder):
    config = settings(clip_folder)
    config.model.precision = weights
    step = RealStep(config, stage, "bf16")
    found = estimate(StepSimulator(config, "bf16"), stage, 1, 8)
    frozen = [x for x in (*step.model.parameters(), *step.model.buffers()) if not x.requires_grad]
    moments = [x for state in step.optimizer.state.values() for x in state.values() if x.ndim]
    assert found.frozen == bytes_of(frozen)
    assert found.trained == bytes_of(step.trained) > 0
    assert found.gradients == bytes_of(p.grad for p in step.trained)
    assert found.optimizer == bytes_of(moments) > 0
    assert found.step.batch == bytes_of(tensors_of(step.batches[0]))
    assert found.buckets == found.gathered_parameters == found.host == 0


def two_ranks(name: str, interaction: str) -> list[tuple[int, int]]:
    """Runs in each of two processes: the peak of a step, and the memory that DDP adds for exchanging gradients."""
    config = settings(name, interaction)
    with MATH():
        step = RealStep(config, 1, "no")
        peak, _ = most_allocated(step)
    again = []
    _, buckets = most_allocated(lambda: again.append(DistributedDataParallel(step.model, init_sync=False)))
    return peak, buckets


@pytest.mark.parametrize("interaction", ["aim", "readout"])
def test_two_simulated_ranks_are_two_real_ones(interaction, clip_folder, tmp_path):
    config = settings(clip_folder, interaction)
    simulator = StepSimulator(config, "no")
    with MATH():
        found = estimate(simulator, 1, 2, 8)
        alone = simulator.step(1, 1, 8)
    for peak, buckets in run_ranks(two_ranks, tmp_path, clip_folder, interaction):
        assert found.step.peak == pytest.approx(peak, rel=TOLERANCE)
        assert found.buckets == pytest.approx(buckets, rel=0.02)
    assert alone.gathered == 0
    assert not dist.is_initialized()


def test_what_is_exchanged_grows_with_the_ranks(clip_folder):
    """`contrastive` gathers early tokens, base and text features, ids and knowledge of all ranks."""
    config = settings(clip_folder)
    simulator, world, size = StepSimulator(config, "no"), 16, 8
    k, s, d = config.prompt.max_triplets, SLOT_TOKENS, 24
    early, features = 4 * (1 + 16) * 32, 2 * 4 * d
    knowledge = k * (3 * s * (8 + 1) + 4 * d + 1)
    scored = 2 * 4 * d  # stage 1 also scores all pairs without knowledge
    found = simulator.step(1, world, size)
    assert found.gathered == world * size * (early + features + 8 + knowledge + scored)
    assert found.peak > simulator.step(1, 1, size).peak + world * size * early
    # Under autocast Accelerate converts all outputs to fp32; DeepSpeed leaves tokens and image features in bf16.
    assert StepSimulator(config, "bf16").step(1, world, size).gathered == found.gathered
    saved = world * size * (early // 2 + 2 * d + 2 * d)
    assert StepSimulator(config, "bf16", deepspeed=True).step(1, world, size).gathered == found.gathered - saved


def test_autocast_of_a_gpu_keeps_as_much(clip_folder):
    """Only the forward pass is compared: a backward pass on fake GPU tensors needs a real GPU."""
    config = settings(clip_folder)
    kept = {device: forward_on(device, config) for device in ("cpu", "cuda")}
    assert kept["cpu"] <= kept["cuda"] < 1.05 * kept["cpu"]  # GPUs compute norms in fp32


def forward_on(device: str, config: TrainConfig) -> int:
    """Bytes that a forward pass with bf16 autocast keeps on a device, without fused attention."""
    model = shapes_only(config)
    objective = SimulatedObjective(1, model.interaction)
    set_trainable(model, 1)
    before = torch.get_autocast_dtype(device)
    with FakeTensorMode(allow_non_fake_inputs=True), MATH(), torch.device(device):
        model.to_empty(device=device)
        batch = empty_batch(model, config, 8)
        with Allocations([*model.parameters(), *model.buffers(), *tensors_of(batch)]) as counted:
            try:  # torch.autocast would disable itself without a GPU
                torch.set_autocast_enabled(device, True)
                torch.set_autocast_dtype(device, torch.bfloat16)
                loss = objective(model, batch, 0)[0]
            finally:
                torch.set_autocast_enabled(device, False)
                torch.set_autocast_dtype(device, before)
                torch.clear_autocast_cache()
            assert loss.requires_grad
            return counted.live


def test_zero_shares_out_what_is_trained():
    counted = Parameters(trained=100, frozen=1000, trained_bytes=400, frozen_bytes=4000)
    whole = {
        "frozen": 4000,
        "trained": 400,
        "gathered_parameters": 0,
        "gradients": 400,
        "buckets": 0,
        "optimizer": 800,
        "host": 0,
    }
    assert static_memory(counted, 1, None) == whole
    assert static_memory(counted, 8, None) == whole | {"buckets": 400}
    # 12 bytes for each of 13 parameters: an fp32 copy of the weights, and two moments.
    one = whole | {"buckets": 40, "optimizer": 156}
    assert static_memory(counted, 8, Zero(1, buckets=10)) == one
    assert static_memory(counted, 8, Zero(2, buckets=10)) == one | {"gradients": 50}
    three = one | {"gradients": 50, "frozen": 500, "trained": 50, "gathered_parameters": 4 * 30}
    assert static_memory(counted, 8, Zero(3, buckets=10, live=30)) == three
    assert static_memory(counted, 8, Zero(3, live=10**9))["gathered_parameters"] == 4400
    offloaded = static_memory(counted, 8, Zero(2, offload_optimizer=True))
    assert offloaded["host"] == 156 + 50 and offloaded["optimizer"] == offloaded["gradients"] == 0


@pytest.mark.parametrize(
    "file, expected",
    [
        ("zero1", Zero(1, buckets=50_000_000)),
        ("zero2", Zero(2, buckets=100_000_000)),  # two buffers, for overlap_comm
        ("zero2_offload", Zero(2, offload_optimizer=True, buckets=100_000_000)),
        ("zero3", Zero(3, buckets=50_000_000, live=1_000_000_000)),
    ],
)
def test_reading_our_deepspeed_files(file, expected):
    assert Zero.of(json.loads((ROOT / f"ds_configs/{file}.json").read_text())) == expected


ZERO_SCRIPT = """
import json, sys
import torch
from amp.train.config import *
from amp.train.launch import make_accelerator
from amp.plan.simulator import bytes_of
from amp.train.schedule import adamw
from amp.train.stages import set_trainable
from amp.train.trained_state import TrainedState
import amp

name, file, out = sys.argv[1:]
prompt = amp.PromptConfig("both", "aim", {"bottleneck": 4}, 1 / 3, 4)
config = TrainConfig(model=ModelSettings(name, None), prompt=prompt, deepspeed=file, stages=[1], out=out, trackers=[],
                     data=DataSettings("none", batch_size=8), mixed_precision="bf16")
accelerator = make_accelerator(config)
model, _, _ = amp.create_model_and_transforms(name, None, prompt_config=prompt)
trained = set_trainable(model, 1)
engine, optimizer = accelerator.prepare(model, adamw(model, 1e-3, 0.01))
state = TrainedState(model, optimizer)
held = [*state._held, *(x for s in state._adam.state.values() for x in s.values() if x.ndim)]
shares = lambda ps: [p.ds_tensor if hasattr(p, "ds_tensor") else p for p in ps]
print("\\nFOUND", json.dumps({
    "optimizer": bytes_of(held), "trained": bytes_of(shares(trained)),
    "frozen": bytes_of(shares(p for p in model.parameters() if not p.requires_grad)),
    "float32": all(p.dtype == torch.float32 for p in model.parameters()),
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("file", ["zero1", "zero2", "zero3"])
def test_what_deepspeed_holds(file, clip_folder, tmp_path):
    """On two real ranks. DeepSpeed rounds partitions up, and ZeRO-3 doesn't partition small parameters."""
    script, path = tmp_path / "hold.py", ROOT / f"ds_configs/{file}.json"
    script.write_text(ZERO_SCRIPT)
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        script,
        clip_folder,
        path,
        tmp_path / "out",
    ]
    environment = QUIET_ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(
        [sys.executable, *map(str, command)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        out, said = run.communicate(timeout=500)
    finally:
        run.terminate()  # torchrun passes it on to its ranks
    lines = [line for line in out.splitlines() if line.startswith("FOUND")]
    assert len(lines) == 2, said[-2000:]
    config = settings(clip_folder)
    zero = Zero.of(json.loads(path.read_text()))
    found = estimate(StepSimulator(config, "bf16", deepspeed=True), 1, 2, 8, zero)
    for line in lines:
        real = json.loads(line.removeprefix("FOUND"))
        assert real["float32"]
        for name in ("optimizer", "trained", "frozen"):
            assert real[name] == pytest.approx(getattr(found, name), rel=0.02), name


@pytest.mark.parametrize("growth", [lambda n: 100 + 7 * n, lambda n: 100 + 7 * n + n * n // 50], ids=["line", "curve"])
def test_largest_batch(growth):
    looks = []

    def total(size: int) -> int:
        looks.append(size)
        return growth(size)

    for limit, (start, least) in product((90, 107, 121, 310, 333, 540, 10_000), ((1, 1), (2, 2), (8, 1), (32, 2))):
        looks.clear()
        fitting = [n for n in range(least, 4 * start + 1) if growth(n) <= limit]
        found = largest_batch(total, limit, start, least)
        assert found == max(fitting, default=0), (limit, start, least)
        assert len(looks) <= 7 and min(looks) >= least, (limit, start, least)


def test_fp16_under_deepspeed_casts_all_weights(clip_folder):
    config = settings(clip_folder)
    simulator = StepSimulator(config, "fp16", deepspeed=True)
    counted = Parameters.of(simulator.model, 1)
    assert counted.trained_bytes == 2 * counted.trained
    full = Parameters.of(StepSimulator(config, "fp16").model, 1)
    assert full.trained_bytes == 4 * full.trained and full.trained == counted.trained
    assert simulator.step(1, 1, 8).peak < StepSimulator(config, "no").step(1, 1, 8).peak


def test_stored_tokens_take_the_place_of_images(clip_folder):
    config = settings(clip_folder)
    config.data.cache_images, config.data.cache_dtype = True, "float16"
    images = StepSimulator(settings(clip_folder), "no").step(1, 1, 8)
    tokens = StepSimulator(config, "no").step(1, 1, 8)
    stored = 8 * (2 * (1 + 16) * 32 + 4 * 24)  # early tokens in float16, base features
    assert tokens.batch == images.batch - 8 * 4 * 3 * 32 * 32 + stored


def test_attention_as_given(clip_folder):
    """The attention backend around a call, fixed or not, doesn't change the simulated step."""
    simulator = StepSimulator(settings(clip_folder), "bf16")
    first = simulator.step(1, 4, 8)
    for around in (MATH, nullcontext):
        with around():
            again = simulator.step(1, 4, 8)
    assert again == first
