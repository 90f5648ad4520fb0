"""Training as Slurm jobs on two nodes: disturbed runs end with the same bits as undisturbed ones; errors fail the job.

The disturbances are a requeue as by preemption, a USR1 as before the time limit, and the death of a node. Ranks
communicate over gloo on the CPU.
"""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.commands import arguments
from support.drawn_data import draw_shards
from support.repository import ROOT
from support.slurm import ACTIVE

pytestmark = pytest.mark.system

TRAIN, BOTH = "launchers/slurm/train.sbatch", "launchers/slurm/both_stages.sh"
STEPS = 120  # steps of stage 1


@pytest.fixture(scope="module")
def settings(tmp_path_factory, clip_folder) -> list[str]:
    """Settings of a small run with many steps: 24 per epoch, five epochs of stage 1 and one of stage 2."""
    folder = tmp_path_factory.mktemp("slurm")
    values = {
        "data.shards": draw_shards(folder / "drawn", {"train": 192, "test": 12}, samples_per_shard=50),
        "data.cache": folder / "cache",
        "data.val_split": "null",
        "data.augment": "none",
        "data.batch_size": 4,
        "data.workers": 1,
        "model.name": clip_folder,
        "model.pretrained": "null",
        "stage1.epochs": STEPS // 24,
        "stage2.epochs": 1,
        "trackers": "[]",
        "checkpoint.every_steps": 4,
        "checkpoint.keep": 2,
    }
    return arguments(values)


def run_alone(settings: list[str], out: Path) -> Path:
    """Runs stage 1 without Slurm and without interruption: two processes on this machine. Returns its folder."""
    subprocess.run(
        [
            "accelerate",
            "launch",
            "--config_file",
            "launchers/accelerate/one_node.yaml",
            "--num_processes",
            "2",
            "--main_process_port",
            "29611",
            "launchers/train.py",
            *settings,
            "--stages",
            "[1]",
            "--out",
            out,
        ],
        cwd=ROOT,
        env={**ACTIVE, "ACCELERATE_USE_CPU": "true"},
        check=True,
    )
    return out


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory) -> Path:
    """Folder of the training, see `run_alone`."""
    return run_alone(settings, tmp_path_factory.mktemp("undisturbed") / "run")


def until(condition: Callable[[], bool], what: str, timeout: float = 240) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"waited {timeout} s for {what}"
        time.sleep(0.1)


def saved_step(out: Path) -> int:
    """Step of the newest checkpoint of stage 1."""
    return max((int(path.name[-8:]) for path in out.glob("checkpoints/stage1-step*")), default=0)


def stopped(out: Path) -> dict:
    """The file that the run writes when it stops, and removes when it starts again."""
    until((out / "stopped.json").is_file, "stopped.json")
    return json.loads((out / "stopped.json").read_text())


@pytest.fixture
def log(tmp_path) -> Iterator[Path]:
    """Log file of a test's jobs. It is printed at the end, so that pytest shows it if the test fails."""
    path = tmp_path / "job.log"
    yield path
    print(path.read_text() if path.exists() else "no job has written")


@pytest.mark.slow
def test_disturbed_run_ends_in_the_same_bits_and_starts_what_depends_on_it(slurm, settings, undisturbed, log, tmp_path):
    out = tmp_path / "run"
    # --checkpoint.resume applies to the first start, but not to a requeued one.
    run = [*settings, "--out", str(out), "--checkpoint.resume", "false"]
    job, stage2, evaluation = slurm.run(BOTH, "--nodes=2", f"--output={log}", "--", *run).stdout.split()

    until(lambda: saved_step(out) >= 10, "the first steps")
    slurm.run("scontrol", "requeue", job)  # like preemption with PreemptMode=REQUEUE
    first = stopped(out)
    assert first["signal"] == "SIGTERM" and first["step"] == saved_step(out)

    until(lambda: saved_step(out) >= first["step"] + 10, "steps after preemption")
    slurm.run("scancel", "--signal=USR1", job)  # like --signal before the time limit
    second = stopped(out)
    assert second["signal"] == "SIGUSR1" and second["step"] == saved_step(out)
    until(lambda: slurm.show(job)["Restarts"] == "2", "a requeue before the time limit")
    assert "User defined signal" not in log.read_text()  # no launcher may die before its ranks have saved

    until(lambda: saved_step(out) >= second["step"] + 10, "steps after the time limit")
    # A third node replaces it. If the node came back within a minute, Slurm 22.05 would send it the kill of the last
    # start, which would hit the new one.
    slurm.crash("node2")
    until(lambda: slurm.show(job)["Restarts"] == "3", "a requeue after the loss of a node")
    third = saved_step(out)
    assert third < STEPS

    assert slurm.wait(job) == "COMPLETED"
    assert slurm.show(job)["Restarts"] == "3"
    assert slurm.wait(stage2) == "COMPLETED"
    assert slurm.wait(evaluation) == "COMPLETED"
    slurm.start("node2")
    starts = (out / "starts.txt").read_text().splitlines()
    at = [f"{out}/checkpoints/stage1-step{step:08d}" for step in (first["step"], second["step"], third)]
    assert starts[:4] == [f"{job} none", *(f"{job} {folder}" for folder in at)]
    assert log.read_text().count("resuming from") == 3
    ours, theirs = (load_file(run / "stage1" / "adapter.safetensors") for run in (out, undisturbed))
    assert ours.keys() == theirs.keys()
    for name, weights in theirs.items():
        assert torch.equal(ours[name], weights), name
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert any("action-aware" in row["name"] for row in rows)


def test_failed_first_stage_cancels_what_depends_on_it(slurm, settings, log, tmp_path):
    """It fails because the nodes have different numbers of GPUs, so the numbers of processes would differ."""
    chain = [BOTH, "--nodes=2", "--gpus=3", f"--output={log}", "--", *settings, "--out", str(tmp_path / "run")]
    job, stage2, evaluation = slurm.run(*chain).stdout.split()
    assert slurm.wait(job) == "FAILED"
    assert re.search("has [12] GPUs of this job, the first node has [21], expected the same", log.read_text())
    assert slurm.wait(stage2, {"CANCELLED"}) == slurm.wait(evaluation, {"CANCELLED"}) == "CANCELLED"
    assert not list(tmp_path.glob("run/stage*"))


def test_other_number_of_images_a_step_than_the_checkpoint_fails(slurm, settings, log, tmp_path):
    started = run_alone([*settings, "--stage1.max_steps", "8"], tmp_path / "started")
    before_the_end = sorted((started / "checkpoints").iterdir())[0]
    shutil.copytree(before_the_end, tmp_path / "run" / "checkpoints" / before_the_end.name)
    run = [*settings, "--stages", "[1]", "--out", str(tmp_path / "run")]
    job = slurm.sbatch("--nodes=1", f"--output={log}", TRAIN, *run)
    assert slurm.wait(job) == "FAILED"
    assert "images per step" in log.read_text() and "was 8 and is now 4" in log.read_text()


def test_job_that_makes_no_progress_is_not_started_for_ever(slurm, settings, log, tmp_path):
    out = tmp_path / "run"
    job = slurm.sbatch("--hold", f"--output={log}", TRAIN, *settings, "--out", str(out))
    out.mkdir()
    (out / "starts.txt").write_text(f"{job} none\n" * 5 + f"{job} elsewhere\n")
    slurm.run("scontrol", "release", job)
    assert slurm.wait(job) == "FAILED"
    assert "has started 5 times from the same checkpoint, none" in log.read_text()


def test_failing_node_leaves_srun_time_to_pass_its_message_on():
    """Simulated without a cluster, because on a cluster messages are lost only sometimes."""
    unequal = {"PROCESSES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURMD_NODENAME": "node7"}
    node = subprocess.Popen(
        ["launchers/slurm/node.sh", "launchers/train.py"],
        cwd=ROOT,
        env={**os.environ, **unequal},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "node7 has 1 GPUs of this job, the first node has 2" in node.stderr.readline()
    written = time.monotonic()
    assert node.wait() == 2
    assert time.monotonic() - written > 1
