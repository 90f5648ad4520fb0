"""Measurements of the soak run: processes that leak are reported as growing, and one that doesn't leak is not."""

import gc
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from amp.train.engine import frozen_heap
from benchmarks import soak

pytestmark = pytest.mark.system

# Each process allocates and frees for a moment; leaking ones keep a part.
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


def test_leaks_are_found():
    leaks = {"nothing": set(), "memory": {"memory_MB"}, "descriptors": {"files"}, "threads": {"threads"}}
    roles = {role: psutil.Popen([sys.executable, "-c", CHILD, role], stdout=subprocess.PIPE) for role in leaks}
    series, start = {}, time.monotonic()
    try:
        for process in roles.values():
            process.stdout.readline()
        for _ in range(40):
            soak.sample(series, time.monotonic() - start, roles)
            time.sleep(0.03)
    finally:
        for process in roles.values():
            process.kill()
            process.communicate()
    soak.sample(series, time.monotonic() - start, roles)  # all processes have ended
    assert {role: held["process"][-1][1] for role, held in series.items()} == {r: p.pid for r, p in roles.items()}
    end = {"left": [], "continued": {"left": []}}
    found = soak.report(series | {"run": {"steps": [(0, 3)]}}, end)
    for role, names in leaks.items():
        growing = {name for name, trend in found["trends"][role].items() if trend["growing"]}
        assert growing - {"memory_MB"} == names - {"memory_MB"} and names <= growing  # thread stacks also use memory
    assert not any(trend["growing"] for trend in found["trends"]["nothing"].values())


def test_trends_by_hand():
    """Over one hour, noise above the floor and a warm-up are not growth, but a leak of 1 kB per step is."""
    random = np.random.default_rng(0)
    seconds = np.arange(0, 3600, 5.0)
    trend = lambda values, count: soak.trend(list(zip(seconds, values, strict=True)), count)  # noqa: E731
    memory = 400 + 50 * np.exp(-seconds / 60) + random.exponential(30, len(seconds))
    assert not trend(memory, count=False)["growing"]
    leak = trend(memory + 5e-3 * seconds, count=False)
    assert leak["growing"] and leak["per_hour"] == pytest.approx(18, abs=3) and leak["mean"] > 400
    files = 30 + random.integers(0, 3, len(seconds))
    assert not trend(files, count=True)["growing"]
    assert trend(files + (seconds > 3000), count=True)["growing"]


def test_restarts_and_what_is_left_behind_are_named():
    flat = {name: [(float(second), 5) for second in range(30)] for name in ("memory_MB", "files")}
    series = {"rank 0": flat | {"process": [(0.0, 11), (1.0, 12)]}, "run": {"steps": [(0.0, 3), (29.0, 90)]}}
    found = soak.report(series, {"left": ["rank 0"], "continued": {"left": ["torch_7_0"]}})
    assert found["growing"] == ["rank 0: restarted", "left: rank 0", "left: torch_7_0"] and found["steps"] == 90
    assert soak.draw(series).startswith(b"\x89PNG")


def test_garbage_does_not_wait_for_old_objects():
    """Cycles of a run are collected despite many older objects, which are tracked again after the block."""
    first, second, third = gc.get_threshold()
    enough = int(1.3 * (first + 1) * (second + 1) * (third + 1))  # new objects that can trigger a full collection
    old = [[] for _ in range(5 * enough)]  # new ones are under a quarter: no full collection
    gc.collect()
    with pytest.raises(KeyboardInterrupt), frozen_heap():
        assert gc.get_freeze_count() > len(old)
        before, new = gc.get_stats()[2]["collections"], []
        for _ in range(enough):
            new.append([])
        assert gc.get_stats()[2]["collections"] > before
        raise KeyboardInterrupt
    assert gc.get_freeze_count() == 0
