"""Messages and files of a run after a failure of a process, a disk or a shard."""

import functools
import os
import resource
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.drawn_data import draw_shards
from support.training_run import TrainingRun, small_run
from support.weights import same_bits

from amp.errors import AmpError
from amp.train.checkpoints import Checkpoints
from amp.train.config import CheckpointSettings, StageSettings, TrainConfig
from amp.train.engine import train

pytestmark = pytest.mark.system


def configured(shards, clip_folder, folder: Path, epochs: int) -> TrainConfig:
    """One stage with 5 steps per epoch on two processes with two images each."""
    return small_run(
        shards,
        clip_folder,
        folder,
        {"batch_size": 2},
        stages=[1],
        stage1=StageSettings(epochs=epochs, lr=3e-3, warmup_steps=3),
        checkpoint=CheckpointSettings(every_steps=2, keep=2),
        timeout_minutes=0.15,
    )


@pytest.fixture
def config(shards, clip_folder, tmp_path) -> TrainConfig:
    """See `configured`; 100 steps."""
    return configured(shards, clip_folder, tmp_path, epochs=20)


@pytest.fixture(scope="module")
def undisturbed(shards, clip_folder, tmp_path_factory) -> dict[str, torch.Tensor]:
    """Weights after two epochs of an undisturbed run."""
    alone = configured(shards, clip_folder, tmp_path_factory.mktemp("alone"), epochs=2)
    assert TrainingRun(alone, 2).wait() == [0, 0]
    return adapter(alone)


def adapter(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.out) / "stage1" / "adapter.safetensors")


# -- a process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_is_named_by_the_others(config, tmp_path, number):
    run = TrainingRun(config, 3, tmp_path / "audit")
    assert run.wait_for_steps(3)
    start = time.monotonic()
    run.signal(number, range(1, 2))
    for rank in (0, 2):
        run.processes[rank].join(60)
        assert run.processes[rank].exitcode == 2
        last = run.said(rank).strip().splitlines()[-1]
        assert "error: rank 1 of 3 no longer answers" in last and "The same command resumes" in last
    # A broken connection ends the run at once; a hung rank ends it after the time limit of 9 s and a delay of 5 s.
    assert time.monotonic() - start < (20 if number == signal.SIGKILL else 40)
    run.signal(signal.SIGKILL, range(1, 2))
    run.wait()


def break_data(rank: int, at: int = 5) -> None:
    """Makes rank 1 fail in step `at`, as if a sample were unreadable."""
    from amp.train import loop

    parts = loop.Objective.parts

    def call(self, model, batches, step):
        if rank == 1 and step == at:
            raise AmpError("train-000003.tar: truncated while in use")
        return parts(self, model, batches, step)

    loop.Objective.parts = call


def test_the_reason_of_a_failed_rank_reaches_the_others(config, tmp_path):
    run = TrainingRun(config, 2, tmp_path / "audit", before=break_data)
    assert run.wait() == [2, 2]
    assert run.said(1).strip().splitlines()[-1].endswith(": error: train-000003.tar: truncated while in use")
    last = run.said(0).strip().splitlines()[-1]
    assert "error: rank 1 stopped: AmpError: train-000003.tar: truncated while in use" in last


# -- the disk -------------------------------------------------------------------------------------------------------


def fill_disk(rank: int, at: int = 5, until: int = 8) -> None:
    """Limits files to 20 kB between two steps. A checkpoint is larger."""
    from amp.train import loop

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    save = loop.StageLoop.save

    def limited(self, **options):
        limit = 20_000 if at <= self.step <= until else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            return save(self, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    loop.StageLoop.save = limited


def test_a_checkpoint_that_finds_no_room_is_left_out_and_training_goes_on(config, undisturbed):
    config = replace(config, stage1=replace(config.stage1, epochs=2))
    run = TrainingRun(config, 2, before=fill_disk)
    assert run.wait() == [0, 0]
    said = run.said(0)
    for step in (6, 8):
        assert f"stage1-step{step:08d}: can't be written" in said
    assert "GB are free there" in said and "Training continues without this checkpoint" in said
    assert same_bits(adapter(config), undisturbed)
    names = sorted(path.name for path in (Path(config.out) / "checkpoints").iterdir())
    assert names == ["stage1-step00000004", "stage1-step00000010"]  # 4 is kept because 6 and 8 failed


def test_the_last_save_must_find_room_and_the_rest_can_be_done_later(config, undisturbed):
    config = replace(config, stage1=replace(config.stage1, epochs=2))
    run = TrainingRun(config, 2, before=functools.partial(fill_disk, until=10))
    assert run.wait() == [2, 2]
    last = run.said(0).strip().splitlines()[-1]
    assert ": error: " in last and "stage1-step00000010: can't be written" in last
    assert "rank 0 stopped" in run.said(1)
    names = sorted(path.name for path in (Path(config.out) / "checkpoints").iterdir())
    assert names == ["stage1-step00000002", "stage1-step00000004"]
    assert TrainingRun(config, 2).wait() == [0, 0]
    assert same_bits(adapter(config), undisturbed)


def test_a_full_file_system(tmp_path):
    """A real ENOSPC error on a small file system."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("needs to be root and allowed to mount a file system")
    try:
        checkpoints = Checkpoints(small, keep=2)

        def write(size):
            def files(folder):
                from safetensors.torch import save_file

                for name in ("adapter.safetensors", "optimizer.safetensors"):
                    save_file({"x": torch.zeros(size)}, folder / name)

            return files

        checkpoints.save(
            1, 1, write(1000), {"steps": 9, "updates": 0, "skipped": 0, "processes": 1, "loss_scale": {}, "run": {}}
        )
        with pytest.raises(AmpError, match=r"step00000002: can't be written .*space.* GB are free.*Make room"):
            checkpoints.save(
                1,
                2,
                write(1_000_000),
                {"steps": 9, "updates": 0, "skipped": 0, "processes": 1, "loss_scale": {}, "run": {}},
            )
        assert [path.name for path in checkpoints.folder.iterdir()] == ["stage1-step00000001"]
        assert checkpoints.newest([1]).step == 1
    finally:
        subprocess.run(["umount", str(small)], check=True)


# -- a shard --------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_shards(tmp_path) -> Path:
    return draw_shards(tmp_path / "drawn", {"train": 22})


def test_a_shard_that_is_cut_short_while_training_reads_it(config, own_shards, tmp_path):
    data = replace(config.data, shards=str(own_shards), workers=1)
    config = replace(config, data=data)
    alone = replace(config, out=config.out + "-alone", stage1=replace(config.stage1, epochs=3))
    assert TrainingRun(alone, 2).wait() == [0, 0]
    config = replace(config, stage1=replace(config.stage1, epochs=3))
    shard = own_shards / "train-000002.tar"
    content = shard.read_bytes()
    run = TrainingRun(replace(config, data=replace(data, workers=0)), 2, tmp_path / "audit")
    assert run.wait_for_steps(3)
    os.truncate(shard, 1500)
    assert run.wait() == [2, 2]
    lasts = [run.said(rank).strip().splitlines()[-1] for rank in range(2)]
    assert any("train-000002.tar" in last and "was truncated while in use" in last for last in lasts)
    assert all("train-000002.tar" in last for last in lasts), lasts  # both ranks name it
    again = TrainingRun(config, 2)
    assert again.wait() == [2, 2]
    assert f"{shard}: 1500 bytes; expected {len(content)}" in again.said(0)
    shard.write_bytes(content)
    assert TrainingRun(config, 2).wait() == [0, 0]
    assert same_bits(adapter(config), adapter(alone))


def test_a_shard_that_is_deleted_while_training_reads_it_is_missed_at_the_next_start(config, own_shards, tmp_path):
    """Open files stay readable, so the run succeeds; the next one reports the missing shard."""
    config = replace(
        config, data=replace(config.data, shards=str(own_shards), batch_size=4), stage1=replace(config.stage1, epochs=4)
    )
    run = TrainingRun(config, 1, tmp_path / "audit")
    assert run.wait_for_steps(3)
    (own_shards / "train-000001.tar").unlink()
    assert run.wait() == [0]
    with pytest.raises(AmpError, match=r"train-000001\.tar: No such file or directory"):
        train(replace(config, out=config.out + "-next"))
