"""A real Slurm cluster of three nodes on this machine, if the script that starts it exists."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from support.repository import QUIET_ENVIRONMENT, ROOT, SHARED

# Puts this environment's `accelerate` and `python` first on the path; sbatch passes the path on to the job.
ACTIVE = {**QUIET_ENVIRONMENT, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"}


class Slurm:
    """Nodes `node1` to `node3`, each with two CPUs and two fake GPUs, and a login host.

    Args:
        script: Script that starts the cluster, and crashes and restarts its nodes.
    """

    def __init__(self, script: Path):
        self.script = str(script)

    def run(self, *command: str) -> subprocess.CompletedProcess:
        """Runs a command in the repository on the login host and captures its output. Raises if it fails."""
        return self._call("exec", *command)

    def sbatch(self, *arguments: str) -> str:
        """Submits a job; returns its number."""
        return self.run("sbatch", "--parsable", *arguments).stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        """Fields of `scontrol show job` for a job or one task of an array (`12_3`), by name."""
        text = self.run("scontrol", "--oneliner", "show", "job", job).stdout.splitlines()[0]
        return dict(re.findall(r"(\w[\w:/]*)=(\S*)", text))

    def state(self, job: str) -> str:
        """The job's state as Slurm names it: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED ..."""
        return self.show(job)["JobState"]

    def wait(self, job: str, states: set[str] | frozenset[str] = frozenset(ENDED), timeout: float = 300) -> str:
        """Waits until the job is in one of `states` and returns it. Fails at once if the job ends in another state."""
        end = time.monotonic() + timeout
        while (state := self.state(job)) not in states:
            assert state not in ENDED and time.monotonic() < end, f"job {job} is {state}, expected one of {states}"
            time.sleep(0.3)
        return state

    def crash(self, node: str) -> None:
        """Kills a node and everything that runs on it, like a power failure."""
        self._call("crash", node)

    def start(self, node: str) -> None:
        """Brings a node back and waits until jobs can start on it."""
        self._call("start-node", node)
        end = time.monotonic() + 120
        while self.run("sinfo", "-h", "-n", node, "-o", "%T").stdout.strip() not in ("idle", "mixed", "allocated"):
            assert time.monotonic() < end, f"{node} did not come back"
            time.sleep(0.3)

    def _call(self, *arguments: str) -> subprocess.CompletedProcess:
        done = subprocess.run([self.script, *arguments], cwd=ROOT, env=ACTIVE, capture_output=True, text=True)
        assert done.returncode == 0, f"{arguments} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done


@contextmanager
def running_cluster() -> Iterator[Slurm]:
    """Runs the cluster inside the block. Skips without root or without the script that starts one."""
    script = SHARED / "tools" / "mini_slurm.sh"
    if not script.is_file():
        pytest.skip(f"needs {script}, which starts a Slurm cluster and is not in the repository; set AMP_SHARED")
    if os.geteuid() != 0:
        pytest.skip("needs root: the nodes are network namespaces")
    with FileLock(Path(tempfile.gettempdir()) / "open-clip-amp-slurm.lock"):  # one cluster per machine
        # A killed test session leaves its jobs in Slurm's saved state, and they would occupy the nodes again.
        subprocess.run([script, "down"], check=True, capture_output=True)
        size = {"MS_NODES": "3", "MS_CPUS": "2", "MS_GPUS": "2"}
        # Output is not captured: the daemons inherit the pipe, so reading it would wait until they end.
        log = Path(tempfile.mkdtemp(prefix="slurm-")) / "up.log"
        with log.open("w") as output:
            done = subprocess.run(
                [script, "up"], env={**os.environ, **size}, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        if done.returncode and shutil.which("slurmctld") is None:
            pytest.skip(f"Slurm's daemons can't be installed, see {log}")
        try:
            assert done.returncode == 0, f"the cluster did not start:\n{log.read_text()}"
            yield Slurm(script)
        finally:
            subprocess.run([script, "down"], check=True, capture_output=True)
