"""The checks of a plan: each says whether a start would get past this point, and what to do where it would not."""

import os
import resource
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import open_clip
from huggingface_hub import try_to_load_from_cache
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

from amp.cores import usable_cores
from amp.data.order import WINDOW
from amp.data.split import MAX_OPEN, ShardSplit
from amp.data.text_features import cut_texts
from amp.errors import AmpError
from amp.files import sha256_of
from amp.knowledge.text import select, tower_texts
from amp.launch import precision_problems
from amp.model.adapter import read_adapter
from amp.model.clip import ActionAwareCLIP
from amp.model.factory import get_tokenizer, refuse_quick_gelu_mismatch, refuse_unknown_model
from amp.plan.memory import OFFLOADS
from amp.train.checkpoints import Checkpoints
from amp.train.config import TrainConfig
from amp.train.engine import open_splits
from amp.train.launch import launch_problems
from amp.train.resume import find_checkpoint, refuse_other_run, stages_left

Level = Literal["ok", "note", "warning", "error"]

CAPTIONS_AN_IMAGE = 5  # assumed of simulated data, as COCO and Flickr30K have
SHARD_IMAGES = 1_000  # likewise
TENSORS_A_BATCH = 9  # each holds a file descriptor while a batch waits for its turn
PREFETCHED = 4  # batches a worker
CAPTION_BYTES = 1_600  # measured on Flickr8k, docs/data.md
TEXT_IMAGES = 1_000  # of a split, whose texts are counted
OTHER_FILES = 100  # libraries, logs, sockets, memory-mapped features

# DeepSpeed takes an unknown top-level key without a word; https://www.deepspeed.ai/docs/config-json/
DEEPSPEED_KEYS = frozenset(
    """
    activation_checkpointing aio amp autotuning bf16 checkpoint comet comms_logger communication_data_type compile
    compression_training csv_monitor curriculum_learning data_efficiency data_types dataloader_drop_last
    disable_allgather dump_state elasticity eigenvalue flops_profiler fp16 gradient_accumulation_steps gradient_clipping
    gradient_predivide_factor graph_harvesting hybrid_engine memory_breakdown nebula optimizer
    pipeline prescale_gradients progressive_layer_drop quantize_training scheduler seq_parallel_communication_data_type
    sparse_attention sparse_gradients steps_per_print tensor_parallel tensorboard timers torch_autocast train_batch_size
    train_micro_batch_size_per_gpu use_data_before_expert_parallelism use_node_local_storage wall_clock_breakdown wandb
    weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
    """.split()  # noqa: SIM905, a list of 60 lines says no more
)


class Said(NamedTuple):
    """What a check says. A ``note`` could not be compared with anything."""

    level: Level
    text: str


class Finding(NamedTuple):
    """What a check has said, with its name."""

    level: Level
    check: str
    text: str


ok, note, warning, error = (partial(Said, level) for level in ("ok", "note", "warning", "error"))


class Findings(list[Finding]):
    """All findings of a plan, in order."""

    @contextmanager
    def about(self, check: str) -> Iterator[None]:
        """Turns an AmpError raised inside into an error of this check."""
        try:
            yield
        except AmpError as problem:
            self.append(Finding("error", check, str(problem)))

    def add(self, check: str, said: Iterable[Said]) -> bool:
        """Takes down what a check says; returns whether it said nothing of an error."""
        before = self.number("error")
        with self.about(check):
            for level, text in said:
                self.append(Finding(level, check, text))
        return self.number("error") == before

    def number(self, level: Level) -> int:
        """Findings of a level."""
        return sum(finding.level == level for finding in self)


@dataclass
class Part:
    """A split: its images, captions and shards."""

    images: int
    captions: int
    shards: int


@dataclass
class Dataset:
    """What a run reads.

    Attributes:
        train: The training split.
        val: The validation split; None where the run has none, or it is not known.
        triplets: Of a caption in the mean, as many as are used; estimated.
        splits: The open splits, training first; none where the data are simulated.
    """

    train: Part
    val: Part | None
    triplets: float
    splits: list[ShardSplit] = field(default_factory=list)

    @property
    def simulated(self) -> bool:
        return not self.splits

    @classmethod
    def simulate(cls, config: TrainConfig, images: int, captions: int | None, shards: int | None) -> "Dataset":
        """A training split of these sizes, with as much knowledge as fits."""
        captions = CAPTIONS_AN_IMAGE * images if captions is None else captions
        shards = -(-images // SHARD_IMAGES) if shards is None else shards
        return cls(Part(images, captions, shards), None, config.prompt.max_triplets)

    @classmethod
    def read(cls, config: TrainConfig) -> "Dataset":
        """The shards of a run, each indexed and one sample of it decoded.

        Raises:
            AmpError: A shard is missing, of another size, holds another number of samples, or can't be read.
        """
        splits = [split for split in open_splits(config) if split is not None]
        found, captions = 0, 0
        for split in splits:
            start = 0
            for size in split.sizes:
                split.image(start)
                for _, knowledge in split.captions(split.record(start), config.data.kinds):
                    captions += 1
                    found += len(select(knowledge, config.prompt.max_triplets))
                start += size
        parts = [Part(len(s), sum(shard.captions for shard in s.shards), len(s.shards)) for s in splits]
        return cls(parts[0], parts[1] if parts[1:] else None, found / captions, splits)


def check_launch(config: TrainConfig, nodes: int, gpus: int, precision: str, deepspeed: str | None) -> Iterator[Said]:
    """What a start refuses before it reads anything."""
    world = nodes * gpus
    engine = "DeepSpeed" if deepspeed else "DDP" if world > 1 else "alone"
    types = {"no": "fp32", "fp16": "all weights in fp16" if deepspeed else "fp16 autocast", "bf16": "bf16 autocast"}
    yield ok(f"{counted(nodes, 'node')} x {counted(gpus, 'process')}, {engine}, {types[precision]}")
    if nodes > 1:
        yield note(f"{config.out} and {config.data.cache} must be the same folders on all nodes")
    if precision == "no":
        yield warning("mixed_precision is null or 'no': fp32 takes twice as much; give --mixed_precision bf16")
    if precision == "fp16" and not deepspeed:
        yield note("fp16 autocast needs a GPU: without one the start is refused")
    yield from map(error, launch_problems(config, world, deepspeed))
    yield from map(error, precision_problems(config, deepspeed, gpu=True))


def check_shards(data: Dataset, config: TrainConfig, verify: bool) -> Iterator[Said]:
    """Whether the shards are whole; `Dataset.read` has looked into them."""
    if data.simulated:
        train = data.train
        yield note(f"simulated: {train.images:,} training images in {train.shards:,} shards; nothing was read")
        return
    if verify:
        for shard in (shard for split in data.splits for shard in split.shards):
            digest = sha256_of(shard.path)
            if digest != shard.sha256:
                raise AmpError(
                    f"{shard.path}: sha256 is {digest[:12]}, the manifest says {shard.sha256[:12]}; copy it again"
                )
    counts = " and ".join(f"{len(split.shards):,} of {split.name}" for split in data.splits)
    how = "sha256 as in the manifest" if verify else "--plan.verify true compares sha256 too"
    yield ok(f"{config.data.shards}: {counts}; sizes and indices agree, a sample of each decodes; {how}")


def check_workers(data: Dataset, config: TrainConfig, world: int) -> Iterator[Said]:
    """How the stream is shared out, and how many files that opens."""
    workers, shards = config.data.workers, data.train.shards
    readers = f"{counted(world, 'process')} x {counted(workers, 'worker')}"
    mixed = min(WINDOW, shards)
    yield ok(f"{readers} read {counted(shards, 'shard')} by index, however many there are; a batch mixes {mixed}")
    files = min(shards, MAX_OPEN) + OTHER_FILES + (min(data.val.shards, MAX_OPEN) if data.val else 0)
    files += TENSORS_A_BATCH * PREFETCHED * workers
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if data.simulated:
        yield note(f"a process opens up to {files} files; compare `ulimit -n` of the nodes")
    elif limit == resource.RLIM_INFINITY or files <= limit:
        yield ok(f"a process opens up to {files} files; `ulimit -n` allows {limit}")
    else:
        yield error(
            f"a process opens up to {files} files; `ulimit -n` allows {limit}; run `ulimit -n {2 * files}` first"
        )


def check_cores(data: Dataset, config: TrainConfig, gpus: int) -> Iterator[Said]:
    """Whether the processes of a node and their decoding workers have a core each."""
    workers = config.data.workers
    wanted, here = gpus * (workers + 1), usable_cores()
    text = f"a node wants {wanted} cores: {counted(gpus, 'process')} x (1 + {counted(workers, 'worker')})"
    if data.simulated:
        yield note(text)
    elif wanted <= here:
        yield ok(f"{text}; {here} are here")
    else:
        fewer = max(0, here // gpus - 1)
        yield warning(f"{text}; {here} are here: on such nodes decoding slows training; give --data.workers {fewer}")


def check_texts(data: Dataset, config: TrainConfig, length: int) -> Iterator[Said]:
    """How many captions and texts of their knowledge are longer than the text tower reads, of a sample of images."""
    if data.simulated:
        return
    try:
        tokenizer = get_tokenizer(config.model.name)
    except OSError as problem:  # of transformers, which has no tokenizer of this name on the machine
        yield note(f"texts are not counted: {str(problem).strip().splitlines()[0][:200]}")
        return
    texts: dict[str, list[str]] = {"captions": [], "texts of knowledge": []}
    images = 0
    for split in data.splits:
        for index in range(0, len(split), -(-len(split) // TEXT_IMAGES)):
            images += 1
            for caption, knowledge in split.captions(split.record(index), config.data.kinds):
                texts["captions"].append(caption)
                texts["texts of knowledge"] += tower_texts(
                    knowledge, config.prompt.max_triplets, config.prompt.knowledge
                )
    cut = {kind: cut_texts(found, tokenizer, length) for kind, found in texts.items()}
    counts = " and ".join(f"{cut[kind]:,} of {len(found):,} {kind}" for kind, found in texts.items() if found)
    text = f"{counts} of {counted(images, 'image')} are longer than {length} tokens"
    if any(number > 0.01 * len(texts[kind]) for kind, number in cut.items()):
        yield warning(f"{text} and are cut off there: shorten them, or take a model that reads more")
    else:
        yield ok(text)


def check_host_memory(data: Dataset, gpus: int, offloaded: int) -> Iterator[Said]:
    """What the processes of a node keep in its memory; `offloaded` is DeepSpeed's part of one process."""
    texts = CAPTION_BYTES * (data.train.captions + (data.val.captions if data.val else 0))
    wanted, here = gpus * (texts + offloaded), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    parts = f"{in_bytes(texts)} of captions and knowledge"
    if offloaded:
        parts += f" and {in_bytes(offloaded)} that DeepSpeed offloads"
    text = f"a node keeps about {in_bytes(wanted)}: {gpus} x {parts}, besides Python itself"
    if data.simulated:
        yield note(text)
    elif wanted < here:
        yield ok(f"{text}; this machine has {in_bytes(here)}")
    else:
        yield warning(f"{text}; this machine has {in_bytes(here)}: start fewer processes a node")


def check_deepspeed(path: str, settings: dict[str, Any]) -> Iterator[Said]:
    """A DeepSpeed file that `deepspeed_settings` has taken: keys that DeepSpeed or Accelerate would stumble over."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or its import looks for a GPU
    try:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    except ImportError as problem:
        raise AmpError(
            f"{path} is given, but DeepSpeed can't be imported ({problem}); pip install deepspeed"
        ) from problem
    for key in sorted(settings.keys() & {"optimizer", "scheduler"}):
        yield error(f"{path}: {key} is given, but the run brings its own; remove the key and set stage1.lr and so on")
    for key in sorted(settings.keys() - DEEPSPEED_KEYS):
        close = get_close_matches(key, DEEPSPEED_KEYS, 1)
        yield warning(
            f"{path}: DeepSpeed ignores the key {key!r}; " + (f"write {close[0]!r}" if close else "remove it")
        )
    zero = settings["zero_optimization"]
    try:
        DeepSpeedZeroConfig(**zero)
    except ValueError as problem:  # pydantic's, three lines a key
        _, key, reason, *_ = str(problem).splitlines()
        yield error(f"{path}: zero_optimization.{key}: {reason.strip()}; mend or remove the key")
        return
    yield ok(f"{path}: ZeRO stage {zero['stage']}; batch sizes, clipping and precision are the run's")
    for key in OFFLOADS:
        if (zero.get(key) or {}).get("device", "none") != "none":
            yield warning(f"{path}: {key} slows each step and saves little where CLIP is frozen; try without")


def check_model(config: TrainConfig, elsewhere: bool) -> Iterator[Said]:
    """Whether the base model is known and its weights are here, unless the run takes place `elsewhere`."""
    name, tag = config.model.name, config.model.pretrained
    refuse_quick_gelu_mismatch(name, tag)
    if name.startswith("hf-hub:"):
        yield ok(f"{name} is in the local cache, {local_model(name).removeprefix('local-dir:')}")
        return
    refuse_unknown_model(name, tag)
    if ":" in name:
        yield ok(f"{name} with its weights")
    elif tag is None:
        yield warning(f"{name} without weights: a CLIP that knows nothing; give --model.pretrained")
    elif Path(tag).is_file() or (not elsewhere and weights_in_cache(name, tag)):
        yield ok(f"{name} with weights {tag!r}, on this machine")
    elif elsewhere:
        yield note(f"{name} with weights {tag!r}, which the first start on a node downloads unless they are there")
    else:
        yield warning(
            f"{name}: weights {tag!r} are not on this machine, the first start downloads them; where nodes have no "
            f"network run python -c \"import open_clip; open_clip.create_model('{name}', '{tag}')\" before"
        )


def local_model(name: str) -> str:
    """A model name that needs no network.

    Raises:
        AmpError: A model of the Hugging Face hub that is not in the local cache.
    """
    if not name.startswith("hf-hub:"):
        return name
    repository = name.removeprefix("hf-hub:")
    found = try_to_load_from_cache(repository, "open_clip_config.json")
    if not isinstance(found, str):
        raise AmpError(
            f"model {name!r} is not on this machine, and a plan downloads nothing; run `hf download {repository}`"
        )
    return f"local-dir:{Path(found).parent}"


def weights_in_cache(name: str, tag: str) -> bool:
    """Whether open_clip would find the weights of a tag without a network."""
    known = open_clip.get_pretrained_cfg(name, tag)
    repository, file = os.path.split(known.get("hf_hub", ""))
    if repository:
        names = [file] if file else [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
        return any(isinstance(try_to_load_from_cache(repository, name), str) for name in names)
    return (Path("~/.cache/clip").expanduser() / os.path.basename(known.get("url", ""))).is_file()


def check_disk(data: Dataset, config: TrainConfig, model: ActionAwareCLIP, trained: int) -> Iterator[Said]:
    """Whether what a run leaves behind has room; `trained` is the number of parameters of its largest stage."""
    backbone, prompt = model.backbone, config.prompt
    adapter = 4 * sum(value.numel() for value in model.adapter_state().values())
    checkpoint, count = adapter + 8 * trained, len(config.stages) * config.checkpoint.keep + 1
    number = 2 if config.data.cache_dtype == "float16" else 4
    base, early = 4 * backbone.embed_dim, number * backbone.num_tokens * backbone.vision_width
    parts = [part for part in (data.train, data.val) if part is not None]
    texts = sum(part.captions for part in parts) * (1 + (data.triplets if prompt.reads_states else 0))
    cached = {"texts": texts * (number * backbone.embed_dim + 8)}
    if data.val is not None:
        cached["validation images"] = data.val.images * (base + early)
    if config.data.cache_images:
        cached["training images"] = data.train.images * (base + early)
    elif config.mined_group > 1:
        cached["training images"] = data.train.images * base
    wanted = {config.out: count * checkpoint + 2 * adapter, config.data.cache: sum(cached.values())}
    said = {
        config.out: f"{count} checkpoints of {in_bytes(checkpoint)}, one of them being written, and the adapters",
        config.data.cache: "at most; " + ", ".join(f"{what} {in_bytes(size)}" for what, size in cached.items()),
    }
    for path, size in wanted.items():
        text = f"{path}: {in_bytes(size)} ({said[path]})"
        if data.simulated:
            yield note(text)
            continue
        place = existing(path)
        shared = [other for other in wanted if existing(other).stat().st_dev == place.stat().st_dev]
        free, needed = shutil.disk_usage(place).free, sum(wanted[other] for other in shared)
        text += f"; {in_bytes(free)} are free" + (f" for {' and '.join(shared)}" if len(shared) > 1 else "")
        if free >= needed:
            yield ok(text)
        elif Path(config.data.cache).exists() and free >= wanted[config.out]:
            yield warning(f"{text}; enough only if most of the cache is there already, else make room")
        else:
            yield error(f"{text}; make room, or give another --out or --data.cache")
    if data.simulated and config.data.val_split and config.validate_every:
        yield note(f"{config.data.cache}: {in_bytes(base + early)} more for each validation image")


def existing(path: str) -> Path:
    """The nearest folder above a path that is there."""
    absolute = Path(path).absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.exists())


def check_init(path: str, model: ActionAwareCLIP) -> Iterator[Said]:
    """Whether `init` belongs to the model's settings; the base model's weights are compared at the start."""
    header, weights = read_adapter(path)
    theirs, ours = asdict(header.prompt_config), asdict(model.config)
    said = [f"{key} is {theirs[key]!r} there and {ours[key]!r} here" for key in ours if theirs[key] != ours[key]]
    if header.quick_gelu != model.backbone.quick_gelu:
        said.append(f"its base model, {header.base_name}, has quick_gelu={header.quick_gelu}")
    expected = {name: value.shape for name, value in model.adapter_state().items()}
    if not said and expected != {name: value.shape for name, value in weights.items()}:
        said.append(f"weights have other names or shapes: its base model is {header.base_name}")
    if said:
        raise AmpError(f"{path}: {'; '.join(said)}; build the run with the file's settings, or give another --init")
    yield ok(f"{path}: fits the prompt settings; trained on {header.base_name}, weights are compared at the start")


def check_checkpoints(data: Dataset, config: TrainConfig, world: int) -> Iterator[Said]:
    """What the run would do with the checkpoints in its folder."""
    if not config.checkpoint.resume:
        checkpoints = Checkpoints(config.out)
        for name in checkpoints.names(*range(config.stages[0], 3))[-1:]:
            yield warning(f"{checkpoints.folder / name} and all others are removed: checkpoint.resume is false")
        return
    damaged: list[str] = []
    found = find_checkpoint(config, damaged.append)
    yield from map(warning, damaged)
    if found is None:
        stages = " and ".join(map(str, config.stages))
        yield ok(f"{config.out} has no checkpoint of stage {stages}: the run starts at step 0")
    elif data.simulated:
        yield note(f"{found.folder}: not compared with simulated data")
    else:
        images = config.data.batch_size * world * config.gradient_accumulation
        refuse_other_run(found, config, data.splits[0], images)
        left = stages_left(config.stages, found)
        here = f"{found.folder}: stage {found.stage}, step {found.step:,} of {found.state['steps']:,}"
        yield ok(f"{here}; the run goes on from there" if left else f"{here}; the run is finished")


def in_bytes(size: float) -> str:
    """A size in GB of 10^9 bytes or in MB of 10^6, to three digits."""
    number, unit = (size / 1e9, "GB") if size >= 1e9 else (size / 1e6, "MB")
    return f"{number:,.{2 if number < 10 else 1 if number < 100 else 0}f} {unit}"


def counted(number: int, word: str) -> str:
    """Such as "1 process" and "1,024 processes"."""
    plural = "es" if word.endswith("s") else "s"
    return f"{number:,} {word}{'' if number == 1 else plural}"
