"""Plans a run before a GPU is requested: checks whether it would start, and estimates its steps and memory.

Nothing is trained, written or downloaded, and no GPU is used. All figures are estimates; docs/plan.md explains them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from amp.data.order import BatchOrder
from amp.launch import precision_of
from amp.plan.data import Dataset, check_shards
from amp.plan.disk import check_disk
from amp.plan.findings import Finding, Findings, error, in_bytes, note, ok
from amp.plan.launch import check_checkpoints, check_deepspeed, check_launch
from amp.plan.memory import Estimate, Parameters, Zero, estimate, largest_batch
from amp.plan.model import check_init, check_model, local_model
from amp.plan.node import check_cores, check_host_memory, check_workers
from amp.plan.settings import PlanSettings
from amp.plan.simulator import StepSimulator
from amp.plan.texts import check_texts
from amp.train.config import TrainConfig
from amp.train.launch import deepspeed_file, deepspeed_settings


@dataclass(frozen=True)
class Steps:
    """How the images of a run are divided into steps.

    Attributes:
        images: Images per optimizer step, over all processes.
        epoch: Batches per process and epoch.
        left_over: Images that an epoch leaves out; different ones each epoch.
        total: Optimizer steps by stage.
    """

    images: int
    epoch: int
    left_over: int
    total: dict[int, int]

    @classmethod
    def of(cls, config: TrainConfig, images: int, world: int) -> "Steps":
        """Counts the steps as the run does.

        Raises:
            AmpError: The split is smaller than a step, or a stage has no epoch.
        """
        data, accumulation = config.data, config.gradient_accumulation
        order = BatchOrder([images], data.batch_size, 0, world, config.seed, accumulation=accumulation)
        total = {stage: config.steps(stage, order.steps // accumulation) for stage in config.stages}
        size = data.batch_size * world
        return cls(size * accumulation, order.steps, images - order.steps * size, total)


@dataclass
class Plan:
    """Results of planning a run. Attributes are None or empty if a failed check prevented their computation."""

    config: TrainConfig
    settings: PlanSettings
    findings: Findings
    zero: Zero | None = None
    data: Dataset | None = None
    steps: Steps | None = None
    parameters: dict[int, Parameters] = field(default_factory=dict)
    estimates: dict[int, Estimate] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Whether no check failed."""
        return self.findings.number("error") == 0


def make_plan(config: TrainConfig, settings: PlanSettings) -> Plan:
    """Runs all checks, and computes steps and memory of each stage."""
    plan = Plan(config, settings, Findings())
    find, world, precision, size = plan.findings, settings.world, precision_of(config, gpu=True), config.data.batch_size
    file, simulator = deepspeed_file(config), None
    find.add("launch", check_launch(config, settings.nodes, settings.gpus, precision, file))
    with find.about("DeepSpeed"):
        if file is not None:
            deepspeed = deepspeed_settings(file, config, world)
            plan.zero = Zero.of(deepspeed)
            find.add("DeepSpeed", check_deepspeed(file, deepspeed))
    known = find.add("base model", check_model(config, settings.images is not None))
    with find.about("shards"):
        plan.data = (
            Dataset.read(config)
            if settings.images is None
            else Dataset.simulate(config, settings.images, settings.captions, settings.shards)
        )
        find.add("shards", check_shards(plan.data, config, settings.verify))
        find.add("workers", check_workers(plan.data, config, world))
        find.add("cores", check_cores(plan.data, config, settings.gpus))
        with find.about("steps"):
            plan.steps = Steps.of(config, plan.data.train.images, world)
            find.add("steps", check_steps(plan.steps))
        find.add("checkpoints", check_checkpoints(plan.data, config, world))
    with find.about("prompts"):
        if known:
            local = replace(config, model=replace(config.model, name=local_model(config.model.name)))
            simulator = StepSimulator(local, precision, deepspeed=file is not None)
    if simulator is None:
        return plan
    plan.parameters = {stage: Parameters.of(simulator.model, stage) for stage in config.stages}
    if config.init:
        find.add("init", check_init(config.init, simulator.model))
    if plan.data is not None:
        find.add("texts", check_texts(plan.data, local, simulator.model.backbone.context_length))
        trained = max(part.trained for part in plan.parameters.values())
        find.add("disk", check_disk(plan.data, config, simulator.model, trained))
    if (file is None or plan.zero is not None) and world * size > 1:
        plan.estimates = {stage: estimate(simulator, stage, world, size, plan.zero) for stage in config.stages}
        find.add("GPU memory", check_memory(plan, simulator))
    if plan.data is not None:
        offloaded = max((found.host for found in plan.estimates.values()), default=0)
        find.add("node memory", check_host_memory(plan.data, config, settings.gpus, offloaded))
    return plan


def check_steps(steps: Steps) -> Iterator[Finding]:
    """Reports the number of batches per epoch, and of images that an epoch leaves out."""
    left = f"{steps.left_over:,} images, different ones each time" if steps.left_over else "no image"
    yield ok(f"{steps.epoch:,} batches per process and epoch; an epoch leaves out {left}")


def check_memory(plan: Plan, simulator: StepSimulator) -> Iterator[Finding]:
    """Checks that each stage fits in memory, and finds the batch size that would."""
    config, settings, size = plan.config, plan.settings, plan.config.data.batch_size
    for stage, found in plan.estimates.items():
        needs = f"stage {stage} needs an estimated {in_bytes(found.total)} per GPU"
        if settings.gpu_memory_gb is None:
            yield note(f"{needs}; give --plan.gpu_memory_gb N to check whether that fits")
            continue
        needs += f" of {settings.gpu_memory_gb:g} GB"
        limit = settings.gpu_memory_gb * 1e9
        total = lambda batch, stage=stage: estimate(simulator, stage, settings.world, batch, plan.zero).total  # noqa: E731
        best = largest_batch(total, limit, size, least=2 if settings.world == 1 else 1)
        if found.total <= limit:
            yield ok(f"{needs}; data.batch_size {best}{' or more' if best == 4 * size else ''} would fit as well")
            continue
        ways = [f"--data.batch_size {best}"] if best else []
        if not config.activation_checkpointing:
            simulator.model.tower.recompute = True
            less = estimate(simulator, stage, settings.world, size, plan.zero).total
            simulator.model.tower.recompute = False
            ways.append(f"--activation_checkpointing true, which needs {in_bytes(less)}")
        yield error(f"{needs}; give {' or '.join(ways) or 'a larger GPU: not even the smallest batch fits'}")
