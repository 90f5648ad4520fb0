"""What our own code must not do, read off its syntax; and configuration files that would make it do so."""

import ast
from pathlib import Path

import pytest
from helpers import ROOT, launcher

FOLDERS = ("amp", "launchers", "tools", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
# Who may speak to others: the engine of a server that the user names.
NETWORK = {"amp/generation/engines/openai_engine.py"}
NETWORK_MODULES = ("requests", "urllib.request", "http.client", "httpx", "aiohttp", "ftplib", "smtplib", "openai")
LOADERS = {
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "marshal.loads",
    "shelve.open",
    "os.system",
    "os.popen",
    "joblib.load",
    "dill.load",
}


def faults(source: str, name: str) -> list[str]:
    """What in a module loads code from data, starts a shell, or speaks to the network."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            for module in names:
                if module.split(".")[0] in ("pickle", "cPickle", "dill", "marshal", "shelve") and not (
                    isinstance(node, ast.ImportFrom) and [alias.name for alias in node.names] == ["UnpicklingError"]
                ):
                    found.append(f"line {node.lineno}: imports {module}")
                if any(f"{module}.".startswith(f"{known}.") for known in NETWORK_MODULES) and name not in NETWORK:
                    found.append(f"line {node.lineno}: imports {module}")
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called in ("eval", "exec", "compile", "__import__") or called in LOADERS or given.get("shell") == "True":
            found.append(f"line {node.lineno}: calls {called}")
        if called == "torch.load" and given.get("weights_only") != "True":
            found.append(f"line {node.lineno}: torch.load without weights_only=True")
        if called == "np.load" and given.get("allow_pickle") != "False":
            found.append(f"line {node.lineno}: np.load without allow_pickle=False")
        if called.endswith(("extractall", "unpack_archive")):
            found.append(f"line {node.lineno}: unpacks an archive")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_loads_code_from_data(path):
    assert faults(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "np.load(x)",
        "np.load(x, allow_pickle=True)",
        "yaml.load(x)",
        "eval(x)",
        "exec(x)",
        "subprocess.run(x, shell=True)",
        "os.system(x)",
        "import requests",
        "from urllib.request import urlopen",
        "import urllib.request",
        "tar.extractall(x)",
    ],
)
def test_the_reading_above_finds_faults(source):
    assert faults(source, "amp/x.py")


# -- YAML -------------------------------------------------------------------------------------------------------------

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
    """jsonargparse can make any class that a ``class_path`` names, where a setting's type lets it."""
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
