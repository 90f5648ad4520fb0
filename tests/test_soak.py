"""The soak run's watch: processes that leak on purpose are called growing, one that does not is called flat."""

import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from amp.train.engine import frozen_heap
from benchmarks import soak
from benchmarks.watch import Watch, children, held, trend

LINUX = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads Linux' /proc")
# Each holds for a moment what it gives back; the leaks keep some of it.
CHILD = """
import os, sys, threading, time
kept = []
print(flush=True)
while True:
    held = bytearray(1_000_000), [open("/dev/null") for _ in range(3)]
    time.sleep(0.01)
    for file in held[1]:
        file.close()
    del held
    if sys.argv[1] == "memory":
        kept.append(bytes(b"x" * 200_000))
    if sys.argv[1] == "descriptors":
        os.open("/dev/null", os.O_RDONLY)
    if sys.argv[1] == "threads":
        kept.append(threading.Thread(target=time.sleep, args=(60,), daemon=True))
        kept[-1].start()
    time.sleep(0.02)
"""


@LINUX
def test_leaks_are_found():
    roles = ("nothing", "memory", "descriptors", "threads")
    processes = {role: subprocess.Popen([sys.executable, "-c", CHILD, role], stdout=subprocess.PIPE) for role in roles}
    try:
        for process in processes.values():
            process.stdout.readline()
        watch, start = Watch(), time.monotonic()
        for _ in range(40):
            watch.sample(time.monotonic() - start, {role: process.pid for role, process in processes.items()})
            time.sleep(0.03)
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()
    growing = {role: {name for name, t in found.items() if t.growing} for role, found in watch.trends().items()}
    assert growing["nothing"] == set()
    assert growing["memory"] == {"memory_MB", "resident_MB"}
    assert growing["descriptors"] == {"descriptors"}
    assert growing["threads"] >= {"threads"}  # whose stacks are memory too
    assert watch.processes == {role: [process.pid] for role, process in processes.items()}


@LINUX
def test_held_by_hand():
    """Anonymous and shared memory, open files and children of a process."""
    code = "import mmap, os, sys, time; x = bytearray(b'x') * 50_000_000; m = mmap.mmap(-1, 30_000_000)\n"
    code += "m[:] = b'x' * 30_000_000; files = [open('/dev/null') for _ in range(5)]\n"
    code += "print(os.getpid(), flush=True); sys.stdin.read()"
    pair = [
        subprocess.Popen([sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for text in (code.replace("50_000_000", "5").replace("range(5)", "range(0)"), code)
    ]
    for process in pair:
        process.stdout.readline()
    small, large = (held(process.pid) for process in pair)
    assert {process.pid for process in pair} <= set(children(os.getpid()))
    for process in pair:
        process.communicate()
    assert large.memory_MB - small.memory_MB == pytest.approx(50, abs=1)
    assert small.memory_MB > 30 and large.resident_MB > 80
    assert large.descriptors - small.descriptors == 5
    assert (large.threads, large.children, large.shared_files) == (1, 0, 0)
    with pytest.raises(OSError):
        held(pair[0].pid)


def test_trends_by_hand():
    """Of an hour: noise above the floor is none, a warm-up neither, and a leak of one kB a step is seen."""
    random = np.random.default_rng(0)
    seconds = np.arange(0, 3600, 5.0)
    steps, noise = random.exponential(30, len(seconds)), 400 + 50 * np.exp(-seconds / 60)
    flat = trend(seconds, noise + steps, count=False)
    assert not flat.growing and abs(flat.share_an_hour) < 0.01
    leak = trend(seconds, noise + steps + 5e-3 * seconds, count=False)
    assert leak.growing and leak.an_hour == pytest.approx(18, abs=3) and leak.mean > 400
    files = 30 + random.integers(0, 3, len(seconds))
    assert not trend(seconds, files, count=True).growing
    assert trend(seconds, files + (seconds > 3000), count=True).growing
    assert trend(seconds, np.zeros(len(seconds)), count=True).share_an_hour == 0


def test_garbage_does_not_wait_for_old_objects():
    """A run's cycles are collected though the process holds many more objects, which count again afterwards."""
    first, second, third = gc.get_threshold()
    enough = int(1.3 * (first + 1) * (second + 1) * (third + 1))  # new objects until Python may look at all of them
    old = [[] for _ in range(5 * enough)]  # the new ones are not a quarter of these: next to them they wouldn't count
    gc.collect()
    with pytest.raises(KeyboardInterrupt), frozen_heap():
        assert gc.get_freeze_count() > len(old)
        before, new = gc.get_stats()[2]["collections"], []
        for _ in range(enough):
            new.append([])
        assert gc.get_stats()[2]["collections"] > before
        raise KeyboardInterrupt
    assert gc.get_freeze_count() == 0


def test_report_and_plot(tmp_path):
    """Whatever is left behind or was started anew is named beside what grows."""
    watch = Watch()
    for now in range(30):
        watch.seconds.append(float(now))
        watch.add(
            "rank 0",
            {
                "memory_MB": 100.0 + now,
                "resident_MB": 200.0,
                "descriptors": 7,
                "threads": 2,
                "children": 0,
                "shared_files": 1,
            },
        )
        watch.add("run", {"steps": 3 * now, "checkpoints_MB": 5.0, "logs": 0.1 * now})
    watch.processes = {"rank 0": [11], "rank 0's worker": [12, 13]}
    end = {"signal": "SIGUSR1", "step": 90, "processes_left": 0, "shared_memory_left": 1}
    found = soak.report(soak.SoakSettings(every=1.0), watch, end)
    assert found["growing"] == ["rank 0: memory_MB", "rank 0's worker: started anew", "left behind"]
    assert found["steps_an_hour"] == 3 * 3600
    assert found["series"]["rank 0"]["memory_MB"] == watch.series["rank 0"]["memory_MB"]
    assert soak.lines(found)[-1].startswith("growing: rank 0: memory_MB")
    assert soak.draw(watch).startswith(b"\x89PNG")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "state.json").write_bytes(b"x" * 3_000_000)
    (tmp_path / "open-clip-amp").mkdir()
    (tmp_path / "open-clip-amp" / "events").write_bytes(b"x" * 2_000_000)
    assert soak.disk(tmp_path) == {"checkpoints_MB": 3.0, "logs": 2.0}
