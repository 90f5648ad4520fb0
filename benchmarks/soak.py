"""A long run on two processes: that memory, file handles, threads and processes stay as many as they were.

    python -m benchmarks.soak --minutes 60 --out results/soak.json --plot results/soak.png

Trains the micro CLIP on drawn scenes over gloo, without end, with what could leak done as often as possible: photos
decoded by a worker a rank, epochs of eight steps, each with a validation, a checkpoint every third step of which two
are kept, and TensorBoard at each step. When time is over a signal stops the run, and the same command goes on once
from its last checkpoint. Ends with status 1 where something grows.
"""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from amp.errors import AmpError, exit_on_error

with exit_on_error():
    import torch
    from jsonargparse import ArgumentParser

    from amp.data.conversion.make import make_shards
    from amp.files import write_atomically
    from amp.train.checkpoints import Checkpoints, open_checkpoint
    from amp.train.engine import STOPPED
    from benchmarks.machine import processor
    from benchmarks.watch import COUNT_RISE, MEMORY_FLOOR_MB, MEMORY_SHARE, WARM_UP, Watch, children

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
SCENES = {"train": 128, "val": 24, "test": 2}
KEPT_SAMPLES = 240  # of each series, in the JSON file
LEFT_AFTER = 12  # steps that the run goes on for when it has been stopped
PATIENCE = 300  # seconds for a start or an end


@dataclass
class SoakSettings:
    """How long, and where to.

    Args:
        minutes: From the first checkpoint on.
        every: Seconds between two samples.
        shards: Folder of shards with splits `train` and `val`; null draws some scenes.
        folder: Where the run writes; null takes a temporary one.
        out: JSON file of series and trends.
        plot: PNG file of the series.
    """

    minutes: float = 60.0
    every: float = 5.0
    shards: Path | None = None
    folder: Path | None = None
    out: Path = Path("results/soak.json")
    plot: Path = Path("results/soak.png")


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.split("\n")[0])
    parser.add_class_arguments(SoakSettings, as_group=False)
    parsed = parser.parse_args(arguments)
    with exit_on_error():
        settings = SoakSettings(**{key: parsed[key] for key in SoakSettings.__dataclass_fields__})
        with tempfile.TemporaryDirectory() as temporary:
            watch, end = soak(settings, settings.folder or Path(temporary))
        found = report(settings, watch, end)
        write_atomically(settings.out, f"{json.dumps(found)}\n".encode())
        write_atomically(settings.plot, draw(watch))
        for line in lines(found):
            print(line)
        if found["growing"]:
            raise SystemExit(1)


class Launch:
    """A training run as a user starts it: `accelerate launch`, two ranks on the CPU.

    Args:
        folder: Of the run, its caches and its log.
        shards: Its data.
        log: File in `folder` for what it prints.
    """

    def __init__(self, folder: Path, shards: Path, log: str = "training.log"):
        self.out, self.log = folder / "run", folder / log
        options = {"out": self.out, "data.shards": shards, "data.cache": folder / "cache", **SETTINGS}
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.accelerate_cli",
            "launch",
            "--config_file",
            "launchers/accelerate/one_node.yaml",
            "--num_processes",
            str(RANKS),
            "--main_process_port",
            "0",  # a free one
            "launchers/train.py",
            "--config",
            "launchers/configs/scenes.yaml",
            *(part for key, value in options.items() for part in (f"--{key}", str(value))),
        ]
        environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **os.environ, "ACCELERATE_USE_CPU": "true"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def ranks(self) -> dict[int, int]:
        """Process ids of the ranks that run."""
        found = {}
        for process in children(self.process.pid):
            try:
                rank = re.search(rb"(?:^|\0)RANK=(\d+)\0", Path(f"/proc/{process}/environ").read_bytes())
            except OSError:
                continue
            if rank:
                found[int(rank[1])] = process
        return found

    def roles(self) -> dict[str, int]:
        """Process ids of the launcher, the ranks and their decoding workers."""
        found = {"launcher": self.process.pid}
        for rank, process in sorted(self.ranks().items()):
            found[f"rank {rank}"] = process
            workers = children(process)
            found |= {f"rank {rank}'s worker" + f" {n}" * (n > 0): worker for n, worker in enumerate(workers)}
        return found

    def step(self) -> int:
        """Optimizer steps of the newest checkpoint."""
        names = Checkpoints(self.out).names(1)
        return int(names[-1].rpartition("step")[2]) if names else 0

    def wait_for(self, done: Callable[[], bool], what: str) -> None:
        """Raises AmpError where the run ends before, or takes too long."""
        deadline = time.monotonic() + PATIENCE
        while not done():
            if self.process.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(self.log.read_text().splitlines()[-20:])
                raise AmpError(f"the run has {'ended' if self.process.poll() is not None else 'hung'} {what}:\n{tail}")
            time.sleep(0.2)

    def stop(self) -> dict:
        """Stops the run by a signal to one rank; what OUT/stopped.json says, after all processes have ended.

        Raises:
            AmpError: Its end is not the one that docs/training.md states.
        """
        processes = [process for role, process in self.roles().items() if role != "launcher"]
        os.kill(self.ranks()[RANKS - 1], signal.SIGUSR1)
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired as error:
            raise AmpError(f"the run goes on {PATIENCE} s after SIGUSR1") from error
        statuses = re.findall(r"exitcode *: (-?\d+)", self.log.read_text())
        if "75" not in statuses or not set(statuses) <= {"75", f"-{int(signal.SIGTERM)}"}:
            raise AmpError(f"the ranks ended with {statuses}, expected 75")  # the launcher terminates the later ones
        stopped = json.loads((self.out / STOPPED).read_text())
        checkpoint = open_checkpoint(Checkpoints(self.out).folder / Checkpoints(self.out).names(1)[-1])
        if checkpoint.step != stopped["step"]:
            raise AmpError(f"stopped at step {stopped['step']}, but the newest checkpoint is of {checkpoint.step}")
        alive = [process for process in processes if Path(f"/proc/{process}").exists()]
        memory = [name for name in os.listdir("/dev/shm") if any(f"_{p}_" in name for p in processes)]
        return {
            "signal": stopped["signal"],
            "step": stopped["step"],
            "processes_left": len(alive),
            "shared_memory_left": len(memory),
        }

    def kill(self) -> None:
        """Ends what still runs."""
        if self.process.poll() is None:
            self.process.terminate()  # the launcher ends its ranks
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()


def soak(settings: SoakSettings, folder: Path) -> tuple[Watch, dict]:
    """Trains and watches for `minutes`, stops the run and goes on with it once.

    Returns:
        The series, and how the run has ended and gone on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    launch = Launch(folder, settings.shards or drawn_scenes(folder))
    try:
        launch.wait_for(lambda: launch.step() > 0, "before its first checkpoint")
        watch, start = Watch(), time.monotonic()
        while (now := time.monotonic() - start) < 60 * settings.minutes:
            if launch.process.poll() is not None:
                raise AmpError(f"the run has ended after {now / 60:.1f} minutes; {launch.log} says why")
            watch.sample(now, launch.roles())
            watch.add("run", {"steps": launch.step(), **disk(launch.out)})
            time.sleep(max(0.0, (len(watch.seconds) * settings.every) - (time.monotonic() - start)))
        end = launch.stop()
        again = Launch(folder, settings.shards or folder / "shards", "resumed.log")
        try:
            again.wait_for(lambda: again.step() >= end["step"] + LEFT_AFTER, "after it was resumed")
            resumed = f"stage1-step{end['step']:08d}" in again.log.read_text()
            end["resumed"] = {"from": end["step"] if resumed else None, **again.stop()}
        finally:
            again.kill()
        return watch, end
    finally:
        launch.kill()


def drawn_scenes(folder: Path) -> Path:
    """A folder of shards of drawn scenes, in some shards a split."""
    scenes, counts = folder / "scenes", [f"--{split}={count}" for split, count in SCENES.items()]
    subprocess.run(
        [sys.executable, "tools/scenes/make_scenes.py", "--out", str(scenes), *counts],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    make_shards(
        str(scenes / "dataset.json"),
        str(scenes / "images"),
        str(folder / "shards"),
        knowledge=str(scenes / "knowledge.jsonl"),
        samples_per_shard=32,
        workers=1,
    )
    return folder / "shards"


def disk(out: Path) -> dict[str, float]:
    """MB of a run's checkpoints and adapters, and of its TensorBoard logs, which grow with every step."""
    sizes = {"checkpoints_MB": 0.0, "logs": 0.0}
    for folder, _, names in os.walk(out):  # which passes over checkpoints that are removed meanwhile
        for name in names:
            try:
                size = os.path.getsize(os.path.join(folder, name)) / 1e6
            except OSError:
                continue
            sizes["logs" if "open-clip-amp" in Path(folder).parts else "checkpoints_MB"] += size
    return {name: round(size, 3) for name, size in sizes.items()}


def report(settings: SoakSettings, watch: Watch, end: dict) -> dict:
    """Trends, the end of the run, and a part of each series."""
    trends = watch.trends()
    growing = [f"{role}: {name}" for role, found in trends.items() for name, trend in found.items() if trend.growing]
    restarted = [role for role, seen in watch.processes.items() if len(seen) > 1]
    leftover = end["processes_left"] + end["shared_memory_left"]
    steps, hours = watch.series["run"]["steps"], (watch.seconds[-1] - watch.seconds[0]) / 3600
    every = -(-len(watch.seconds) // KEPT_SAMPLES)
    return {
        "machine": {
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "minutes": settings.minutes,
        "seconds_between_samples": settings.every,
        "samples": len(watch.seconds),
        "settings": SETTINGS,
        "ranks": RANKS,
        "steps": steps[-1],
        "steps_an_hour": round((steps[-1] - steps[0]) / hours),
        "thresholds": {
            "warm_up": WARM_UP,
            "memory_share_an_hour": MEMORY_SHARE,
            "memory_floor_MB": MEMORY_FLOOR_MB,
            "count_rise": COUNT_RISE,
        },
        "growing": growing + [f"{role}: started anew" for role in restarted] + ["left behind"] * bool(leftover),
        "end": end,
        "trends": {role: {name: asdict(t) for name, t in found.items()} for role, found in trends.items()},
        "seconds": [round(s) for s in watch.seconds[::every]],
        "series": {
            role: {name: [None if x != x else x for x in values[::every]] for name, values in series.items()}
            for role, series in watch.series.items()
        },
    }


def lines(found: dict) -> list[str]:
    """What the command prints."""
    out = [f"{'':18} {'':16} {'mean':>9} {'an hour':>9} {'share':>8}"]
    for role, trends in found["trends"].items():
        for name, trend in trends.items():
            figures = f"{trend['mean']:9.2f} {trend['an_hour']:+9.3f} {trend['share_an_hour']:+8.2%}"
            out.append(f"{role:18} {name:16} {figures} {'growing' if trend['growing'] else 'flat'}")
    out.append(f"{found['steps']:,} steps, {found['steps_an_hour']:,} an hour; {found['end']}")
    return [*out, f"growing: {', '.join(found['growing'])}" if found["growing"] else "flat"]


def draw(watch: Watch) -> bytes:
    """The series as PNG: memory, descriptors, threads and children, steps and disk."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    (memory, files), (threads, steps) = figure.subplots(2, 2, sharex=True)
    colours = ("#000000", "#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#009e73", "#cc79a7")  # Okabe and Ito's
    processes = [role for role in watch.series if role != "run"]
    for role, colour in zip(processes, colours, strict=False):
        series = watch.series[role]

        def line(axes, name, style="-", series=series, colour=colour, role=role):
            minutes = [second / 60 for second in watch.seconds[: len(series[name])]]
            axes.plot(minutes, series[name], style, color=colour, label=role, linewidth=1)

        line(memory, "memory_MB")
        line(memory, "resident_MB", ":")
        line(files, "descriptors")
        line(threads, "threads")
        line(threads, "children", ":")
    run, minutes = watch.series["run"], [second / 60 for second in watch.seconds]
    steps.plot(minutes, run["steps"], color="#0072b2", label="steps (left)")
    right = steps.twinx()
    right.plot(minutes, run["checkpoints_MB"], color="#d55e00", linewidth=1, label="checkpoints, MB (right)")
    right.plot(minutes, run["logs"], color="#e69f00", linewidth=1, label="TensorBoard, MB (right)")
    memory.set_title("memory, MB (dotted: resident, with mapped files)")
    files.set_title("open file descriptors")
    threads.set_title("threads (dotted: child processes)")
    steps.set_title("optimizer steps, and the run's folder")
    for axes in figure.axes:
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines["top"].set_visible(False)
    right.grid(visible=False)
    for axes in (threads, steps):
        axes.set_xlabel("minutes")
    memory.axvspan(0, WARM_UP * minutes[-1], color="#eeeeee", zorder=0)
    steps.legend(handles=[*steps.get_lines(), *right.get_lines()], frameon=False, fontsize=8, loc="lower right")
    figure.legend(*files.get_legend_handles_labels(), loc="outside upper center", ncols=len(processes), frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=90)
    return out.getvalue()


if __name__ == "__main__":
    main()
