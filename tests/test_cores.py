"""How CPU cores are divided among processes, regardless of the thread count that `accelerate launch` sets."""

import os
import subprocess
import sys

import pytest
import torch
from support.repository import ROOT

from amp import cores
from amp.cores import CoreShare, share_cores, usable_cores, use_cores
from amp.errors import AmpError


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """`machine(cores, processes, OMP_NUM_THREADS)` simulates a machine and a launch."""
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)

    def describe(count: int, processes: int = 1, threads: str | None = None) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(count)))
        for name, value in {"LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": threads}.items():
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)

    return describe


@pytest.mark.parametrize(
    ("count", "processes", "gpu", "omp", "workers", "threads", "decoding"),
    [
        (1, 1, False, None, 4, 1, 0),
        (2, 1, False, None, 4, 2, 0),
        (4, 1, False, None, 4, 3, 1),
        (4, 2, False, None, 4, 2, 0),
        (2, 4, False, None, 4, 1, 0),
        (1, 1, True, None, 4, 1, 1),
        (8, 1, False, None, 4, 6, 2),
        (64, 1, False, None, 4, 60, 4),
        (8, 1, True, None, 4, 4, 4),
        (64, 8, True, None, 4, 4, 4),
        (4, 1, True, None, 4, 1, 3),
        (8, 1, False, "6", 4, 6, 2),
        (8, 1, False, "1", 4, 1, 4),
        (8, 1, False, "nonsense", 4, 6, 2),
    ],
)
def test_the_cores_are_shared_out(machine, count, processes, gpu, omp, workers, threads, decoding):
    machine(count, processes, omp)
    share = share_cores(workers, gpu)
    assert (share.processes, share.threads, share.workers, share.cores) == (processes, threads, decoding, count)
    assert processes * (threads + decoding) <= count or share.threads == 1


def test_a_container_may_leave_fewer_cores(machine, tmp_path):
    machine(64)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert usable_cores() == 64
    (tmp_path / "cpu.max").write_text("350000 100000\n")
    assert usable_cores() == 3
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    for quota, expected in (("-1", 64), ("50000", 1), ("200000", 2)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
        (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
        assert usable_cores() == expected


def test_an_interrupted_run_keeps_its_threads_where_there_are_cores(machine):
    number = torch.get_num_threads()
    try:
        machine(8)
        assert use_cores(4, False, before=3).threads == torch.get_num_threads() == 3
        assert use_cores(4, False, before=9).threads == torch.get_num_threads() == 6
        machine(8, threads="2")
        assert use_cores(4, False, before=3).threads == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(number)


def test_fewer_workers_than_none_are_refused():
    with pytest.raises(AmpError, match="workers is -1, expected at least 0"):
        share_cores(-1, gpu=False)


def test_it_is_said_in_one_line():
    assert str(CoreShare(1, 6, 1, 7)) == "1 process x 6 threads, 1 decoding worker, 7 cores"
    assert str(CoreShare(2, 1, 1, 4)) == "2 processes x 1 thread, 1 decoding worker each, 4 cores"


@pytest.mark.parametrize("given", [None, "1"])
def test_the_launchers_one_thread_is_not_the_users(given, tmp_path):
    """Runs the real `accelerate launch`, which sets OMP_NUM_THREADS=1 if it is not set."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, amp.commands, amp.cores\n"
        "print(os.environ['OMP_NUM_THREADS'], amp.cores.wanted_threads(), os.environ['OMP_WAIT_POLICY'])\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            ROOT / "launchers/accelerate/one_process.yaml",
            script,
        ],
        env={**clean, "PYTHONPATH": str(ROOT), **({} if given is None else {"OMP_NUM_THREADS": given})},
        text=True,
        capture_output=True,
    )
    assert done.stdout.split() == [given or "1", str(given), "PASSIVE"], done.stderr
