"""A training run: prepares the data once, then runs one loop per stage, from the start or from a checkpoint."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import set_seed

from amp.cores import use_cores
from amp.model.adapter import load_adapter
from amp.model.factory import create_model_and_transforms
from amp.train.checkpoints import ADAPTER
from amp.train.config import TrainConfig
from amp.train.launch import make_accelerator
from amp.train.loop import StageLoop
from amp.train.peers import watching_peers
from amp.train.resume import (
    adapter_path,
    stages_left,
)
from amp.train.run import Run, open_splits
from amp.train.stopping import StopRequest


def train(config: TrainConfig) -> Path:
    """Runs the stages of a configuration, or resumes them from a checkpoint in `config.out`.

    Returns:
        The adapter file of the last stage.

    Raises:
        AmpError: Invalid input, before anything is trained; a lost process, a full disk, or a loss that stays
            non-finite.
        Stopped: A signal stopped the run, after its state was saved.
    """
    config.check()
    with StopRequest() as request:
        accelerator = make_accelerator(config)
        with watching_peers():
            run = Run(config, accelerator, request)
            with run.held:
                return _train(run)


def _train(run: Run) -> Path:
    config, accelerator = run.config, run.accelerator
    # Open the data before building the model, which may download weights, so that a wrong folder fails at once.
    run.split, val_split = open_splits(config)
    found, differing = run.find_checkpoint()
    left = stages_left(config.stages, found)
    last = adapter_path(config.out, config.stages[-1])
    finished = not left and last.is_file()
    if finished and not differing.keys() & {"model.name", "model.pretrained"}:
        return run.say_finished(last, differing)
    threads = None if found is None else found.state.get("threads")
    share = use_cores(config.data.workers, accelerator.device.type == "cuda", threads)
    if threads not in (None, share.threads):
        differing["threads"] = (threads, share.threads)
    run.terminal.say(str(share))
    set_seed(config.seed)
    with run.terminal.progress(f"loading {config.model.name}"):
        run.model, *transforms = create_model_and_transforms(
            config.model.name,
            config.model.pretrained,
            precision=config.model.precision,
            device=accelerator.device,
            prompt_config=config.prompt,
            image_resize_mode=config.model.resize_mode,
        )
    start = config.init if found is None else found.folder / ADAPTER
    if start is not None:
        load_adapter(start, run.model)  # also checks the base model's weights
    if finished:
        return run.say_finished(last, differing)
    run.model.tower.recompute = config.activation_checkpointing
    run.prepare_data(val_split, *transforms)
    done = 0  # optimizer steps of earlier stages, for the trackers
    loops = []
    for stage in config.stages:
        loops.append(StageLoop(run, stage, done))
        done += loops[-1].steps
    earlier = sum(loop.steps for loop in loops if found is not None and loop.stage < found.stage)
    run.accept(found, differing, earlier)
    with frozen_heap():
        for loop in loops:
            if loop.stage in left or (not left and loop is loops[-1]):
                loop.take_steps(found if found is not None and found.stage == loop.stage else None)
    accelerator.end_training()
    return last


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Excludes existing objects from garbage collection while the block runs.

    Imported packages alone are half a million objects. Python scans all of them once there are a quarter as many new
    ones, which pauses for a third of a second. Until then it keeps the reference cycles that each checkpoint leaves, so
    memory would grow for hours. Without the old objects it collects often, scans only new ones, and doesn't write to
    memory pages that decoding workers share with this process.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # resets the count of old objects, which decides when to collect
    try:
        yield
    finally:
        gc.unfreeze()
