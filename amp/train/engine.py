"""A training run: data once, then one engine a stage, with validation, logs and adapter checkpoints."""

import math
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn.attention import SDPBackend, sdpa_kernel

from amp.checkpoint import load_adapter, save_adapter
from amp.data.frozen_features import FrozenFeatures
from amp.data.order import BatchOrder
from amp.data.prepare import knowledge_collator, prepare_images, prepare_texts
from amp.data.split import ShardSplit
from amp.data.stream import TrainingSamples, training_loader
from amp.errors import AmpError
from amp.factory import create_model_and_transforms
from amp.model import ActionAwareCLIP
from amp.retrieval.evaluate import Retrieval, SplitCaptions
from amp.terminal import Terminal
from amp.train.config import StageSettings, TrainConfig
from amp.train.launch import make_accelerator
from amp.train.mining import confusable
from amp.train.objective import Objective
from amp.train.schedule import adamw, learning_rate
from amp.train.stages import set_trainable

ADAPTER = "adapter.safetensors"
NEIGHBOURS = 20  # as many as the first stage hands to re-ranking


def train(config: TrainConfig) -> Path:
    """Runs the stages of a configuration.

    Returns:
        The adapter file of the last stage.

    Raises:
        AmpError: Wrong input, before anything is trained.
    """
    config.check()
    accelerator = make_accelerator(config)
    if accelerator.state.deepspeed_plugin is not None and len(config.stages) > 1:
        raise AmpError(
            "stages is [1, 2] under DeepSpeed, expected one stage a launch: an engine can't change what it trains. "
            "Launch --stages '[1]', then --stages '[2]' --init OUT/stage1/adapter.safetensors"
        )
    set_seed(config.seed)
    # Opened before the model is built, which may mean a download: a wrong folder shows at once.
    splits = open_splits(config)
    model, preprocess_train, preprocess_val = create_model_and_transforms(
        config.model.name,
        config.model.pretrained,
        precision=config.model.precision,
        device=accelerator.device,
        prompt_config=config.prompt,
        image_resize_mode=config.model.resize_mode,
    )
    if config.init:
        load_adapter(config.init, model)
    model.activation_checkpointing = config.activation_checkpointing
    out = Path(config.out)
    run = Run(config, accelerator, model, Terminal(accelerator.is_main_process), out)
    run.prepare_data(*splits, preprocess_train, preprocess_val)
    if accelerator.is_main_process:
        accelerator.init_trackers("open-clip-amp", config=flat(asdict(config)))
    for stage in config.stages:
        adapter = run.stage(stage, config.stage1 if stage == 1 else config.stage2)
    accelerator.end_training()
    return adapter


class Run:
    """What the stages of a run share."""

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, model: ActionAwareCLIP, terminal: Terminal, out: Path
    ):
        self.config, self.accelerator, self.model, self.terminal, self.out = config, accelerator, model, terminal, out
        self.step = 0  # of all stages, for the trackers

    def prepare_data(self, split: ShardSplit, val_split: ShardSplit | None, preprocess_train, preprocess_val) -> None:
        """Opens the splits, encodes their texts once, and stores frozen image features where asked."""
        config, data, model, accelerator = self.config, self.config.data, self.model, self.accelerator
        self.split = split
        images = data.batch_size * accelerator.num_processes
        if images < 2:
            raise AmpError(
                f"data.batch_size is {data.batch_size} on {accelerator.num_processes} process, expected 2 or "
                "more images over all processes: both losses need negatives"
            )
        self.collate = knowledge_collator(model, data.cache, data.cache_dtype)
        captions = SplitCaptions.read(self.split, data.kinds)
        val_captions = None
        if val_split is not None:
            val_captions = SplitCaptions.read(val_split, data.kinds, config.validation.captions_per_image)
        prompt = config.prompt
        texts = [
            text
            for part in (captions, val_captions)
            if part is not None
            for text in part.all_texts(prompt.max_triplets, prompt.knowledge)
        ]
        prepare_texts(accelerator, self.terminal, self.collate.store, model, texts)
        preprocess = preprocess_val if data.augment == "none" else preprocess_train
        mined = config.mined_group > 1
        frozen = (
            self.images(self.split, preprocess_val, tokens=data.cache_images) if data.cache_images or mined else None
        )
        neighbours = None
        if mined:
            text = torch.from_numpy(self.collate.store.lookup(captions.texts))
            base = torch.from_numpy(np.array(frozen.base))
            device = accelerator.device
            neighbours = confusable(base.to(device), text.to(device), captions.image.to(device), NEIGHBOURS).numpy()
        self.order = BatchOrder(
            self.split.sizes, data.batch_size, accelerator.process_index, accelerator.num_processes, config.seed,
            data.shuffle_window, neighbours, config.mined_group,
        )  # fmt: skip
        if not data.cache_images:
            frozen = None
        samples = TrainingSamples(self.split, preprocess, config.seed, data.kinds, frozen)
        self.loader = training_loader(
            samples, self.order, self.collate, data.workers, pin_memory=accelerator.device.type == "cuda"
        )
        self.retrieval = None
        if val_split is not None:
            features = self.images(val_split, preprocess_val)
            self.retrieval = Retrieval(val_captions, features, self.collate, config.validation, accelerator.device)
        self.terminal.say(
            f"{len(self.split):,} training images, {len(captions.texts):,} captions, {self.order.steps:,} steps of "
            f"{data.batch_size} x {accelerator.num_processes} an epoch"
        )

    def images(self, split: ShardSplit, preprocess, tokens: bool = True) -> FrozenFeatures:
        data = self.config.data
        return prepare_images(self.accelerator, self.terminal, split, self.model, preprocess, data.cache,
                              data.cache_dtype, data.batch_size, data.workers, tokens)  # fmt: skip

    def stage(self, stage: int, settings: StageSettings) -> Path:
        """Trains one stage and writes its adapter."""
        config, accelerator = self.config, self.accelerator
        set_trainable(self.model, stage)
        optimizer = adamw(self.model, settings.lr, settings.weight_decay, settings.prompt_lr)
        objective = Objective(
            stage, config.conditioning, config.negatives, config.margin,
            float(self.model.backbone.clip.logit_scale.detach().exp()), config.seed,
            config.knowledge_share, config.knowledge_dropout, config.combined, config.prompt.interaction == "readout",
        )  # fmt: skip
        engine, optimizer = accelerator.prepare(self.model, optimizer)
        engine.train()
        total = settings.epochs * self.order.steps // config.gradient_accumulation
        total = min(total, settings.max_steps) if settings.max_steps else total
        if total == 0:
            raise AmpError(f"stage {stage} has no optimizer step: {settings.epochs} epochs of {self.order.steps} "
                           f"batches, {config.gradient_accumulation} a step. Give more epochs")  # fmt: skip
        images_a_step = config.data.batch_size * accelerator.num_processes * config.gradient_accumulation
        # On the CPU the backward pass of fused attention leaves the processor's bf16 units idle.
        attention = partial(sdpa_kernel, SDPBackend.MATH) if accelerator.device.type == "cpu" else nullcontext
        step = batches = 0
        with self.terminal.training(stage, total, images_a_step) as show:
            for epoch in range(math.ceil(total * config.gradient_accumulation / self.order.steps)):
                self.order.set_epoch(epoch)
                for batch in self.loader:
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate(step, total, settings.warmup_steps, group["peak"])
                    with accelerator.accumulate(engine), attention():
                        with accelerator.autocast():
                            loss, scale = objective(engine, batch.to(accelerator.device), batches)
                        accelerator.backward(loss)
                        if accelerator.sync_gradients and config.max_grad_norm:
                            accelerator.clip_grad_norm_(engine.parameters(), config.max_grad_norm)
                        optimizer.step()
                        optimizer.zero_grad()
                    batches += 1
                    if not accelerator.sync_gradients:
                        continue
                    step += 1
                    self.step += 1
                    if step % config.log_every == 0 or step == total or step == 1:
                        mean = float(accelerator.reduce(loss.detach(), "mean"))
                        temperature = 1.0 / float(scale.detach())
                        if not math.isfinite(mean):
                            raise AmpError(
                                f"stage {stage} step {step}: the loss is {mean}. Lower stage{stage}.lr, now "
                                f"{settings.lr}, or use bf16 instead of fp16"
                            )
                        values = {
                            "loss": mean,
                            "temperature": temperature,
                            "lr": optimizer.param_groups[0]["lr"],
                        }
                        self.log({f"stage{stage}/{k}": v for k, v in values.items()})
                        show(step, mean, temperature)
                    if step == total:
                        break
                last = step == total
                if self.retrieval is not None and (last or (epoch + 1) % config.validate_every == 0):
                    self.validate(engine, stage, epoch)
                self.save(engine, stage, step)
                if last:
                    break
        accelerator.free_memory(engine, optimizer)
        self.model = accelerator.unwrap_model(engine)
        return self.out / f"stage{stage}" / ADAPTER

    def validate(self, engine, stage: int, epoch: int) -> None:
        """Searches the validation split and logs R@1 beside the base model's."""
        engine.eval()
        rankings = self.retrieval.rank(engine, self.accelerator.autocast)
        engine.train()
        base = self.retrieval.base_row()
        values, parts = {}, []
        for name, ranking in rankings.items():
            recall = ranking.result.recall
            values |= {f"validation/{name.replace(' ', '_')}_R@{k}": v for k, v in recall.items()}
            of_base = (base.t2i if name == "t2i" else base.i2t).recall[1]
            parts.append(f"{name} {recall[1]:.1f} (base {of_base:.1f})")
        self.log(values)
        self.terminal.say(f"stage {stage} epoch {epoch + 1} validation R@1: " + ", ".join(parts))

    def log(self, values: dict[str, float]) -> None:
        self.accelerator.log(values, step=self.step)

    def save(self, engine, stage: int, step: int) -> None:
        """Writes the stage's adapter; under ZeRO every rank takes part in collecting the weights."""
        state = self.accelerator.get_state_dict(engine)
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(engine)
            adapter = {k: v for k, v in state.items() if not k.startswith("backbone.")}
            training = {"stage": stage, "step": step, "config": asdict(self.config)}
            save_adapter(self.out / f"stage{stage}" / ADAPTER, model, training, adapter)


def open_splits(config: TrainConfig) -> tuple[ShardSplit, ShardSplit | None]:
    """The training split and, where the run validates, the validation split."""
    data = config.data
    validates = data.val_split and config.validate_every
    return ShardSplit(data.shards, data.train_split), ShardSplit(data.shards, data.val_split) if validates else None


def flat(tree: dict, prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested settings as one level of scalars, which is what trackers store."""
    out = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return out
