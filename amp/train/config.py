"""Settings of a training run. Every key can be set in YAML and on the command line.

Values marked "our choice" are this project's choice: the paper's supplement with its hyper-parameters is not public.
"""

from dataclasses import dataclass, field
from typing import Literal

from amp.errors import AmpError
from amp.model.config import PromptConfig
from amp.retrieval.settings import RetrievalSettings


@dataclass
class ModelSettings:
    """The base CLIP.

    Args:
        name: Model of open_clip: a name, `local-dir:FOLDER` or `hf-hub:ORG/REPO`.
        pretrained: Weights of open_clip: a tag or a file; null for `local-dir:` and `hf-hub:` models.
        precision: Type of the frozen weights. bf16 and fp16 halve their memory but round features. They can't be
            combined with autocast (`mixed_precision`) in the other low-precision type.
        resize_mode: How photos are resized: null uses the base model's own mode, `squash` changes the aspect ratio
            instead of cropping the borders.
    """

    name: str = "ViT-B-16-quickgelu"
    pretrained: str | None = "openai"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    resize_mode: Literal["squash", "shortest", "longest"] | None = None


@dataclass
class DataSettings:
    """The shards and how they are read.

    Args:
        shards: Folder written by amp make_shards.
        train_split: Split to train on.
        val_split: Split to validate on; null disables validation.
        batch_size: Images per process and batch; an optimizer step takes `gradient_accumulation` batches.
        workers: Image-decoding workers per training process; fewer are started if there are too few cores.
        augment: `none` uses the validation transform, `crop` open_clip's training transform. Neither flips images.
        kinds: Kinds of triplets to use; `[action]` is Table 3's "w/o attribute knowledge".
        cache: Folder for cached text features and frozen image features.
        cache_texts: Encode the training texts once and store their features in `cache`. False encodes the texts of
            each batch in its training step instead, which needs no disk space and no preparation but takes longer.
        cache_dtype: Type of cached features; float16 halves the disk space, float32 is exact.
        cache_images: Cache each image's tokens before the first prompted block on disk, (F + M) x d_v numbers per
            image. Needs `augment: none`.
    """

    shards: str = ""
    train_split: str = "train"
    val_split: str | None = "val"
    batch_size: int = 64
    workers: int = 4
    augment: Literal["none", "crop"] = "crop"
    kinds: list[Literal["action", "attribute"]] = field(default_factory=lambda: ["action", "attribute"])
    cache: str = "data/cache"
    cache_texts: bool = True
    cache_dtype: Literal["float32", "float16"] = "float32"
    cache_images: bool = False


@dataclass
class StageSettings:
    """One training stage.

    Args:
        epochs: Passes over the training images.
        lr: Peak learning rate (our choice). After linear warm-up it falls to zero on a cosine.
        warmup_steps: Number of optimizer steps of warm-up (our choice).
        weight_decay: Weight decay of AdamW, applied only to matrices (our choice).
        max_steps: Maximum number of optimizer steps; 0 means no limit.
    """

    epochs: int = 10
    lr: float = 1e-3
    warmup_steps: int = 20
    weight_decay: float = 0.05
    max_steps: int = 0


@dataclass
class CheckpointSettings:
    """Checkpoints of a run, from which the same command resumes.

    Args:
        every_steps: Optimizer steps between two checkpoints. 0 saves them only at the end of each epoch and stage, and
            when a signal stops the run.
        keep: Number of checkpoints kept per stage.
        resume: Resume from the newest complete checkpoint in `out`. False starts anew and removes the checkpoints and
            adapters of the run's stages and of later ones.
    """

    every_steps: int = 0
    keep: int = 2
    resume: bool = True


@dataclass
class TrainConfig:
    """A training run.

    Args:
        out: Output folder of the run.
        model: The base CLIP.
        prompt: Architecture of the prompts.
        data: The shards and how they are read.
        stages: Stages to run, in order: `[1, 2]`, `[1]` or `[2]`.
        combined: Minimise eq. 10 + eq. 11 together in stage 1, the "combined training" of Table 5. Needs `stages: [1]`.
        stage1: Settings of the contrastive stage (eq. 10).
        stage2: Settings of the triplet stage (eq. 11).
        init: Adapter file to start from; required for `stages: [2]`.
        conditioning: `contrastive` scores an image with the knowledge of the text it is scored against (our choice),
            `paired` with its own caption's knowledge (literal eq. 10). No effect on controls, which have no knowledge.
        negatives: Sampled negatives per direction for `contrastive` (our choice). No effect with interactions that
            score all pairs, such as `readout`.
        mined_group: Number of images in a group that the frozen CLIP confuses and that is put into one batch
            (first-stage mining, our choice); 1 makes batches random.
        knowledge_dropout: Probability with which a training step drops a triplet and its state (our choice). A caption
            that loses all triplets uses the learned null token.
        prompt_lr_factor: Learning rate of visual prompts and temperature, as a multiple of `lr` (our choice).
        margin: Margin of the triplet loss (our choice).
        mixed_precision: Autocast type. `auto` is bf16 on a GPU or a CPU with bf16 instructions, otherwise no; null uses
            the setting of `accelerate launch`.
        gradient_accumulation: Batches per process and optimizer step. The result is that of one large batch, except for
            `contrastive` with `aim` or `cat`, whose negatives come from a single batch (docs/training.md).
        max_grad_norm: Maximum norm of the gradients, to which larger ones are scaled down (our choice); 0 disables
            clipping.
        activation_checkpointing: Recompute the prompted blocks in the backward pass to save memory.
        deepspeed: DeepSpeed file, such as `ds_configs/zero2.json`. null trains without DeepSpeed, or with the file that
            `accelerate launch --use_deepspeed` names. DeepSpeed trains one stage per launch.
        checkpoint: When checkpoints are saved, and whether the run resumes from one.
        max_skipped: Maximum number of consecutive steps that may be skipped because their loss or gradient is not
            finite. One more ends the run.
        timeout_minutes: Minutes that a process waits for the others before it gives up.
        seed: Random seed of the order, captions, negatives and initial weights.
        trackers: Experiment trackers of Accelerate, such as `[tensorboard]` or `[tensorboard, wandb]`.
        log_every: Optimizer steps between two log entries.
        validate_every: Epochs between two validations; 0 disables validation.
        validation_queries: Queries per direction of a validation, evenly spaced, against the whole gallery; 0 uses all.
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
        """Search settings of the validation split, which compute only what recalls need."""
        return RetrievalSettings(i2t=["pairwise"], max_queries=self.validation_queries, skip_decided=True)

    def stage(self, number: int) -> StageSettings:
        """Settings of stage 1 or 2."""
        return self.stage1 if number == 1 else self.stage2

    def steps(self, stage: int, steps_an_epoch: int) -> int:
        """Optimizer steps of a stage.

        Raises:
            AmpError: The stage has no epochs.
        """
        settings = self.stage(stage)
        if settings.epochs < 1:
            raise AmpError(f"stage{stage}.epochs is {settings.epochs}, expected 1 or more; to skip it, change stages")
        steps = settings.epochs * steps_an_epoch
        return min(steps, settings.max_steps) if settings.max_steps else steps

    def check(self) -> None:
        """Raises `AmpError` if a key is out of range or contradicts another."""
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
        if self.data.cache_images and self.data.augment != "none":
            raise AmpError(
                f"data.cache_images is true and data.augment is {self.data.augment!r}, expected 'none': features of "
                "random crops can't be stored; add --data.augment none"
            )
        if self.mined_group > 1 and not self.data.cache_texts:
            raise AmpError(
                f"mined_group is {self.mined_group} and data.cache_texts is false, expected 1 or true: mining compares "
                "the features of all captions; add --mined_group 1 or --data.cache_texts true"
            )
        if not 0.0 <= self.knowledge_dropout < 1.0:
            raise AmpError(f"knowledge_dropout is {self.knowledge_dropout}, expected a number from 0 to below 1")
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
        from amp.terminal import load_open_clip

        load_open_clip()  # the checks above do without it
        from amp.model.interactions import interaction_class

        interaction_class(self.prompt)
