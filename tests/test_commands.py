"""The command `amp` and the scripts: every name works, messages use the typed name, exits are clean."""

import errno
import io
import os
import re
import runpy
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from support.commands import one_error
from support.repository import QUIET_ENVIRONMENT, ROOT

from amp import __main__ as command
from amp.command_line import CommandLine
from amp.device import usable_device
from amp.errors import AmpError, exit_on_error, typed_command
from amp.files import whole_file
from amp.folders import build_folder
from amp.terminal import PlainConsole
from amp.version import __version__

SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("launchers", "tools", "tools/figures", "tools/scenes")
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text()
)


def call(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/amp", *words])
    command.main()


def run_script(monkeypatch, path: str, *arguments: str) -> None:
    monkeypatch.syspath_prepend(ROOT / path.rpartition("/")[0])
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    runpy.run_path(path, run_name="__main__")


OURS = [name for name in command.COMMANDS if name != "clip_benchmark"]  # uses CLIP_benchmark's parser


@pytest.mark.parametrize("name", OURS)
def test_each_command_has_help(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, name, "--help")
    assert ended.value.code == 0 and f"usage: amp {name} " in capsys.readouterr().out


def test_the_list_and_the_version(monkeypatch, capsys):
    call(monkeypatch)
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in command.COMMANDS)
    assert [line for line in listed.splitlines() if line.endswith(":")] == ["use:", "train:", "measure:"]
    call(monkeypatch, "--version")
    assert capsys.readouterr().out.strip() == __version__


def test_help_of_evaluate_lists_only_what_has_an_effect(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(monkeypatch, "evaluate", "--help")
    shown = set(re.findall(r"^ +--([\w.]+)[ ,]", capsys.readouterr().out, re.MULTILINE))
    settings = shown - {"help", "config", "print_config", "model", "search"}
    assert settings >= {"shards", "adapters", "model.name", "search.top_k", "probes", "out"} and len(settings) <= 28
    assert not any(key.startswith(("data.", "prompt.", "stage", "checkpoint.")) for key in shown)


def test_clip_benchmark_keeps_its_own_options(monkeypatch, capsys):
    pytest.importorskip("clip_benchmark")
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "clip_benchmark", "--help")
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("usage: amp clip_benchmark ")


def test_an_unknown_command(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "trian")
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("amp: error: command is 'trian', expected one of search, serve, publish")


@pytest.mark.parametrize("name", ["search", "train"])  # all commands use the same parser class
def test_usage_and_errors_name_the_command_as_typed(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, name, "--nonsense", "1")
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and lines[0].startswith(f"usage: amp {name} ")
    assert re.match(f"amp {name}: error: .*nonsense", lines[-1])


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (("--data.shard", "x"), "did you mean --data.shards?"),
        (("--config", "photo"), "config is 'photo', expected a YAML file or a recipe (paper, photos)"),
    ],
)
def test_a_misspelt_option_or_recipe_gets_advice(arguments, advice, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "train", *arguments)
    assert ended.value.code == 2 and advice in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("path", [path for path in SCRIPTS if "reference_config" not in path])
def test_so_does_each_script(path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run_script(monkeypatch, path, "--nonsense", "1")
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and lines[0].startswith(f"usage: {path} ")
    assert re.match(f"{path}: error: .*nonsense", lines[-1])


@pytest.mark.parametrize(
    ("arguments", "module", "name"),
    [
        (["/venv/bin/amp", "search", "a dog"], None, "amp search"),
        (["/venv/bin/amp", "--version"], None, "amp"),
        (["launchers/train.py", "search"], None, "launchers/train.py"),
        (["/site-packages/amp/commands/search.py", "a dog"], "amp.commands.search", "python -m amp.commands.search"),
        (["/site-packages/amp/__main__.py", "search"], "amp.__main__", "python -m amp search"),
    ],
)
def test_the_name_that_was_typed(arguments, module, name, monkeypatch):
    monkeypatch.setattr(sys, "argv", arguments)
    spec = module and SimpleNamespace(name=module, origin=arguments[0])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    assert typed_command() == name


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", [*OURS, *SCRIPTS])
def test_ctrl_c_is_one_line_in_every_command(name, monkeypatch, capsys):
    monkeypatch.setattr(CommandLine, "parse_args", interrupt)
    monkeypatch.setattr("docstring_parser.parse", interrupt)  # used by tools/reference_config.py
    with pytest.raises(SystemExit) as ended:
        run_script(monkeypatch, name) if name in SCRIPTS else call(monkeypatch, name)
    shown = capsys.readouterr()
    typed = name if name in SCRIPTS else f"amp {name}"
    assert ended.value.code == 130 and shown.out == ""
    assert re.fullmatch(f"{typed}: interrupted(; .+)?\n", shown.err), shown.err


WITHOUT_LIBRARIES = """
import os, runpy, sys

class Interrupted:  # Ctrl-C while the first library is imported
    def find_spec(name, path=None, target=None):
        if name in ("docstring_parser", "jsonargparse", "matplotlib", "numpy", "open_clip", "PIL", "torch", "yaml"):
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupted)
for script in sys.argv[1:]:
    sys.path[0], sys.argv[0] = os.path.dirname(script), script
    sys.path.insert(1, os.getcwd())
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        print(script, ended.code)
"""


def test_ctrl_c_during_the_imports_of_a_script():
    scripts = [*SCRIPTS, "benchmarks/run.py", "benchmarks/soak.py"]
    done = subprocess.run([sys.executable, "-c", WITHOUT_LIBRARIES, *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{script} 130" for script in scripts], done.stderr
    assert done.stderr.splitlines() == [f"{script}: interrupted" for script in scripts]


def test_ctrl_c_in_a_callback_is_not_lost(monkeypatch, capsys):
    class Freed:
        def __del__(self):
            raise KeyboardInterrupt

    def action():
        Freed()
        for _ in range(200):
            time.sleep(0.05)

    assert ending(action, monkeypatch, capsys) == (130, "amp search: interrupted\n")


def ending(action, monkeypatch, capsys, kept: str = "") -> tuple[int, str]:
    """Exit status and standard error of a command that calls `action`."""
    monkeypatch.setattr(sys, "argv", ["amp", "search"])
    with pytest.raises(SystemExit) as ended:
        exit_on_error(kept)(action)()
    return ended.value.code, capsys.readouterr().err


def raise_(error: BaseException):
    raise error


def test_each_ending_is_one_line_with_its_status(monkeypatch, capsys, tmp_path):
    shown = lambda error, kept="": ending(lambda: raise_(error), monkeypatch, capsys, kept)  # noqa: E731
    assert shown(AmpError("x is 1\n, expected 2")) == (2, "amp search: error: x is 1\\n, expected 2\n")
    assert shown(KeyboardInterrupt(), "scores are kept") == (130, "amp search: interrupted; scores are kept\n")
    denied = PermissionError(errno.EACCES, "Permission denied", "/there/index")
    assert shown(denied) == (1, "amp search: error: /there/index: Permission denied\n")
    full = (1, f"amp search: error: {tmp_path / 'x.json'}: No space left on device; make room and try again\n")

    def write():
        with whole_file(tmp_path / "x.json"):
            raise OSError(errno.ENOSPC, "No space left on device")  # as raised by write(), without a file name

    assert ending(write, monkeypatch, capsys) == full


@pytest.mark.parametrize("error", [ZeroDivisionError(), BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError("hub")])
def test_a_defect_keeps_its_traceback(error, monkeypatch, capsys):
    """A broken pipe to a worker keeps it too, because it is not a closed standard output."""
    with pytest.raises(type(error)), exit_on_error():
        raise error


def test_an_error_is_told_although_nobody_reads_the_output(monkeypatch, capsys):
    class Gone(io.StringIO):
        def flush(self):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys, "argv", ["amp", "search"])
    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(BrokenPipeError), exit_on_error():  # this stream has no file descriptor
        raise AmpError("x is 1")
    assert capsys.readouterr().err == "amp search: error: x is 1\n"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_what_a_stream_cannot_encode_is_escaped(errors, monkeypatch):
    """With PYTHONIOENCODING=ascii, and with a locale that is not UTF-8."""
    from rich.table import Table

    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=errors)
    monkeypatch.setattr(sys, "stdout", out)
    with exit_on_error():
        table = Table("photo")
        table.add_row("été.jpg")
        PlainConsole().print(table)
        print("漢字")
    shown = out.buffer.getvalue().decode("ascii")
    assert "\\xe9t\\xe9.jpg" in shown and "\\u6f22\\u5b57" in shown


HELP = [sys.executable, "-m", "amp", "compare", "--help"]  # a fast command


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_is_silent(unbuffered):
    environment = {**QUIET_ENVIRONMENT, "PYTHONUNBUFFERED": unbuffered}
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(HELP, env=environment, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_on_standard_output_is_one_line(unbuffered):
    environment = {**QUIET_ENVIRONMENT, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(HELP, env=environment, stdout=full, stderr=subprocess.PIPE, cwd=ROOT, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "python -m amp compare: error: standard output: No space left on device; make room and try again\n"
    )


@pytest.mark.parametrize("name", ["quantum", "meta", "cuda:77", ""])
def test_a_device_that_is_not_there_is_refused(name):
    assert usable_device("cpu") == torch.device("cpu")
    with pytest.raises(AmpError, match=f"device is '{name}', expected one of cpu"):
        usable_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_search_on_a_gpu_that_is_not_there(monkeypatch, capsys, tmp_path):
    words = ("search", "--index", str(tmp_path), "--photos", str(tmp_path), "--model", "ViT-B-32", "--device", "cuda")
    assert "device is 'cuda', expected one of cpu (" in one_error(lambda: call(monkeypatch, *words), capsys)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), OSError("9 requested and 5 written")])
def test_a_folder_of_features_on_a_full_disk_is_named(error, tmp_path):
    with (
        pytest.raises(AmpError, match=r"segment: can't be written \(No space left|no space left"),
        build_folder(tmp_path / "segment"),
    ):
        raise error
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BrokenPipeError), build_folder(tmp_path / "segment"):
        raise BrokenPipeError  # the reader of the log has gone
