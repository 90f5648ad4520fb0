"""Work shared by processes: each item is made once, even if a process dies, and nobody waits for anything else."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from amp.data.shared_work import make_missing
from amp.errors import AmpError
from amp.files import write_atomically

NAMES = [f"item-{number}" for number in range(12)]


def work(folder: Path, first: float, seconds: float, die_at: str | None) -> None:
    """Makes the items; each notes its process. Dies while making `die_at`."""

    def make(name: str) -> None:
        with open(folder.parent / "made.txt", "a") as log:
            log.write(f"{name} {os.getpid()}\n")
        time.sleep(seconds)
        if name == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        write_atomically(folder / name, name.encode())

    make_missing(NAMES, folder, make, first)


def started(folder: Path, *arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=work, args=(folder, *arguments))
    process.start()
    return process


def test_two_processes_make_each_item_once(tmp_path):
    folder = tmp_path / "cache" / "features"
    (tmp_path / "cache").mkdir()
    processes = [started(folder, first, 0.05, None) for first in (0.0, 0.5)]
    for process in processes:
        process.join(20)
    made = [line.split() for line in (folder.parent / "made.txt").read_text().splitlines()]
    assert sorted(name for name, _ in made) == sorted(NAMES)
    counts = [sum(pid == str(process.pid) for _, pid in made) for process in processes]
    assert min(counts) >= 4 and [process.exitcode for process in processes] == [0, 0]
    assert sorted(path.name for path in folder.iterdir()) == sorted(NAMES)  # no lock is left


def test_the_item_of_a_killed_process_is_made_by_another(tmp_path):
    folder = tmp_path / "cache" / "features"
    (tmp_path / "cache").mkdir()
    killed = started(folder, 0.0, 0.1, NAMES[1])
    other = started(folder, 0.5, 0.1, None)
    killed.join(20)
    other.join(20)
    assert (killed.exitcode, other.exitcode) == (-signal.SIGKILL, 0)
    made = [line.split()[0] for line in (folder.parent / "made.txt").read_text().splitlines()]
    assert {*made} == {*NAMES} and made.count(NAMES[1]) == 2 and len(made) == 13
    assert all((folder / name).read_text() == name for name in NAMES)


def test_present_items_stay_and_progress_counts_what_is_missing(tmp_path):
    for name in NAMES[:10]:
        (tmp_path / name).write_text("old")
    reports = []
    make_missing(NAMES, tmp_path, lambda name: (tmp_path / name).write_text("new"), 0.5, reports.append)
    assert reports == [2, 1, 0, 0]
    assert [(tmp_path / name).read_text() for name in NAMES] == ["old"] * 10 + ["new"] * 2


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AmpError, match=r"file: can't be written \(.*\); give a cache folder"):
        make_missing(NAMES, tmp_path / "file", lambda name: None)
