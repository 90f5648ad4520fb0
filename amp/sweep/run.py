"""One run of a sweep: the lock on its folder and the two commands that make its result."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from amp.errors import AmpError
from amp.retrieval.results import ResultFile, write_atomically
from amp.sweep.config import SweepConfig
from amp.sweep.plan import RUN, Run, as_argument, refuse_changed, search_keys

LOCK, HOLDER, EVALUATION = ".lock", ".holder", ".evaluation.json"


def execute(config: SweepConfig, run: Run, launchers: Path, say: Callable[[str], None] = lambda _: None) -> str:
    """Trains and evaluates what is missing of a run.

    Args:
        config: The sweep.
        run: One of its runs.
        launchers: Folder of train.py and evaluate.py.
        say: Called with what begins: ``training``, ``evaluating``.

    Returns:
        ``done``, ``failed, see LOG`` or ``running elsewhere (WHO)``: another process of the sweep has it.
    """
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        # The system lets go of such a lock when its process ends, however it ends.
        with FileLock(run.folder / LOCK, timeout=0):
            write_atomically(run.folder / HOLDER, f"process {os.getpid()} on {socket.gethostname()}".encode())
            try:
                return locked(config, run, launchers, say)
            finally:
                (run.folder / HOLDER).unlink(missing_ok=True)
    except Timeout:
        try:
            holder = f" ({(run.folder / HOLDER).read_text(encoding='utf-8')})"
        except OSError:  # it has just begun or just ended
            holder = ""
        return f"running elsewhere{holder}"
    except (AmpError, OSError) as error:  # the other runs go on
        return f"failed: {error}"


def locked(config: SweepConfig, run: Run, launchers: Path, say: Callable[[str], None]) -> str:
    """`execute` by the process that holds the folder; another one may have been here since the plan was made."""
    if config.rerun_changed and run.state() == "changed":
        remove(run)
    refuse_changed([run])
    if run.state() == "missing":
        say("training")
        content = {"training": run.training, "row": run.row, "seed": run.seed, "arguments": run.arguments}
        write_atomically(run.folder / RUN, f"{json.dumps(content, indent=2)}\n".encode())
        log = run.folder / "train.log"
        if not call([*config.launcher, str(launchers / "train.py"), *run.arguments, f"--out={run.folder}"], log):
            return f"failed, see {log}"
        if not run.adapter.is_file():
            return f"failed: training ended without {run.adapter}, see {log}"
    if run.state() == "trained":
        say("evaluating")
        log, out = run.folder / "evaluate.log", run.folder / EVALUATION
        if not call([sys.executable, str(launchers / "evaluate.py"), *evaluate_arguments(config, run, out)], log):
            return f"failed, see {log}"
        result = ResultFile.load_json(out)
        result.protocol["run"] = {"digest": run.evaluation, "row": run.row, "seed": run.seed}
        result.save_csv(run.results.with_suffix(".csv"))
        result.save_json(run.results)
        for path in (out, out.with_suffix(".csv")):
            path.unlink(missing_ok=True)
    return "done"


def evaluate_arguments(config: SweepConfig, run: Run, out: Path) -> list[str]:
    """Arguments of launchers/evaluate.py."""
    # Named by the row's folder, since a name ends at the first "=".
    adapter = f"{run.folder.parent.name}={run.adapter}"
    return [
        *run.arguments, f"--split={config.split}", f"--adapters={json.dumps([adapter])}", f"--out={out}",
        f"--probes={json.dumps(config.probes)}", f"--text_only={json.dumps(config.text_only)}",
        *(f"--search.{key}={as_argument(value)}" for key, value in search_keys(config).items()),
    ]  # fmt: skip


def remove(run: Run) -> None:
    """Deletes a changed run: its result, and all else but the lock if its training has changed too.

    Raises:
        AmpError: No sweep has made the folder.
    """
    trained_as = run.trained_as()
    if trained_as is None:
        raise AmpError(
            f"{run.folder} has no {RUN}, expected a folder that a sweep made: only such are deleted. Move it away"
        )
    if trained_as == run.training:
        for name in ("results.json", "results.csv"):
            (run.folder / name).unlink(missing_ok=True)
        return
    for path in run.folder.iterdir():
        if path.name in (LOCK, HOLDER):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def search_path() -> str:
    """PATH with this interpreter's folder first, so that an `accelerate` of its environment is found unactivated."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def check_launcher(config: SweepConfig) -> None:
    """Raises AmpError where the command that starts training isn't there, before every run fails by it."""
    if shutil.which(config.launcher[0], path=search_path()) is None:
        raise AmpError(
            f"launcher is {shlex.join(config.launcher)!r}: no command {config.launcher[0]!r} is found; set `launcher` "
            "to what starts training on this machine"
        )


def call(command: list[str], log: Path) -> bool:
    """Runs a command with its output in a file; whether it went well."""
    with log.open("w", encoding="utf-8") as file:
        file.write(f"{shlex.join(command)}\n")
        file.flush()
        environment = {**os.environ, "PATH": search_path()}
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode == 0
