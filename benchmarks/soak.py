"""Checks that memory, open files, threads and child processes don't grow in a long run on two processes.

    python -m benchmarks.soak --minutes 60 --out results/soak.json --plot results/soak.png

Trains the micro CLIP on drawn scenes over gloo, with everything that could leak as often as possible: photos decoded by
one worker per rank, epochs of eight steps with a validation each, a checkpoint every third step of which two are kept,
and TensorBoard in each step. At the end a signal stops the run, and the same command continues it once from its last
checkpoint. The exit status is 1 if something grows or is left behind.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from amp.errors import AmpError, exit_on_error, require

with exit_on_error():
    import numpy as np
    from jsonargparse import auto_cli

    from amp.files import write_atomically
    from amp.train.run import STOPPED

    psutil = require("psutil", "a soak run")

ROOT = Path(__file__).resolve().parents[1]
RANKS = 2
SETTINGS = {
    "stages": "[1]",
    "stage1.epochs": "1000000",
    "data.cache_images": "false",
    "data.augment": "crop",
    "data.workers": "1",
    "data.batch_size": "8",
    "validate_every": "1",
    "validation.max_queries": "12",
    "checkpoint.every_steps": "3",
    "log_every": "1",
}
LEFT_AFTER = 12  # steps of the resumed run
PATIENCE = 300  # seconds to wait for a start or an end
WARM_UP = 0.1  # ignored fraction of the time, in which caches fill and allocators settle
# A leak of 1 kB per step is more than 2 % per hour for a process of 400 MB and five steps per second. Changes below
# 1 MB are normal for allocators.
MEMORY_SHARE, MEMORY_FLOOR_MB = 0.02, 1.0
COUNT_RISE = 0.5  # rise of a fitted line if a count increases by one before the last tenth of the time
COUNTS = ("files", "threads", "children")


def main(
    minutes: float = 60.0,
    every: float = 5.0,
    out: Path = Path("results/soak.json"),
    plot: Path = Path("results/soak.png"),
) -> None:
    """Trains for some time and records the resources of the processes.

    Args:
        minutes: Time from the first checkpoint on.
        every: Seconds between two samples.
        out: JSON file of the trends.
        plot: PNG file of the series.
    """
    with tempfile.TemporaryDirectory() as folder:
        series, end = soak(Path(folder), minutes, every)
    found = report(series, end) | {"minutes": minutes, "seconds_between_samples": every}
    write_atomically(out, f"{json.dumps(found, indent=1)}\n".encode())
    write_atomically(plot, draw(series))
    print(json.dumps(found, indent=1))
    if found["growing"]:
        raise SystemExit(1)


class Launch:
    """A training run as a user starts it, with `accelerate launch` and two ranks on the CPU."""

    def __init__(self, folder: Path, log: str):
        self.out, self.log = folder / "run", folder / log
        options = {"out": self.out, "data.shards": folder / "shards", "data.cache": folder / "cache", **SETTINGS}
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
        command += ["--config_file", "launchers/accelerate/one_node.yaml", "--num_processes", str(RANKS)]
        command += ["--main_process_port", "0", "launchers/train.py", "--config", "launchers/configs/scenes.yaml"]
        command += [part for key, value in options.items() for part in (f"--{key}", str(value))]
        environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **os.environ, "ACCELERATE_USE_CPU": "true"}
        with open(self.log, "w") as file:
            self.process = psutil.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)

    def roles(self) -> dict:
        """The processes of the ranks and of their decoding workers, by name."""
        found = {}
        for process in self.process.children():
            if "RANK" in process.environ():
                name = f"rank {process.environ()['RANK']}"
                found[name] = process
                found |= {f"{name}'s worker {number}": worker for number, worker in enumerate(process.children())}
        return found

    def step(self) -> int:
        """Optimizer steps of the newest checkpoint."""
        from amp.train.checkpoints import Checkpoints

        names = Checkpoints(self.out).names(1)
        return int(names[-1].rpartition("step")[2]) if names else 0

    def wait_for(self, done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not done():
            if self.process.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(self.log.read_text().splitlines()[-20:])
                raise AmpError(f"the run {'ended' if self.process.poll() is not None else 'hung'} {what}:\n{tail}")
            time.sleep(0.2)

    def stop(self) -> dict:
        """Stops the run by a signal to one rank; returns its last step and leftover processes and shared memory.

        Raises:
            AmpError: The run doesn't end as described in docs/training.md.
        """
        from amp.train.checkpoints import Checkpoints, open_checkpoint

        roles = self.roles()
        roles[f"rank {RANKS - 1}"].send_signal(signal.SIGUSR1)
        self.wait_for(lambda: self.process.poll() is not None or not self.process.is_running(), "after SIGUSR1")
        statuses = re.findall(r"exitcode *: (-?\d+)", self.log.read_text())
        if "75" not in statuses or not set(statuses) <= {"75", f"-{int(signal.SIGTERM)}"}:
            raise AmpError(f"the ranks ended with {statuses}, expected 75")  # the launcher terminates the slower ranks
        step = json.loads((self.out / STOPPED).read_text())["step"]
        newest = open_checkpoint(Checkpoints(self.out).folder / Checkpoints(self.out).names(1)[-1])
        if newest.step != step:
            raise AmpError(f"stopped at step {step}, but the newest checkpoint is of step {newest.step}")
        names = [name for name in os.listdir("/dev/shm") if any(f"_{p.pid}_" in name for p in roles.values())]  # noqa: S108, where Linux stores it
        left = [role for role, process in roles.items() if process.is_running()] + names
        return {"step": step, "left": left}

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()  # the launcher ends its ranks
            for process in psutil.wait_procs([self.process], 60)[1]:
                process.kill()


def soak(folder: Path, minutes: float, every: float) -> tuple[dict, dict]:
    """Trains for some minutes, stops the run and resumes it once.

    Returns:
        The (second, value) pairs by role and name, and a description of the run's end.
    """
    draw_scenes(folder)
    launch, series = Launch(folder, "training.log"), {}
    try:
        launch.wait_for(lambda: launch.step() > 0, "before its first checkpoint")
        start = time.monotonic()
        while (now := time.monotonic() - start) < 60 * minutes:
            if launch.process.poll() is not None:
                raise AmpError(f"the run ended after {now / 60:.1f} minutes:\n{launch.log.read_text()[-3000:]}")
            sample(series, now, launch.roles())
            series.setdefault("run", {}).setdefault("steps", []).append((now, launch.step()))
            time.sleep(every)
        end = launch.stop()
    finally:
        launch.kill()
    again = Launch(folder, "continued.log")
    try:
        again.wait_for(lambda: again.step() >= end["step"] + LEFT_AFTER, "after it was resumed")
        if f"stage1-step{end['step']:08d}" not in again.log.read_text():
            raise AmpError(f"the resumed run did not start from step {end['step']}:\n{again.log.read_text()[-3000:]}")
        end["continued"] = again.stop()
    finally:
        again.kill()
    return series, end


def draw_scenes(folder: Path) -> None:
    from amp.data.conversion.make import make_shards

    scenes = folder / "scenes"
    counts = ["--train=128", "--val=24", "--test=2"]
    command = [sys.executable, "tools/scenes/make_scenes.py", "--out", str(scenes), *counts]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    make_shards(
        str(scenes / "dataset.json"),
        str(scenes / "images"),
        str(folder / "shards"),
        knowledge=str(scenes / "knowledge.jsonl"),
        samples_per_shard=32,
        workers=1,
    )


def sample(series: dict, now: float, roles: dict) -> None:
    """Adds each process's current resources to its series, and its pid, from which `report` detects restarts."""
    for role, process in roles.items():
        try:
            with process.oneshot():
                held = {
                    "memory_MB": own_memory(process) / 1e6,
                    "files": process.num_fds(),
                    "threads": process.num_threads(),
                    "children": len(process.children()),
                    "process": process.pid,
                }
        except psutil.NoSuchProcess:  # the process has ended
            continue
        for name, value in held.items():
            series.setdefault(role, {}).setdefault(name, []).append((now, value))


def own_memory(process) -> int:
    """Returns the bytes of anonymous and shared memory. A page shared by n processes counts 1/n for each.

    Mapped files are excluded, because they are shared with unrelated processes.
    """
    maps = process.memory_maps()
    return sum(m.pss for m in maps if not m.path.startswith("/") or m.path.startswith(("/dev/shm/", "/memfd:")))  # noqa: S108


def trend(points: Sequence[tuple[float, float]], count: bool) -> dict:
    """Fits a line through the minima of about a minute each.

    A leak raises the minima. Memory that a step, a checkpoint or a validation needs for a short time doesn't.

    Args:
        points: Seconds and values.
        count: Whether the values are counts, which must not rise by one. Otherwise they are MB, which may rise by
            `MEMORY_SHARE` per hour, and always by `MEMORY_FLOOR_MB`.

    Returns:
        Mean, slope per hour, and whether the line rises by more than noise.
    """
    time, value = np.asarray(points, float).T
    time, value = (x[time >= time[0] + WARM_UP * (time[-1] - time[0])] for x in (time, value))
    windows = np.array_split(np.arange(len(time)), min(60, max(2, len(time) // 10)))
    floors = [value[window].min() for window in windows]
    slope = float(np.polyfit([time[window].mean() - time[0] for window in windows], floors, 1)[0])
    span, mean = time[-1] - time[0], float(value.mean())
    limit = COUNT_RISE if count else max(MEMORY_SHARE * mean * span / 3600, MEMORY_FLOOR_MB)
    return {"mean": round(mean, 2), "per_hour": round(3600 * slope, 3), "growing": bool(slope * span >= limit)}


def report(series: dict, end: dict) -> dict:
    """Returns the trends, and the names of things that grow, were restarted or are left over."""
    import torch

    from benchmarks.machine import processor

    trends, growing = {}, []
    for role, held in series.items():
        for name, points in held.items():
            if name == "process":
                growing += [f"{role}: restarted"] * (len({pid for _, pid in points}) > 1)
            elif role != "run":
                trends.setdefault(role, {})[name] = found = trend(points, name in COUNTS)
                growing += [f"{role}: {name}"] * found["growing"]
    steps = series["run"]["steps"]
    growing += [f"left: {what}" for what in end["left"] + end["continued"]["left"]]
    return {
        "growing": growing,
        "steps": steps[-1][1],
        "end": end,
        "trends": trends,
        "ranks": RANKS,
        "settings": SETTINGS,
        "thresholds": {"warm_up": WARM_UP, "memory_share_per_hour": MEMORY_SHARE, "memory_floor_MB": MEMORY_FLOOR_MB},
        "machine": {"processor": processor(), "cores": os.cpu_count(), "torch": torch.__version__},
    }


def draw(series: dict) -> bytes:
    """Draws the series as PNG."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.5), layout="constrained")
    for axes, name in zip(figure.subplots(2, 2, sharex=True).flat, ("memory_MB", *COUNTS), strict=True):
        for role, held in series.items():
            if name in held:
                axes.plot(*zip(*((second / 60, value) for second, value in held[name]), strict=True), label=role)
        axes.set_title(name.replace("_", ", "))
        axes.set_xlabel("minutes")
        axes.set_ylim(bottom=0)
    figure.axes[0].legend(frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=90)
    return out.getvalue()


if __name__ == "__main__":
    with exit_on_error():
        auto_cli(main)
