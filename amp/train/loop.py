"""One stage: its engine and optimizer, the loop over optimizer steps, and what happens between steps."""

import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import DistributedType
from accelerate.utils import set_seed
from safetensors.torch import save
from torch.nn.attention import SDPBackend, sdpa_kernel

from amp.data.stream import Batch
from amp.distributed import all_gather, rank
from amp.errors import AmpError
from amp.files import open_log
from amp.model.adapter import save_adapter
from amp.retrieval.split_search import SplitSearch
from amp.train.checkpoints import ADAPTER, OPTIMIZER, Checkpoint
from amp.train.objective import Objective
from amp.train.resume import adapter_path, identity
from amp.train.run import SKIPPED, Run
from amp.train.schedule import adamw, learning_rate
from amp.train.stages import set_trainable
from amp.train.trained_state import TrainedState


class StageLoop:
    """The optimizer steps of one stage.

    Args:
        run: State shared by the stages.
        stage: 1 or 2.
        done: Optimizer steps of the stages before it, for the trackers.

    Attributes:
        steps: Optimizer steps of the whole stage.
        step: Number of steps taken.
        skipped: Number of steps that changed nothing because the loss or a gradient was not finite.

    Raises:
        AmpError: The stage has no epochs.
    """

    def __init__(self, run: Run, stage: int, done: int):
        config = run.config
        self.run, self.config, self.accelerator, self.terminal = run, config, run.accelerator, run.terminal
        self.stage, self.done = stage, done
        self.settings = config.stage(stage)
        self.accumulation = config.gradient_accumulation
        self.steps_an_epoch = run.order.steps // self.accumulation
        self.steps = config.steps(stage, self.steps_an_epoch)
        self.step = self.skipped = self.skipped_in_a_row = 0

    def take_steps(self, found: Checkpoint | None) -> None:
        """Trains to the end of the stage, from the start or from `found`, whose weights the model already has.

        Raises:
            Stopped: A signal stopped the run, after a checkpoint was saved.
            AmpError: The loss or gradients stay non-finite, or the adapter can't be written.
        """
        self.prepare(found)
        run, total = self.run, self.steps
        if number := run.request.agreed(self.accelerator.device):
            run.stop(number, self.stage, self.step)
        batches = self.batches()
        progress = self.terminal.training(self.stage, total, run.images_a_step, self.step)
        with run.request.taking_steps(), progress as show:
            while self.step < total:
                set_seed(self.seed_of_step())
                loss, scale = self.optimizer_step(batches)
                if self.step % self.config.log_every == 0 or self.step in (1, total):
                    show(self.step, *self.log_step(loss, scale))
                else:
                    show(self.step)
                epoch = (self.step - 1) // self.steps_an_epoch + 1
                last = self.step == total
                epoch_ends = last or self.step == epoch * self.steps_an_epoch
                every = self.config.checkpoint.every_steps
                number = run.request.agreed(self.accelerator.device)
                if epoch_ends or number or (every and self.step % every == 0):
                    self.save(adapter_too=epoch_ends, must=last or bool(number))
                if number and not (last and self.stage == self.config.stages[-1]):
                    run.stop(number, self.stage, self.step)
                if epoch_ends and run.retrieval is not None and (last or epoch % self.config.validate_every == 0):
                    self.validate(run.retrieval, epoch)
        if found is not None and found.finished:  # its adapter file has been removed
            self.save(adapter_too=True, must=True)
        self.accelerator.wait_for_everyone()  # if rank 0 couldn't write, no other rank may end successfully
        self.accelerator.free_memory(self.engine, self.optimizer)
        run.model = self.accelerator.unwrap_model(self.engine)

    def prepare(self, found: Checkpoint | None) -> None:
        """Wraps the model for this stage and restores the optimizer from `found`."""
        config, model, settings = self.config, self.run.model, self.settings
        set_trainable(model, self.stage)
        # fp32 copies of what this stage doesn't train, saved unchanged in its adapter even if the engine casts weights.
        self.fixed = {
            name: value.detach().float().cpu().clone()
            for name, value in model.adapter_state().items()
            if not model.get_parameter(name).requires_grad
        }
        self.objective = Objective.of(config, self.stage, model)
        optimizer = adamw(model, settings.lr, settings.weight_decay, config.prompt_lr_factor)
        self.engine, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.engine.train()
        self.state = TrainedState(model, self.optimizer, self.accelerator.scaler)
        if found is not None:
            self.step, self.skipped = found.step, found.state["skipped"]
            self.state.load(found.weights(), found.moments(), found.state["updates"])
            self.state.load_loss_scale(found.state["loss_scale"])

    def seed_of_step(self) -> int:
        """Random seed of a step on this rank. It depends only on (seed, stage, step, rank), so no generator is
        restored."""
        sequence = np.random.SeedSequence([self.config.seed, self.stage, self.step, rank()])
        return int(sequence.generate_state(1)[0])

    def batches(self) -> Iterator[Batch]:
        """Batches of this rank, starting at the current step."""
        number, order = self.step * self.accumulation, self.run.order
        while True:
            order.set_position(number)
            for batch in self.run.loader:
                yield batch
                number += 1

    def optimizer_step(self, batches: Iterator[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes one step over `gradient_accumulation` batches. Returns this rank's mean loss and the logit scale,
        (1,)."""
        accelerator = self.accelerator
        # On the CPU the backward pass of fused attention leaves the processor's bf16 units idle.
        unfused = accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16"
        attention = partial(sdpa_kernel, SDPBackend.MATH) if unfused else nullcontext
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps, self.settings.warmup_steps, group["peak"])
        parts = [self.run.to_device(next(batches)) for _ in range(self.accumulation)]
        losses = self.objective.parts(self.engine, parts, self.step)
        mean = torch.zeros((), device=accelerator.device)
        for _ in parts:
            with accelerator.accumulate(self.engine), attention():
                with accelerator.autocast():
                    loss, scale = next(losses)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    skipped = self.update()
            mean = mean + loss.detach() / self.accumulation
        self.step += 1
        if skipped:
            self.note_skipped(mean, torch.cat([part.samples for part in parts if part.samples is not None]))
        else:
            self.skipped_in_a_row = 0
        return mean, scale.detach()

    def update(self) -> bool:
        """Clips and applies the gradients. Returns True, on all ranks, if they were not finite and were dropped."""
        accelerator = self.accelerator
        if accelerator.distributed_type == DistributedType.DEEPSPEED:  # already done in `backward`
            return self.optimizer.step_was_skipped
        norm = accelerator.clip_grad_norm_(self.state.parameters.values(), self.config.max_grad_norm or float("inf"))
        drop = accelerator.scaler is None and not torch.isfinite(norm)
        if not drop:
            self.optimizer.step()
            drop = self.optimizer.step_was_skipped
        self.optimizer.zero_grad()
        return drop

    def note_skipped(self, loss: torch.Tensor, samples: torch.Tensor) -> None:
        """Counts a skipped step and lists its samples in OUT/skipped.jsonl.

        Raises:
            AmpError: More than `max_skipped` steps in a row were skipped.
        """
        config, run = self.config, self.run
        mean = float(self.accelerator.reduce(loss, "mean"))
        if np.isfinite(mean) and self.accelerator.mixed_precision == "fp16":
            return  # the loss scale was too high, which is normal, and has been lowered
        self.skipped += 1
        self.skipped_in_a_row += 1
        indices = all_gather(samples).tolist()
        path = run.out / SKIPPED
        if self.accelerator.is_main_process:
            keys = [run.split.record(index)["key"] for index in indices]
            with os.fdopen(open_log(path, os.O_APPEND), "w") as file:
                file.write(json.dumps({"stage": self.stage, "step": self.step, "loss": str(mean), "keys": keys}) + "\n")
        self.terminal.say(
            f"stage {self.stage} step {self.step} is skipped: its loss is {mean} or a gradient is not finite; its "
            f"{len(indices)} samples are listed in {path} ({self.skipped} steps skipped so far)"
        )
        if self.skipped_in_a_row > config.max_skipped:
            raise AmpError(
                f"stage {self.stage} step {self.step}: the loss is {mean} or a gradient is not finite, in "
                f"{self.skipped_in_a_row} steps in a row, expected at most max_skipped = {config.max_skipped}. Their "
                f"samples are listed in {path}. Lower stage{self.stage}.lr, now {self.settings.lr}, or use bf16 "
                "instead of fp16"
            )

    def log_step(self, loss: torch.Tensor, scale: torch.Tensor) -> tuple[float, float]:
        """Sends loss, temperature and learning rate to the trackers. Returns the loss over all ranks and the
        temperature."""
        mean, temperature = float(self.accelerator.reduce(loss, "mean")), 1.0 / float(scale)
        values = {"loss": mean, "temperature": temperature, "lr": self.optimizer.param_groups[0]["lr"]}
        self.track({f"stage{self.stage}/{key}": value for key, value in values.items()})
        return mean, temperature

    def validate(self, retrieval: SplitSearch, epoch: int) -> None:
        """Searches the validation split and logs R@1 next to the base model's."""
        self.engine.eval()
        with self.run.request.validating(), self.terminal.progress("validating", "pairs") as report:
            rankings = retrieval.rank(self.engine, self.accelerator.autocast, report)
        self.engine.train()
        (row,), base = retrieval.rows("", rankings), retrieval.base_row()
        values: dict[str, float] = {}
        parts = []
        for name, result, of_base in (("t2i", row.t2i, base.t2i), ("i2t", row.i2t, base.i2t)):
            values |= {f"validation/{name}_R@{k}": value for k, value in result.recall.items()}
            parts.append(f"{name} {result.recall[1]:.1f} (base {of_base.recall[1]:.1f})")
        self.track(values)
        self.terminal.say(f"stage {self.stage} epoch {epoch} validation R@1: " + ", ".join(parts))

    def track(self, values: dict[str, float]) -> None:
        self.accelerator.log(values, step=self.done + self.step)

    def save(self, adapter_too: bool, must: bool) -> None:
        """Saves a checkpoint and, with `adapter_too`, the stage's adapter. Every rank must call it.

        With `must`, a failure ends the run. Otherwise training continues without the checkpoint.
        """
        weights, moments = self.state.weights(), self.state.moments()
        if not self.accelerator.is_main_process:
            return
        run, model = self.run, self.run.model
        training = {"stage": self.stage, "step": self.step, "config": asdict(self.config)}
        state = {
            "steps": self.steps,
            "updates": self.state.updates,
            "skipped": self.skipped,
            "loss_scale": self.state.loss_scale(),
            "processes": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "run": identity(self.config, run.split, run.images_a_step),
        }

        def write(folder: Path) -> None:
            save_adapter(folder / ADAPTER, model, training, weights | self.fixed)
            (folder / OPTIMIZER).write_bytes(save(moments))

        try:
            run.checkpoints.save(self.stage, self.step, write, state)
            if adapter_too:
                save_adapter(adapter_path(run.out, self.stage), model, training, weights | self.fixed)
        except Exception as error:
            if must:
                raise error if isinstance(error, AmpError) else AmpError(f"{run.out}: {error}") from error
            self.terminal.say(f"{error}. Training continues without this checkpoint")
