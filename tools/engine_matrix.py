"""Compares training under every engine, including a killed and resumed run. Makes the table of docs/training.md.

    python tools/engine_matrix.py --out results/engines.csv      (about 20 minutes on two cores)

Runs one process, DDP and ZeRO 1 to 3 over two processes, in fp32 and bf16, with torchrun, on drawn scenes and the micro
CLIP of this repository. Each row gives the distance of losses and weights from those of one process in the same
precision, the size of a checkpoint, and whether a run that was killed with SIGKILL and resumed ends with the same bits.
"moved" resumes the checkpoint of the killed run in one process without DeepSpeed.
"""

import csv
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from amp.errors import exit_on_error

with exit_on_error():
    from jsonargparse import auto_cli
    from rich.table import Table

    from amp.command_line import CommandLine
    from amp.terminal import PlainConsole

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
STEPS, IMAGES_PER_STEP, KILL_AT = 12, 16, 5
ZERO = ("zero1", "zero2", "zero2_offload", "zero3")
SETTINGS = [
    "--config",
    "launchers/configs/scenes.yaml",
    "--stages",
    "[1]",
    "--stage1.max_steps",
    str(STEPS),
    "--log_every",
    "1",
    "--validation.max_queries",
    "8",
    "--validate_every",
    "1",
    "--data.workers",
    "1",
    "--checkpoint.every_steps",
    "1",
    "--checkpoint.keep",
    str(STEPS),
]
CONSOLE = PlainConsole(stderr=True)


@dataclass
class Engine:
    """A way to train: name, number of processes, and name of the DeepSpeed configuration."""

    name: str
    processes: int
    deepspeed: str | None = None

    def start(self, out: Path, data: Path, precision: str) -> subprocess.Popen:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(self.processes),
            "launchers/train.py",
            *SETTINGS,
            "--out",
            str(out),
            "--data.shards",
            str(data / "shards"),
            "--data.cache",
            str(data / "cache"),
            "--mixed_precision",
            precision,
            "--data.batch_size",
            str(IMAGES_PER_STEP // self.processes),
        ]
        if self.deepspeed:
            command += ["--deepspeed", f"ds_configs/{self.deepspeed}.json"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "ACCELERATE_USE_CPU": "true"}
        with open(f"{out}.log", "a") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)

    def train(self, out: Path, data: Path, precision: str) -> dict[str, "torch.Tensor"]:
        """Runs the training, or resumes it, and returns the weights at its end."""
        if self.start(out, data, precision).wait():
            raise SystemExit(f"{self.name} {precision} failed:\n" + Path(f"{out}.log").read_text()[-3000:])
        from safetensors.torch import load_file

        return load_file(out / "stage1" / "adapter.safetensors")

    def kill(self, out: Path, data: Path, precision: str) -> None:
        """Starts a run and kills all its processes after the checkpoint of step `KILL_AT`."""
        process = self.start(out, data, precision)
        while process.poll() is None and not list(out.glob(f"checkpoints/stage1-step{KILL_AT:08d}")):
            time.sleep(0.02)
        if process.poll() is not None:
            raise SystemExit(f"{self.name} {precision} ended before it could be killed, see {out}.log")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def losses(out: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "open-clip-amp")).Reload()
    return [event.value for event in events.Scalars("stage1/loss")]


def distance(first: dict[str, "torch.Tensor"], second: dict[str, "torch.Tensor"]) -> float:
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def make_data(folder: Path) -> None:
    scenes = folder / "scenes"
    for command in (
        ["tools/scenes/make_scenes.py", "--out", scenes, "--train", 96, "--val", 8, "--test", 8, "--size", 72],
        [
            "tools/make_shards.py",
            "--captions",
            scenes / "dataset.json",
            "--images",
            scenes / "images",
            "--knowledge",
            scenes / "knowledge.jsonl",
            "--out",
            folder / "shards",
            "--samples_per_shard",
            12,
            "--workers",
            1,
        ],
    ):
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, capture_output=True)


def save(out: str, rows: list[dict[str, str]]) -> None:
    """Writes the table so far."""
    temporary = Path(f"{out}.tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.rename(out)


def main(out: str = "results/engines.csv", precisions: list[str] = ["no", "bf16"]) -> None:  # noqa: B006
    """Compares the engines.

    Args:
        out: CSV file of the table.
        precisions: Values of mixed_precision to compare; no is fp32.
    """
    engines = [Engine("1 process", 1), Engine("DDP x 2", 2), *(Engine(f"{zero} x 2", 2, zero) for zero in ZERO)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        make_data(data)
        for precision in precisions:
            for engine in engines:
                CONSOLE.print(f"{engine.name}, {precision}")
                whole, killed, moved = (data / f"{engine.name}-{precision}-{run}".replace(" ", "") for run in "wkm")
                weights = engine.train(whole, data, precision)
                if engine is engines[0]:
                    expected_weights, expected = weights, losses(whole)
                engine.kill(killed, data, precision)
                shutil.copytree(killed, moved)
                resumed = engine.train(killed, data, precision)
                elsewhere = engines[0].train(moved, data, precision)
                checkpoint = whole / "checkpoints" / f"stage1-step{STEPS:08d}"
                difference = max(abs(a - b) for a, b in zip(expected, losses(whole), strict=True))
                trained = sum(value.numel() * value.element_size() for value in weights.values())
                rows.append(
                    {
                        "engine": engine.name,
                        "precision": "fp32" if precision == "no" else precision,
                        "last loss": f"{losses(whole)[-1]:.5f}",
                        "losses differ by": f"{difference:.1e}",
                        "weights differ by": f"{distance(weights, expected_weights):.1e}",
                        "adapter MB": f"{trained / 1e6:.2f}",
                        "checkpoint MB": f"{sum(f.stat().st_size for f in checkpoint.iterdir()) / 1e6:.2f}",
                        "resumed": "same bits"
                        if distance(resumed, weights) == 0
                        else f"{distance(resumed, weights):.1e}",
                        "moved to 1 process": f"{distance(elsewhere, weights):.1e}",
                    }
                )
                save(out, rows)  # keep the finished rows if a later engine fails
    table = Table(*rows[0].keys())
    for row in rows:
        table.add_row(*row.values())
    PlainConsole().print(table)


if __name__ == "__main__":
    with exit_on_error():
        auto_cli(main, parser_class=CommandLine)
