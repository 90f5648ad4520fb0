"""State shared by the stages of a training run: its folder, its data and where it resumes."""

import json
import signal
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader

from amp.data.order import BatchOrder
from amp.data.prepare import knowledge_collator
from amp.data.split import ShardSplit
from amp.data.stream import Batch, TrainingSamples, training_loader
from amp.errors import AmpError
from amp.files import write_atomically
from amp.locks import locked_folder
from amp.model.clip import ActionAwareCLIP
from amp.model.towers.base import Backbone, text_tower_of
from amp.retrieval.split_search import SplitSearch
from amp.terminal import Terminal
from amp.train.checkpoints import Checkpoint, Checkpoints
from amp.train.config import TrainConfig
from amp.train.features import Features
from amp.train.resume import (
    Differing,
    adapter_path,
    find_checkpoint,
    flat,
    in_words,
    record,
    refuse_other_run,
)
from amp.train.stopping import Stopped, StopRequest, prepare_worker

STOPPED, RECORD, SKIPPED = "stopped.json", "config.yaml", "skipped.jsonl"
BUSY = "another run is training here; wait for it to end, or give another --out"


class Run:
    """State shared by the stages of a run.

    Attributes:
        config, accelerator, request: Arguments of the constructor.
        terminal: Console of the run.
        out: Folder of the run.
        checkpoints: Checkpoints in that folder.
        model: The action-aware CLIP.
        split: The training split.
        order, loader: The batches of this rank.
        retrieval: Search of the validation split; None without validation.
        text_tower: Text tower that encodes the texts of each step; None if they are stored.
    """

    model: ActionAwareCLIP
    split: ShardSplit
    order: BatchOrder
    loader: DataLoader
    retrieval: SplitSearch | None
    text_tower: Backbone | None

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

    def find_checkpoint(self) -> tuple[Checkpoint | None, Differing]:
        """The checkpoint to resume from, and the settings that differ from its own. Rank 0 searches for all ranks.

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
        """Keeps other runs out of the folder until this one ends. A missing folder is only created with `make`."""
        if self.holds:
            return
        try:
            if make:  # fails if another run has just created it
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

    def accept(self, found: Checkpoint | None, differing: Differing, earlier: int) -> None:
        """Starts the trackers and records the run in its folder, after all checks have passed.

        Args:
            found: The checkpoint that the run resumes from.
            differing: Settings that differ from the checkpoint's.
            earlier: Optimizer steps of the stages before the checkpoint's.
        """
        if not self.accelerator.is_main_process:
            return
        config = self.config
        self.hold_folder(make=True)
        self.start_trackers(found, earlier)
        if not config.checkpoint.resume:
            self.remove_earlier_run()
        (self.out / STOPPED).unlink(missing_ok=True)
        self.checkpoints.remove_unfinished()
        content, others = record(config)
        write_atomically(self.out / RECORD, content)
        if found is not None:
            now = f"; {in_words(differing)}" if differing else ""
            self.terminal.say(f"resuming from {found.folder}{now}")
        if others:
            self.terminal.say(f"the other stage in {self.out} was trained with other settings: {in_words(others)}")

    def remove_earlier_run(self) -> None:
        """Removes checkpoints and adapters of the stages that start anew and of stages built on them."""
        for stage in range(self.config.stages[0], 3):
            self.checkpoints.remove(stage)
            adapter = adapter_path(self.out, stage)
            init = self.config.init
            if init is None or not adapter.is_file() or not adapter.samefile(init):
                adapter.unlink(missing_ok=True)
        (self.out / SKIPPED).unlink(missing_ok=True)

    def start_trackers(self, found: Checkpoint | None, earlier: int) -> None:
        """Starts the trackers, on the main process only."""
        options = {}
        if found is not None and "tensorboard" in self.config.trackers:
            # Steps that are taken again replace their old points.
            options = {"tensorboard": {"purge_step": earlier + found.step + 1}}
        self.accelerator.init_trackers("open-clip-amp", config=flat(asdict(self.config)), init_kwargs=options)

    def stop(self, number: int, stage: int, step: int) -> None:
        """Ends a run after a signal, once it is saved. Writes OUT/stopped.json for the job script."""
        name = signal.Signals(number).name
        if self.accelerator.is_main_process:
            word = json.dumps({"signal": name, "stage": stage, "step": step})
            write_atomically(self.out / STOPPED, word.encode())
        self.terminal.say(f"stopped by {name} at stage {stage} step {step}; the same command resumes from there")
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        raise Stopped(number)

    def prepare_data(self, val_split: ShardSplit | None, preprocess_train, preprocess_val) -> None:
        """Opens the stored features of both splits, computing missing ones, and builds the loader."""
        config, data, model, accelerator = self.config, self.config.data, self.model, self.accelerator
        first = accelerator.process_index / accelerator.num_processes
        features = Features.prepare(config, model, self.split, val_split, preprocess_val, self.terminal, first)
        collate = knowledge_collator(model, data.cache, data.cache_dtype)
        neighbours = None
        if config.mined_group > 1:
            with self.terminal.progress("looking for images that are easily confused"):
                neighbours = features.confusable_images(self.split, data.kinds, accelerator.device)
        self.order = BatchOrder(
            self.split.sizes,
            data.batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            config.seed,
            neighbours,
            config.mined_group,
            config.gradient_accumulation,
        )
        samples = TrainingSamples(
            self.split,
            preprocess_val if data.augment == "none" else preprocess_train,
            config.seed,
            data.kinds,
            features.images if data.cache_images else None,
        )
        self.loader = training_loader(
            samples,
            self.order,
            collate,
            data.workers,
            accelerator.device.type == "cuda",
            prepare_worker,
            model.tokenizer if features.texts is None else features.texts,
        )
        self.text_tower = text_tower_of(model.backbone) if features.texts is None else None
        self.retrieval = None
        if val_split is not None:
            with self.terminal.progress("searching with the base model"):
                self.retrieval = features.validation(val_split, collate, config, accelerator.device)
        captions = sum(shard.captions for shard in self.split.shards)
        self.terminal.say(
            f"{len(self.split):,} training images, {captions:,} captions, {self.order.steps:,} steps of "
            f"{data.batch_size} x {accelerator.num_processes} per epoch"
        )
        if self.split.without_knowledge and (config.prompt.reads_triplets or config.prompt.reads_states):
            self.terminal.say(f"{self.split.without_knowledge:,} of {captions:,} captions without knowledge")

    def to_device(self, batch: Batch) -> Batch:
        """A batch on the device, with the features of its texts."""
        batch = batch.to(self.accelerator.device)
        if self.text_tower is None:
            return batch
        with torch.no_grad(), self.accelerator.autocast():
            return batch.encoded(self.text_tower.encode_text)


def open_splits(config: TrainConfig) -> tuple[ShardSplit, ShardSplit | None]:
    """The training split and, where the run validates, the validation split."""
    data = config.data
    train = ShardSplit(data.shards, data.train_split)
    if not data.val_split or not config.validate_every:
        return train, None
    return train, ShardSplit(data.shards, data.val_split)
