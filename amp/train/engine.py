"""A training run: data once, then one engine a stage, from the beginning or from where a checkpoint stands."""

import gc
import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed

from amp.cores import use_cores
from amp.data.frozen_features import FrozenFeatures
from amp.data.order import BatchOrder
from amp.data.prepare import knowledge_collator, prepare_images, prepare_texts
from amp.data.split import ShardSplit
from amp.data.stream import TrainingSamples, training_loader
from amp.errors import AmpError
from amp.files import write_atomically
from amp.locks import locked_folder
from amp.model.adapter import load_adapter
from amp.model.factory import create_model_and_transforms
from amp.retrieval.split_search import Retrieval, SplitCaptions
from amp.terminal import Terminal
from amp.train.checkpoints import ADAPTER, Checkpoint, Checkpoints
from amp.train.config import TrainConfig
from amp.train.launch import make_accelerator
from amp.train.loop import SKIPPED, StageLoop
from amp.train.mining import confusable
from amp.train.peers import watching_peers
from amp.train.resume import (
    Differing,
    adapter_path,
    find_checkpoint,
    flat,
    in_words,
    record,
    refuse_other_run,
    stages_left,
)
from amp.train.stopping import Stopped, StopRequest, prepare_worker

STOPPED, RECORD = "stopped.json", "config.yaml"
BUSY = "another run is training here; wait for it to end, or give another --out"
NEIGHBOURS = 20  # as many as the first stage hands to re-ranking


def train(config: TrainConfig) -> Path:
    """Runs the stages of a configuration, or what a checkpoint in `config.out` leaves of them.

    Returns:
        The adapter file of the last stage.

    Raises:
        AmpError: Wrong input, before anything is trained; a lost process, a full disk, a loss that stays infinite.
        Stopped: A signal asked the run to stop, and its state is saved.
    """
    config.check()
    with StopRequest() as request:
        accelerator = make_accelerator(config)
        with watching_peers():
            return Run(config, accelerator, request).train()


class Run:
    """What the stages of a run share.

    Attributes:
        config, accelerator, request: As given.
        terminal: What the run shows.
        out: Its folder.
        checkpoints: In that folder.
        model: The base CLIP with its prompts.
        split: The training images.
        order, loader: The batches of this rank.
        retrieval: Searches the validation split; None where the run doesn't validate.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, request: StopRequest):
        self.config, self.accelerator, self.request = config, accelerator, request
        self.terminal = Terminal(accelerator.is_main_process)
        self.out = Path(config.out)
        self.checkpoints = Checkpoints(self.out, config.checkpoint.keep)
        self.held, self.holds = ExitStack(), False  # the lock of the folder, on the main process

    @property
    def images_a_step(self) -> int:
        config = self.config
        return config.data.batch_size * self.accelerator.num_processes * config.gradient_accumulation

    def train(self) -> Path:
        """See `amp.train.engine.train`."""
        with self.held:
            return self._train()

    def _train(self) -> Path:
        config, accelerator = self.config, self.accelerator
        # Opened before the model is built, which may mean a download: a wrong folder shows at once.
        self.split, val_split = open_splits(config)
        found, differing = self.find_checkpoint()
        left = stages_left(config.stages, found)
        last = adapter_path(config.out, config.stages[-1])
        finished = not left and last.is_file()
        if finished and not differing.keys() & {"model.name", "model.pretrained"}:
            return self.say_finished(last, differing)
        threads = None if found is None else found.state.get("threads")
        share = use_cores(config.data.workers, accelerator.device.type == "cuda", threads)
        if threads not in (None, share.threads):
            differing["threads"] = (threads, share.threads)
        self.terminal.say(str(share))
        set_seed(config.seed)
        with self.terminal.progress(f"loading {config.model.name}"):
            self.model, *transforms = create_model_and_transforms(
                config.model.name,
                config.model.pretrained,
                precision=config.model.precision,
                device=accelerator.device,
                prompt_config=config.prompt,
                image_resize_mode=config.model.resize_mode,
            )
        start = config.init if found is None else found.folder / ADAPTER
        if start is not None:
            load_adapter(start, self.model)  # which compares the base model's weights
        if finished:
            return self.say_finished(last, differing)
        self.model.activation_checkpointing = config.activation_checkpointing
        if config.compile_frozen:
            self.model.backbone.compile_blocks()
        self.prepare_data(val_split, *transforms)
        done = 0  # optimizer steps of earlier stages, for the trackers
        loops = []
        for stage in config.stages:
            loops.append(StageLoop(self, stage, done))
            done += loops[-1].steps
        self.accept(loops, found, differing)
        with frozen_heap():
            for loop in loops:
                if loop.stage in left or (not left and loop is loops[-1]):
                    loop.take_steps(found if found is not None and found.stage == loop.stage else None)
        accelerator.end_training()
        return last

    def find_checkpoint(self) -> tuple[Checkpoint | None, Differing]:
        """The checkpoint that this run goes on from, and the settings that differ from its; rank 0 looks for all.

        Nothing is changed in the folder: the run may still be refused.
        """
        answer: list[Any] = [None, {}, None]
        if self.accelerator.is_main_process:
            try:
                self.hold_folder()
                found = find_checkpoint(self.config, self.terminal.say)
                differing = {}
                if found is not None:
                    differing = refuse_other_run(found, self.config, self.split, self.images_a_step)
                answer = [found, differing, None]
            except AmpError as error:
                answer[2] = str(error)
        found, differing, refusal = broadcast_object_list(answer)
        if refusal is not None:
            raise AmpError(refusal)
        return found, differing

    def hold_folder(self, make: bool = False) -> None:
        """Keeps other runs out of the folder until this one ends; where there is none, only `make` makes it."""
        if self.holds:
            return
        try:
            if make:  # another run that began together with this one may have made it meanwhile
                self.out.mkdir(parents=True)
            if self.out.is_dir():
                self.held.enter_context(locked_folder(self.out, BUSY))
                self.holds = True
        except OSError as error:
            if isinstance(error, FileExistsError) and self.out.is_dir():
                raise AmpError(f"{self.out}: {BUSY}") from None
            raise AmpError(
                f"{self.out}: can't be written ({error.strerror}); give --out a folder that you may write to"
            ) from error

    def say_finished(self, adapter: Path, differing: Differing) -> Path:
        without_effect = f". Without effect now: {in_words(differing)}" if differing else ""
        self.terminal.say(f"{adapter}: the run is finished; --checkpoint.resume false repeats it{without_effect}")
        return adapter

    def accept(self, loops: list[StageLoop], found: Checkpoint | None, differing: Differing) -> None:
        """Begins what nothing refuses any more: trackers, and the folder's record of the run."""
        if not self.accelerator.is_main_process:
            return
        config = self.config
        self.hold_folder(make=True)
        self.start_trackers(loops, found)
        if not config.checkpoint.resume:
            self.remove_earlier_run()
        (self.out / STOPPED).unlink(missing_ok=True)
        self.checkpoints.remove_unfinished()
        content, others = record(config)
        write_atomically(self.out / RECORD, content)
        if found is not None:
            now = f"; now {in_words(differing)}" if differing else ""
            self.terminal.say(f"going on from {found.folder}{now}")
        if others:
            self.terminal.say(f"the other stage in {self.out} was trained with other settings: {in_words(others)}")

    def remove_earlier_run(self) -> None:
        """Removes checkpoints and adapters of the stages that start anew and of those that were built on them."""
        for stage in range(self.config.stages[0], 3):
            self.checkpoints.remove(stage)
            adapter = adapter_path(self.out, stage)
            init = self.config.init
            if init is None or not adapter.is_file() or not adapter.samefile(init):
                adapter.unlink(missing_ok=True)
        (self.out / SKIPPED).unlink(missing_ok=True)

    def start_trackers(self, loops: list[StageLoop], found: Checkpoint | None) -> None:
        """On the main process."""
        options = {}
        if found is not None and "tensorboard" in self.config.trackers:
            done = sum(loop.steps for loop in loops if loop.stage < found.stage) + found.step
            options = {"tensorboard": {"purge_step": done + 1}}  # steps that are taken again replace their curves
        self.accelerator.init_trackers("open-clip-amp", config=flat(asdict(self.config)), init_kwargs=options)

    def stop(self, number: int, stage: int, step: int) -> None:
        """Ends a run that was asked to stop, after it was saved; leaves word of it for the job script."""
        name = signal.Signals(number).name
        if self.accelerator.is_main_process:
            word = json.dumps({"signal": name, "stage": stage, "step": step})
            write_atomically(self.out / STOPPED, word.encode())
        self.terminal.say(f"stopped by {name} at stage {stage} step {step}; the same command goes on from there")
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        raise Stopped(number)

    def prepare_data(self, val_split: ShardSplit | None, preprocess_train, preprocess_val) -> None:
        """Encodes the texts of both splits once, and stores frozen image features where asked."""
        config, data, model, accelerator = self.config, self.config.data, self.model, self.accelerator
        self.collate = knowledge_collator(model, data.cache, data.cache_dtype)
        with self.terminal.progress("reading captions"):
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
        if mined and frozen is not None:
            text = torch.from_numpy(self.collate.store.lookup(captions.texts))
            base = torch.from_numpy(np.array(frozen.base))
            device = accelerator.device
            with self.terminal.progress("looking for images that are easily confused"):
                neighbours = confusable(base.to(device), text.to(device), captions.image.to(device), NEIGHBOURS).numpy()
        self.order = BatchOrder(
            self.split.sizes,
            data.batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            config.seed,
            data.shuffle_window,
            neighbours,
            config.mined_group,
            config.gradient_accumulation,
        )
        if not data.cache_images:
            frozen = None
        samples = TrainingSamples(
            self.split, preprocess, config.seed, data.kinds, frozen, scaled=data.decode == "scaled"
        )
        self.loader = training_loader(
            samples, self.order, self.collate, data.workers, accelerator.device.type == "cuda", prepare_worker
        )
        self.retrieval = None
        if val_split is not None and val_captions is not None:
            features = self.images(val_split, preprocess_val)
            with self.terminal.progress("searching with the base model"):
                self.retrieval = Retrieval.stored(
                    val_captions, features, self.collate, config.validation, accelerator.device
                )
        self.terminal.say(
            f"{len(self.split):,} training images, {len(captions.texts):,} captions, {self.order.steps:,} steps of "
            f"{data.batch_size} x {accelerator.num_processes} an epoch"
        )
        if prompt.reads_triplets or prompt.reads_states:
            captions.say_without_knowledge(self.terminal)

    def images(self, split: ShardSplit, preprocess, tokens: bool = True) -> FrozenFeatures:
        data = self.config.data
        return prepare_images(
            self.accelerator,
            self.terminal,
            split,
            self.model,
            preprocess,
            data.cache,
            data.cache_dtype,
            data.batch_size,
            data.workers,
            tokens,
        )


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Leaves the objects of now out of garbage collections meanwhile.

    Imported packages alone are half a million. Python goes through all of them when a quarter as many are new, a pause
    of a third of a second, and until then holds the cycles that each checkpoint leaves behind: memory would grow for
    hours. Without the old ones it looks often, at the new ones alone, and doesn't write to pages that decoding workers
    share with the process they were forked from.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # of nothing; or else the number of old objects would still decide when to collect
    try:
        yield
    finally:
        gc.unfreeze()


def open_splits(config: TrainConfig) -> tuple[ShardSplit, ShardSplit | None]:
    """The training split and, where the run validates, the validation split."""
    data = config.data
    train = ShardSplit(data.shards, data.train_split)
    if not data.val_split or not config.validate_every:
        return train, None
    return train, ShardSplit(data.shards, data.val_split)
