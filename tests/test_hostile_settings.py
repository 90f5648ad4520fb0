"""Configurations can't load code, and ruff's rules forbid unsafe loading in this project."""

import subprocess
from pathlib import Path

import pytest
from support.repository import ROOT, launcher

COMMANDS = (
    "launchers/train.py",
    "amp/commands/evaluate.py",
    "amp/commands/choose.py",
    "amp/commands/report.py",
    "amp/commands/sweep.py",
    "tools/make_shards.py",
    "tools/generate_knowledge.py",
)


@pytest.mark.parametrize("script", COMMANDS)
def test_yaml_makes_no_objects(tmp_path, capsys, script):
    path, canary = tmp_path / "c.yaml", tmp_path / "canary"
    for tag, value in (
        ("object/apply:os.mkdir", f"[{canary}]"),
        ("object/new:os.mkdir", f"[{canary}]"),
        ("name:os.system", "''"),
        ("module:os", "''"),
    ):
        path.write_text(f"seed: !!python/{tag} {value}\n")
        with pytest.raises(SystemExit) as ended:
            launcher(script).main(["--config", str(path)])
        shown = capsys.readouterr().err
        assert ended.value.code == 2 and "Traceback" not in shown and f"python/{tag.split(':')[0]}" in shown
    assert not canary.exists()


@pytest.mark.parametrize(
    "text",
    [
        "seed: " + "[" * 5000,
        "seed: " + "9" * 6000,
        "seed: 0x" + "f" * 6000,
        "seed: \0",
        "a: &a [*a]",
        "<<: [1]",
        "- 1",
        "\xff",
    ],
    ids=lambda text: text[:12],
)
def test_yaml_that_no_parser_takes(tmp_path, capsys, text):
    (tmp_path / "c.yaml").write_text(text, encoding="latin-1")
    for script in ("launchers/train.py", "tools/make_shards.py"):
        with pytest.raises(SystemExit) as ended:
            launcher(script).main(["--config", str(tmp_path / "c.yaml")])
        shown = capsys.readouterr()
        assert ended.value.code == 2 and "Traceback" not in shown.err and "error: " in shown.err


@pytest.mark.parametrize("key", ["stage1", "data", "prompt", "validation", "engine_options", "adapters"])
def test_settings_choose_no_class(tmp_path, capsys, key):
    """For some setting types, jsonargparse creates any class that a ``class_path`` names."""
    path, canary = tmp_path / "c.yaml", tmp_path / "canary"
    (tmp_path / "evil_module.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    chosen = "class_path: evil_module.Evil\n"
    for text in (f"{key}:\n  {chosen}", f"{key}:\n  x:\n    {chosen}", f"{key}:\n  - {chosen}"):
        path.write_text(text)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.syspath_prepend(str(tmp_path))
            launcher("amp/commands/choose.py").main(["--config", str(path)])
        assert ended.value.code == 2 and "Traceback" not in capsys.readouterr().err
    assert not canary.exists()


def test_templates_are_read_by_the_safe_loader(tmp_path):
    from amp.errors import AmpError
    from amp.evaluate.table1 import load_published
    from amp.generation.prompts import load_template

    canary, path = tmp_path / "canary", tmp_path / "x.yaml"
    for text in (f"version: !!python/object/apply:os.mkdir [{canary}]\n", "version: 0x" + "f" * 6000, "[" * 5000):
        path.write_text(text)
        for read in (load_template, load_published):
            with pytest.raises(AmpError, match=r"x\.yaml"):
                read(str(path))
    assert not Path(canary).exists()


FORBIDDEN = """\
from pickle import loads
pickle.load(x)
torch.load(x, weights_only=False)
yaml.load(x)
eval(x)
exec(x)
subprocess.run(x, shell=True)
os.system(x)
import requests
import dill
from urllib.request import urlopen
tarfile.open(x).extractall(y)
"""


def test_ruff_refuses_code_from_data_and_the_network():
    ruff = pytest.importorskip("ruff", reason='needs ruff: pip install "open-clip-amp[lint]"')
    imports = "import os\nimport pickle\nimport subprocess\nimport tarfile\nimport torch\nimport yaml\n"
    done = subprocess.run(
        [
            ruff.find_ruff_bin(),
            "check",
            "--select",
            "S,TID251",
            "--output-format",
            "concise",
            "--stdin-filename",
            "amp/x.py",
            "-",
        ],
        input=imports + FORBIDDEN,
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    first = imports.count("\n") + 1
    found = {int(line.split(":")[1]) for line in done.stdout.splitlines() if line.startswith("amp/x.py:")}
    assert found == set(range(first, first + FORBIDDEN.count("\n"))), done.stdout
