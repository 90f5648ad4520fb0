"""One run of a sweep: its identity, its state, and its two commands."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from amp.errors import AmpError, public_command
from amp.files import open_log, write_atomically
from amp.locks import try_lock
from amp.sweep.config import Row, SweepConfig

TRAINED, RESULTS, LOCK = "trained.json", "results.json", ".lock"


@dataclass(frozen=True)
class Run:
    """A row with one seed.

    Attributes:
        row: Name of the first row with this configuration.
        seed: Random seed of the training.
        folder: Folder of the adapters, logs and results. Its name depends on everything that the result depends on, so
            a changed configuration is a different run and nothing is overwritten.
        arguments: Arguments of amp train.
        evaluation: Further arguments of amp evaluate.
    """

    row: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    evaluation: tuple[str, ...]

    @property
    def done(self) -> bool:
        return (self.folder / RESULTS).is_file()


def plan(config: SweepConfig) -> dict[str, list[Run]]:
    """The runs of each trained row, by the row's name, in the order of the seeds."""
    runs: dict[str, list[Run]] = {}
    seen: dict[str, list[Run]] = {}
    for row in (row for table in config.tables for row in table.rows if row.train):
        keys, digest = identity(config, row)
        if digest not in seen:
            slug = re.sub(r"[^a-z0-9]+", "-", row.name.lower()).strip("-")
            seen[digest] = [
                make_run(config, row, keys, Path(config.out) / f"{slug}-{digest}", seed) for seed in config.seeds
            ]
        if runs.setdefault(row.name, seen[digest]) != seen[digest]:
            raise AmpError(
                f"two rows are named {row.name!r} and differ, expected one configuration per name; rename one"
            )
    return runs


def identity(config: SweepConfig, row: Row) -> tuple[dict, str]:
    """Keys of a row, and a digest of these keys, of the content of its files and of its evaluation settings."""
    keys = {**config.set, **row.set}
    files = []
    for path in [*config.base, *row.configs]:
        try:
            files.append(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise AmpError(f"{path}: can't be read as YAML ({error}); row {row.name!r} names it") from error
    for part in (*files, keys):  # the output folder is not part of a run's identity
        part.pop("out", None)
    content = json.dumps([files, keys, {**config.evaluate, **row.evaluate}, config.split], sort_keys=True, default=str)
    return keys, hashlib.sha256(content.encode()).hexdigest()[:8]


def make_run(config: SweepConfig, row: Row, keys: dict, folder: Path, seed: int) -> Run:
    folder = folder / f"seed{seed}"
    arguments = [text for path in [*config.base, *row.configs] for text in ("--config", path)]
    arguments += as_arguments(keys)
    evaluation = as_arguments({**config.evaluate, **row.evaluate})
    return Run(row.name, seed, folder, (*arguments, "--seed", str(seed)), tuple(evaluation))


def as_arguments(keys: dict) -> list[str]:
    """YAML keys and values as command line arguments."""
    return [
        x for key, value in keys.items() for x in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]


def execute(config: SweepConfig, run: Run, say: Callable[[str], None]) -> str:
    """Trains and evaluates the missing parts of a run.

    Returns:
        `done`, `failed` (the log or the printed message says why) or `elsewhere`: another process of the sweep runs it.
    """
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        with os.fdopen(open_log(run.folder / LOCK, os.O_APPEND), "rb") as lock:
            return _execute(config, run, say) if try_lock(lock.fileno()) else "elsewhere"
    except (OSError, ValueError, KeyError, TypeError, IndexError, yaml.YAMLError) as error:
        # A full disk, or a damaged file of this run: the other runs can still finish.
        say(f"{run.folder}: {error or type(error).__name__}; remove {TRAINED} from it to train this run again")
        return "failed"


def _execute(config: SweepConfig, run: Run, say: Callable[[str], None]) -> str:
    if run.done:
        return "done"
    if not (run.folder / TRAINED).is_file():
        say(f"{run.row}, seed {run.seed}: training, log in {run.folder / 'train.log'}")
        train = [*config.launcher, "-m", "amp.commands.train", *run.arguments, "--out", str(run.folder)]
        if not call(train, run.folder / "train.log"):
            return "failed"
        stages = yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8"))["stages"]
        adapter = f"stage{stages[-1]}/adapter.safetensors"
        write_atomically(run.folder / TRAINED, json.dumps({"adapter": adapter}).encode())
    adapter = run.folder / json.loads((run.folder / TRAINED).read_text(encoding="utf-8"))["adapter"]
    say(f"{run.row}, seed {run.seed}: evaluating, log in {run.folder / 'evaluate.log'}")
    evaluate = [sys.executable, "-m", "amp.commands.evaluate", "--config", str(run.folder / "config.yaml")]
    evaluate += ["--adapters", json.dumps([f"{run.row}={adapter}"]), "--out", str(run.folder / ".results.json")]
    evaluate += [*run.evaluation, "--split", config.split]
    if not call(evaluate, run.folder / "evaluate.log"):
        return "failed"
    (run.folder / ".results.json").rename(run.folder / RESULTS)
    return "done"


def call(command: list[str], log: Path) -> bool:
    """Runs a command with its output in a file; returns whether it succeeded."""
    with os.fdopen(open_log(log), "w", encoding="utf-8") as file:
        file.write(f"{' '.join(public_command(command))}\n")
        file.flush()
        try:
            return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode == 0
        except OSError as error:
            file.write(f"{command[0]}: {error.strerror}. Set `launcher` to the command that starts training\n")
            return False
