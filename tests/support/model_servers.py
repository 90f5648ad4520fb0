"""Servers of language models as processes."""

import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from support.repository import QUIET_ENVIRONMENT


@contextmanager
def started(command: list[str], port: int, log: Path, seconds: float = 120, **variables: str) -> Iterator[str]:
    """Runs a server of a language model inside the block, after waiting until it answers; yields its address.

    Args:
        command: Command line.
        port: Port that it contains.
        log: File for its output.
        seconds: Maximum waiting time.
        variables: Further environment variables.
    """
    environment = {**QUIET_ENVIRONMENT, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **variables}
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + seconds
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                    break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with suppress(ProcessLookupError):  # it failed to start; the assertion above shows why
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
