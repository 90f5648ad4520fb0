"""The repository's folder, its scripts (called in this process), and the real data if it exists."""

import importlib.util
import io
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("AMP_SHARED", ROOT.parent / "shared"))
# Tiny models gain nothing from OpenMP threads, and on few cores spinning threads slow down everything else.
QUIET_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def launcher(path: str) -> ModuleType:
    """Imports a script of the repository, so that a test can call its `main` without starting a process."""
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_script", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_here(path: str, *arguments) -> subprocess.CompletedProcess:
    """Runs a script of the repository in this process; returns its output and exit status.

    A process of its own would need ten seconds for imports. An exception that would print a traceback fails the test.
    """
    output, errors, status = io.StringIO(), io.StringIO(), 0
    arguments = [str(argument) for argument in arguments]
    with redirect_stdout(output), redirect_stderr(errors):
        try:
            launcher(path).main(arguments)
        except SystemExit as end:
            status = int(end.code or 0)
    return subprocess.CompletedProcess([path, *arguments], status, output.getvalue(), errors.getvalue())


def python_of(page: str, section: str = "") -> list[str]:
    """Python examples of a page of the repository, or of one of its sections, given by its heading."""
    text = (ROOT / page).read_text()
    if section:
        text = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def shared_folder(folder: str, proof: str) -> Path:
    """A folder of SHARED that contains the file `proof`. Skips the test if it is missing."""
    path = SHARED / folder
    if not (path / proof).is_file():
        pytest.skip(f"needs {proof} in {path}, real data that is not in the repository; set AMP_SHARED to its folder")
    return path


def build_distributions(folder: Path) -> tuple[Path, Path]:
    """Wheel and source archive, built offline from a copy of the repository, so that no build folder is left behind."""
    pytest.importorskip("build")
    pytest.importorskip("setuptools", minversion="77")
    source = folder / "source"
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if files.returncode != 0:
        pytest.skip("needs git and a checkout to know which files belong to the source")
    for name in filter(None, files.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", folder, source],
        env=QUIET_ENVIRONMENT,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))
