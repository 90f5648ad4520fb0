"""Settings of a training run; every key can be set in YAML and on the command line.

Numbers marked ours are this project's: the paper's supplement with its hyper-parameters is not public.
"""

from dataclasses import dataclass, field
from typing import Literal

from amp.errors import AmpError
from amp.model.config import PromptConfig
from amp.model.interactions import interaction_class
from amp.retrieval.settings import RetrievalSettings


@dataclass
class ModelSettings:
    """The base CLIP.

    Args:
        name: As open_clip's: a model name, `local-dir:FOLDER` or `hf-hub:ORG/REPO`.
        pretrained: As open_clip's: a tag or a file; null with a schema name.
        precision: Type of the frozen weights. bf16 and fp16 halve their memory and round features; refused where
            autocast (`mixed_precision`) is of the other of the two.
        resize_mode: How photos are fitted: null is the base model's own way, `squash` keeps the borders.
    """

    name: str = "ViT-B-16-quickgelu"
    pretrained: str | None = "openai"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    resize_mode: Literal["squash", "shortest", "longest"] | None = None


@dataclass
class DataSettings:
    """The shards and how they are read.

    Args:
        shards: Folder that amp make_shards wrote.
        train_split: Split to train on.
        val_split: Split to validate on; null trains without validation.
        batch_size: Images a process and step.
        workers: Decoding processes a training process; fewer where there are fewer cores.
        augment: `none` uses the validation transform, `crop` open_clip's training transform (no flip in either).
        kinds: Kinds of triplets used; `[action]` is Table 3's "w/o attribute knowledge".
        cache: Folder for text features and frozen image features.
        cache_dtype: Type of cached features; float16 halves the space, float32 is exact.
        cache_images: Store each image's tokens before the first prompted block on disk, (F + M) x d_v numbers per
            image; needs `augment: none`.
    """

    shards: str = ""
    train_split: str = "train"
    val_split: str | None = "val"
    batch_size: int = 64
    workers: int = 4
    augment: Literal["none", "crop"] = "crop"
    kinds: list[Literal["action", "attribute"]] = field(default_factory=lambda: ["action", "attribute"])
    cache: str = "data/cache"
    cache_dtype: Literal["float32", "float16"] = "float32"
    cache_images: bool = False


@dataclass
class StageSettings:
    """One training stage.

    Args:
        epochs: Passes over the training images.
        lr: Peak learning rate (ours); warm-up is linear, then it falls to zero on a cosine.
        warmup_steps: Optimizer steps of warm-up (ours).
        weight_decay: Of AdamW, on matrices only (ours).
        max_steps: Optimizer steps at most; 0 sets no limit.
    """

    epochs: int = 10
    lr: float = 1e-3
    warmup_steps: int = 20
    weight_decay: float = 0.05
    max_steps: int = 0


@dataclass
class CheckpointSettings:
    """Checkpoints of a run, from which the same command goes on.

    Args:
        every_steps: Optimizer steps between two checkpoints; 0 saves them at the end of each epoch and stage alone, and
            when the run is asked to stop.
        keep: How many of each stage are kept.
        resume: Go on from the newest whole checkpoint in `out`; false removes checkpoints and adapters of the stages
            that start anew.
    """

    every_steps: int = 0
    keep: int = 2
    resume: bool = True


@dataclass
class TrainConfig:
    """A training run.

    Args:
        out: Folder of the run.
        model: The base CLIP.
        prompt: Architecture of the prompts.
        data: The shards.
        stages: Which stages run, in order: `[1, 2]`, `[1]` or `[2]`.
        combined: Stage 1 minimises eq. 10 + eq. 11 at once, the "combined training" of Table 5; asks for `[1]`.
        stage1: Contrastive stage (eq. 10).
        stage2: Triplet stage (eq. 11).
        init: Adapter file to start from; needed for `stages: [2]`.
        conditioning: `contrastive` scores an image under the knowledge of the text it is scored against (ours),
            `paired` under its own caption's (literal eq. 10). A control has no knowledge to condition on.
        negatives: Sampled negatives per direction for `contrastive` (ours). Of no effect with interactions that score
            all pairs, such as `readout`.
        mined_group: Images that the frozen CLIP confuses come into one batch, this many together (first-stage mining,
            ours); 1 leaves batches random.
        knowledge_dropout: Share of a caption's triplets, each with its state, that a training step leaves out at random
            (ours); a caption that loses all of them learns the null token.
        prompt_lr_factor: Learning rate of visual prompts and of the temperature, as a multiple of `lr` (ours).
        margin: Margin of the triplet loss (ours).
        mixed_precision: Autocast type; `auto` is bf16 on a GPU and on processors that have instructions for it, else
            no; null takes what `accelerate launch` says.
        gradient_accumulation: Batches of a process an optimizer step; as one large batch, but for `contrastive` with
            `aim` or `cat`, whose negatives come from one batch (docs/training.md).
        max_grad_norm: Gradients are scaled down to this norm (ours); 0 leaves them.
        activation_checkpointing: Recompute the prompted blocks in the backward pass.
        deepspeed: DeepSpeed file, such as `ds_configs/zero2.json`; null trains without, or with the file that
            `accelerate launch --use_deepspeed` names. One stage a launch.
        checkpoint: When checkpoints are saved, and whether the run goes on from one.
        max_skipped: Steps in a row that may be skipped because their loss or gradient is not finite; one more ends the
            run.
        timeout_minutes: How long a process waits for the others before it gives up.
        seed: Of order, captions, negatives and initial weights.
        trackers: Accelerate trackers, such as `[tensorboard]` or `[tensorboard, wandb]`.
        log_every: Optimizer steps between two log entries.
        validate_every: Epochs between two validations; 0 for none.
        validation_queries: Queries per direction of a validation, evenly spaced, in the whole gallery; 0 for all.
    """

    out: str = "runs/train"
    model: ModelSettings = field(default_factory=ModelSettings)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    data: DataSettings = field(default_factory=DataSettings)
    stages: list[int] = field(default_factory=lambda: [1, 2])
    combined: bool = False
    stage1: StageSettings = field(default_factory=StageSettings)
    stage2: StageSettings = field(
        default_factory=lambda: StageSettings(epochs=1, lr=1e-4, warmup_steps=5, weight_decay=0.01)
    )
    init: str | None = None
    conditioning: Literal["contrastive", "paired"] = "contrastive"
    negatives: int = 2
    mined_group: int = 1
    knowledge_dropout: float = 0.0
    prompt_lr_factor: float = 10.0
    margin: float = 0.2
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] | None = "auto"
    gradient_accumulation: int = 1
    max_grad_norm: float = 1.0
    activation_checkpointing: bool = False
    deepspeed: str | None = None
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    max_skipped: int = 10
    timeout_minutes: float = 30.0
    seed: int = 0
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    log_every: int = 10
    validate_every: int = 1
    validation_queries: int = 500

    @property
    def validation(self) -> RetrievalSettings:
        """How the validation split is searched: for recalls, with as little work as they need."""
        return RetrievalSettings(i2t=["pairwise"], max_queries=self.validation_queries, skip_decided=True)

    def stage(self, number: int) -> StageSettings:
        """Settings of stage 1 or 2."""
        return self.stage1 if number == 1 else self.stage2

    def steps(self, stage: int, steps_an_epoch: int) -> int:
        """Optimizer steps of a stage.

        Raises:
            AmpError: It has no epoch.
        """
        settings = self.stage(stage)
        if settings.epochs < 1:
            raise AmpError(
                f"stage{stage}.epochs is {settings.epochs}, expected 1 or more; leave the stage out with stages"
            )
        steps = settings.epochs * steps_an_epoch
        return min(steps, settings.max_steps) if settings.max_steps else steps

    def check(self) -> None:
        """Raises AmpError where a key is out of its range or contradicts another."""
        if not self.out:
            raise AmpError("out is empty, expected a folder; add --out FOLDER")
        if not self.data.shards:
            raise AmpError("data.shards is empty, expected a folder that amp make_shards wrote; add --data.shards DIR")
        if self.stages not in ([1], [2], [1, 2]):
            raise AmpError(f"stages is {self.stages}, expected [1], [2] or [1, 2]")
        if self.combined and self.stages != [1]:
            raise AmpError(
                f"combined is true and stages is {self.stages}, expected [1]: both losses are minimised in one stage; "
                "add --stages '[1]'"
            )
        if self.stages == [2] and not self.init:
            raise AmpError(
                "stages is [2] and init is empty, expected stage 1's adapter; add --init OUT/stage1/adapter.safetensors"
            )
        interaction_class(self.prompt)
        if self.data.cache_images and self.data.augment != "none":
            raise AmpError(
                f"data.cache_images is true and data.augment is {self.data.augment!r}, expected 'none': features of "
                "random crops can't be stored; add --data.augment none"
            )
        if not 0.0 <= self.knowledge_dropout < 1.0:
            raise AmpError(f"knowledge_dropout is {self.knowledge_dropout}, expected a number from 0, below 1")
        low = {
            "data.batch_size": (self.data.batch_size, 1),
            "data.workers": (self.data.workers, 0),
            "negatives": (self.negatives, 1),
            "mined_group": (self.mined_group, 1),
            "gradient_accumulation": (self.gradient_accumulation, 1),
            "log_every": (self.log_every, 1),
            "checkpoint.every_steps": (self.checkpoint.every_steps, 0),
            "checkpoint.keep": (self.checkpoint.keep, 1),
            "stage1.max_steps": (self.stage1.max_steps, 0),
            "stage2.max_steps": (self.stage2.max_steps, 0),
            "max_skipped": (self.max_skipped, 0),
            "timeout_minutes": (self.timeout_minutes, 0.01),
            "margin": (self.margin, 0),
            "max_grad_norm": (self.max_grad_norm, 0),
            "seed": (self.seed, 0),
            "validate_every": (self.validate_every, 0),
            "validation_queries": (self.validation_queries, 0),
            "prompt_lr_factor": (self.prompt_lr_factor, 0),
        }
        for number in (1, 2):
            stage = self.stage(number)
            for key in ("lr", "weight_decay", "warmup_steps"):
                low[f"stage{number}.{key}"] = (getattr(stage, key), 0)
        for key, (value, least) in low.items():
            if value < least:
                raise AmpError(f"{key} is {value}, expected at least {least}")
        if self.seed >= 2**32:
            raise AmpError(f"seed is {self.seed}, expected at most {2**32 - 1}")
