"""Training runs in separate processes, which tests can signal or kill, with a record of the samples of each step."""

import gc
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from amp.model.config import PromptConfig
from amp.train.config import DataSettings, ModelSettings, TrainConfig
from support.models import aim_settings


def small_run(
    shards: Path, clip_folder: str, folder: Path, data: dict[str, Any], cache: Path | None = None, **settings
) -> TrainConfig:
    """A training configuration with AIM, drawn shards and a tiny CLIP, without validation and trackers.

    Args:
        shards, clip_folder: The fixtures with these names.
        folder: Parent folder of the run (`folder / "run"`), and of the cache by default.
        data: Further data settings.
        cache: Folder of the cache.
        **settings: Further settings of the run.
    """
    return TrainConfig(
        out=str(folder / "run"),
        model=ModelSettings(clip_folder, None),
        prompt=PromptConfig(**aim_settings(block=1, num_prompts=2)),
        data=DataSettings(
            str(shards),
            cache=str(cache or folder / "cache"),
            **{"val_split": None, "workers": 0, "augment": "none", **data},
        ),
        **{"trackers": [], "mixed_precision": "no", **settings},  # weights must be equal on any processor
    )


class TrainingRun:
    """The ranks of one launch of `amp.train.engine.train`, forked from a server that has imported torch.

    Args:
        config: Configuration of the run.
        world: Number of processes, joined over gloo.
        audit: File to which each rank appends one line per step: stage, step, rank and samples.
        before: Called in each rank as before(rank) before training, for example to inject faults.
    """

    def __init__(self, config: TrainConfig, world: int = 1, audit: Path | None = None, before: Callable | None = None):
        self.audit, self.world = audit, world
        self.errors = Path(config.out).with_suffix(".errors")
        self.errors.mkdir(parents=True, exist_ok=True)
        # Like torchrun's agent, this process hosts the rendezvous store and outlives the ranks.
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("forkserver")
        arguments = (config, world, self.store.port, audit, before, self.errors)
        self.processes = [context.Process(target=_train_rank, args=(rank, *arguments)) for rank in range(world)]
        self.taken = 0 if audit is None else len(steps_of(audit))
        for process in self.processes:
            process.start()

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit status of each rank. Fails if one still runs after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        hung = [process for process in self.processes if process.is_alive()]
        for process in hung:
            process.kill()
        assert not hung, f"{len(hung)} ranks hung; {self.said(0)}"
        return [process.exitcode for process in self.processes]

    def wait_for_steps(self, steps: int, timeout: float = 60) -> bool:
        """Waits until rank 0 has begun `steps` more steps; returns False if the run ends first."""
        deadline = time.monotonic() + timeout
        while len(steps_of(self.audit)) < self.taken + steps:
            assert time.monotonic() < deadline, f"no {steps} steps in {timeout} s; {self.said(0)}"
            if not any(process.is_alive() for process in self.processes):
                return False
            time.sleep(0.005)
        return True

    def signal(self, number: int, ranks: range | None = None) -> None:
        """Sends a signal to some or all ranks."""
        for rank in ranks or range(self.world):
            process = self.processes[rank]
            if process.is_alive():
                os.kill(process.pid, number)

    def said(self, rank: int) -> str:
        """Standard error of a rank, over this and earlier launches."""
        path = self.errors / f"{rank}.log"
        return path.read_text() if path.is_file() else ""


def steps_of(audit: Path) -> list[dict]:
    """The audit lines of rank 0, one per step."""
    if not audit.is_file():
        return []
    lines = audit.read_text().splitlines(keepends=True)
    return [line for line in (json.loads(text) for text in lines if text.endswith("\n")) if line["rank"] == 0]


def _train_rank(rank, config, world, port, audit, before, errors) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # so that collections don't visit what the fork server has imported
    multiprocessing.set_start_method("fork", force=True)  # start method of decoding workers, as in a user's process
    log = os.open(errors / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115, stays open until the process ends
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    if world == 1:
        for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[key]
    from amp.errors import exit_on_error
    from amp.train import loop
    from amp.train.engine import train

    parts = loop.Objective.parts

    def noted(self, model, batches, step):
        samples = [sample for batch in batches for sample in batch.samples.tolist()]
        line = {"stage": self.stage, "step": step, "rank": rank, "samples": samples}
        file = os.open(audit, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, (json.dumps(line) + "\n").encode())  # one write, which a SIGKILL can't cut in two
        os.close(file)
        return parts(self, model, batches, step)

    if audit is not None:
        loop.Objective.parts = noted
    if before is not None:
        before(rank)
    with exit_on_error():
        train(config)
