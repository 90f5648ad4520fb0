"""Real vLLM with SmolLM2, in this process and served, in the environment that `make vllm` makes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.language_models import smollm2_gguf, unpacked_smollm2
from support.model_servers import started
from support.repository import QUIET_ENVIRONMENT, ROOT

PYTHON = ROOT / ".venv-vllm/bin/python"
CAPTIONS = [
    "A brown dog jumps over a fence",
    "Two men are riding horses on the beach",
    "A girl in a red dress climbs the stairs",
    "A boy throws a ball to his sister",
]
EAGER = {"enforce_eager": True}  # compiling takes minutes on a CPU
ENVIRONMENT = {**QUIET_ENVIRONMENT, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": str(ROOT)}
pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(not PYTHON.exists(), reason="needs vLLM in .venv-vllm: make vllm"),
]


def command(python, captions: Path, out: Path, engine: str, *options: str) -> list[str]:
    fixed = ["--engine", engine, "--retries", "0", "--fallback", "none", "--max_fallback", "1"]
    where = ["--captions", str(captions), "--out", str(out)]
    return [str(python), "tools/generate_knowledge.py", *where, *fixed, *options]


def replies(folder: Path) -> dict[tuple[str, str], str]:
    """The model's reply by stage and caption."""
    lines = [json.loads(line) for file in folder.glob("cache/*.jsonl") for line in file.read_text().splitlines()]
    return {(line["stage"], line["caption"]): line["reply"] for line in lines}


def run(*arguments) -> None:
    done = subprocess.run(command(*arguments), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def kill_after_the_first_reply(*arguments) -> None:
    """Kills all processes of a command as soon as a reply is stored."""
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, env=ENVIRONMENT, start_new_session=True, stdout=-3, stderr=-3
    )
    deadline = time.monotonic() + 600
    while not replies(arguments[2]):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_vllm_writes_what_the_transformers_engine_writes(tmp_path):
    """In float32, decoded greedily, in process (killed once and resumed) and served.

    Rounding may exchange two words of almost equal probability in single replies.
    """
    captions, model = tmp_path / "captions.csv", smollm2_gguf()
    rows = [f'{number}.jpg,"{caption}"' for number, caption in enumerate(CAPTIONS)]
    captions.write_text("filename,caption\n" + "\n".join(rows) + "\n")
    run(sys.executable, captions, tmp_path / "transformers", "transformers", "--model", str(model))
    expected = replies(tmp_path / "transformers")
    assert len(expected) == 2 * len(CAPTIONS)

    options = ["--model", str(model), "--vllm.dtype", "float32", "--vllm.arguments", json.dumps(EAGER)]
    kill_after_the_first_reply(PYTHON, captions, tmp_path / "vllm", "vllm", *options)
    run(PYTHON, captions, tmp_path / "vllm", "vllm", *options)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The program `vllm` of vllm-cpu 0.32 fails: it looks for the package vllm.
    serve = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(unpacked_smollm2())]
    serve += ["--dtype", "float32", "--enforce-eager"]
    serve += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "4096", "--served-model-name", "smollm2"]
    with started(serve, port, tmp_path / "log", 400, VLLM_CPU_KVCACHE_SPACE="1") as url:
        run(sys.executable, captions, tmp_path / "served", "openai", "--model", "smollm2", "--openai.base_url", url)
    for name in ("vllm", "served"):
        found = replies(tmp_path / name)
        different = {caption for stage, caption in expected if found.get((stage, caption)) != expected[stage, caption]}
        assert len(different) <= 1, (name, different, found, expected)
    assert (tmp_path / "vllm/knowledge.jsonl").exists() and (tmp_path / "served/knowledge.jsonl").exists()
