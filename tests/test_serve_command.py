"""`amp serve` as a command: its messages, its refusals before the model is loaded, and a load test."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest
from support.drawn_data import draw
from support.evaluation import make_far_model
from support.repository import QUIET_ENVIRONMENT, ROOT
from support.servers import free_port

import amp
from amp.commands.serve import ServeSettings, check, main
from amp.errors import AmpError

pytest.importorskip("fastapi")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "adapter is empty, expected an adapter; add --adapter FILE"),
        ({"adapter": "a", "photos": "p"}, "photos is given without index, expected both; add --index FOLDER"),
        ({"adapter": "a", "queue": 0}, "queue is 0, expected at least 1"),
        ({"adapter": "a", "timeout": 0.0}, "timeout is 0.0, expected at least 1"),
        ({"adapter": "a", "max_mb": 0}, "max_mb is 0, expected at least 1"),
        ({"adapter": "a", "top_k": -1}, "top_k is -1, expected at least 0"),
        ({"adapter": "a", "allow_hosts": ["http://x"]}, "allow_hosts contains 'http://x', expected a host such as"),
        ({"adapter": "a", "allow_hosts": ["*"]}, r"allow_hosts contains '\*', expected a host"),
    ],
)
def test_settings_are_checked_before_the_model_is_loaded(settings, said):
    with pytest.raises(AmpError, match=said):
        check(ServeSettings(**settings))


def test_an_address_that_cannot_be_served(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for options, said in (
            (["--port", str(port)], f"port is {port}, which is in use, expected a free one; add --port NUMBER"),
            (["--host", "203.0.113.5"], "host is '203.0.113.5', expected an address of this machine ("),
            (["--host", "no.such.invalid"], "host is 'no.such.invalid', expected an address of this machine ("),
            (["--port", "99999"], "port is 99999, expected 0 to 65535; add --port NUMBER"),
        ):
            with pytest.raises(SystemExit) as ended:
                main(["--adapter", "missing.safetensors", *options])
            assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(AmpError, match=r'amp serve can.t work without the package uvicorn .*open-clip-amp\[serve\]"'):
        check(ServeSettings(adapter="a"))


ENVIRONMENT = {**QUIET_ENVIRONMENT, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(clip_folder, tmp_path_factory):
    """A folder with photos and an adapter."""
    folder = tmp_path_factory.mktemp("serving")
    (folder / "photos").mkdir()
    for number in range(10):
        draw(number).save(folder / "photos" / f"{number}.png")
    amp.save_adapter(folder / "adapter.safetensors", make_far_model(clip_folder)[0])
    return folder


@contextmanager
def running(folder, *options):
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "amp", "serve", "--adapter", "adapter.safetensors", "--port", str(port), *options],
        cwd=folder,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        yield process, port
    finally:
        process.kill()
        process.wait()


def lines_until(process, text):
    lines = []
    for line in process.stderr:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError("".join(lines))


@pytest.mark.system
def test_it_says_what_it_does_and_stops(folder):
    begin = time.monotonic()
    with running(folder, "--index", "index", "--photos", "photos", "--knowledge", "none") as (process, port):
        first = process.stderr.readline()
        assert first.startswith("loading PyTorch and open_clip") and time.monotonic() < begin + 5
        lines = lines_until(process, "serving")
        assert lines[-1] == f"serving http://127.0.0.1:{port}/ (Ctrl-C stops)\n"
        assert any(line.startswith("10 photos in index: 10 encoded") for line in lines)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as reply:
            assert json.load(reply)["photos"] == 10
        with socket.create_connection(("127.0.0.1", port)):  # an open connection doesn't delay the end
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
        assert process.stderr.read() == "stopped\n"


@pytest.mark.system
def test_help_is_fast():
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "amp", "serve", "--help"], env=ENVIRONMENT, cwd=ROOT, capture_output=True
    )
    assert done.returncode == 0 and b"--allow_hosts" in done.stdout
    loaded = (
        "import sys; import amp.commands.serve as s; s.parser(); "
        "print([m for m in ('torch', 'fastapi') if m in sys.modules])"
    )
    checked = subprocess.run([sys.executable, "-c", loaded], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    assert checked.stdout == "[]\n", checked.stderr
    assert time.monotonic() < begin + 10  # two starts, on a busy machine


@pytest.mark.system
def test_load_with_few_clients(folder):
    out = folder / "serve.json"
    subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.serve", "--adapter", folder / "adapter.safetensors"),
            *("--index", folder / "index", "--photos", folder / "photos", "--out", out),
            *("--clients", "5", "--seconds", "5", "--restart_seconds", "5"),
        ],
        cwd=ROOT,
        env=ENVIRONMENT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    found = json.loads(out.read_text())
    assert found["load"].keys() == {"search", "rerank", "photos"}
    for row in found["load"].values():
        assert row["requests"] > 5 and row["errors"] == {} and row["median_ms"] <= row["p95_ms"]
    assert len(found["memory_MB"]) == 5
    again = found["restart"]
    assert again["errors_while_down"].keys() <= {"ConnectionRefusedError", "ConnectionResetError", "RemoteDisconnected"}
    assert again["errors_while_down"] and again["errors_after"] == {} and again["answered_after"] > 5
