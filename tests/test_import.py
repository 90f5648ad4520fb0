"""The cost of `import amp`, and the content of the wheel."""

import re
import subprocess
import sys
import tarfile
import time
import zipfile
from email.parser import Parser

import pytest
from support.repository import QUIET_ENVIRONMENT, ROOT

HEAVY = (
    "torch",
    "open_clip",
    "deepspeed",
    "accelerate",
    "transformers",
    "webdataset",
    "matplotlib",
    "tensorboard",
    "jsonargparse",
    "numpy",
    "PIL",
    "rich",
)


def python(code: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=QUIET_ENVIRONMENT, text=True, capture_output=True, **options
    )


def test_import_is_quick_and_light():
    start = time.perf_counter()
    done = python(f"import sys, amp; print(*(m for m in {HEAVY} if m in sys.modules)); print(amp.__version__)")
    assert done.returncode == 0 and done.stderr == ""
    loaded, version = done.stdout.splitlines()
    assert loaded == "" and version
    assert time.perf_counter() - start < 5


def test_light_names_need_no_torch():
    done = python(
        "import sys, amp; amp.Knowledge, amp.Triplet, amp.AmpError, amp.PromptConfig; print('torch' in sys.modules)"
    )
    assert done.stdout.strip() == "False", done.stderr


def test_help_and_wrong_options_need_no_torch():
    """Every command except that of CLIP_benchmark, and every script in tools/ and launchers/."""
    scripts = [
        str(path.relative_to(ROOT)) for folder in ("tools", "launchers") for path in ROOT.glob(f"{folder}/**/*.py")
    ]
    scripts = [path for path in scripts if "__main__" in (ROOT / path).read_text()]
    done = python(
        "import contextlib, importlib, os, sys\n"
        "from amp.__main__ import COMMANDS\n"
        "sys.stdout = sys.stderr = open(os.devnull, 'w')\n"
        "for name in COMMANDS.keys() - {'clip_benchmark'}:\n"
        "    for option in ('--help', '--nonsense'):\n"
        "        with contextlib.suppress(SystemExit):\n"
        "            importlib.import_module(f'amp.commands.{name}').main([option])\n"
        "    assert 'torch' not in sys.modules, name\n"
        "import runpy\n"
        "sys.path.append('tools/scenes')\n"
        f"for script in {scripts}:\n"
        "    sys.argv = [script, '--help']\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        runpy.run_path(script, run_name='__main__')\n"
        "    assert 'torch' not in sys.modules, script\n"
        "print('torch' in sys.modules, file=sys.__stdout__)\n",
        cwd=ROOT,
    )
    assert done.stdout.strip() == "False", done.stderr


def test_every_exported_name_is_there():
    import amp

    assert set(amp.__all__) <= set(dir(amp))
    for name in amp.__all__:
        assert getattr(amp, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = amp.nonsense


def test_the_wheel_installs_amp_only(distributions):
    with zipfile.ZipFile(distributions[0]) as wheel:
        names = wheel.namelist()
        top = {name.split("/")[0] for name in names}
        metadata = Parser().parsestr(wheel.read(next(n for n in names if n.endswith("METADATA"))).decode())
    dist_info = next(name for name in top if name.endswith(".dist-info"))
    assert top == {"amp", dist_info} and dist_info.startswith("open_clip_amp-")
    modules = {str(path.relative_to(ROOT)) for end in ("py", "yaml") for path in (ROOT / "amp").rglob(f"*.{end}")}
    assert "amp/generation/prompts.yaml" in modules
    assert modules <= set(names) and "amp/py.typed" in names
    assert metadata["Name"] == "open-clip-amp"
    always = {re.match(r"[\w-]+", line)[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert {"torch", "open_clip_torch"} <= always and not {"accelerate", "deepspeed", "matplotlib"} & always
    # Lower and upper bounds, so that future installations still work.
    for line in metadata.get_all("Requires-Dist"):
        if line.startswith("open-clip-amp["):  # an extra that includes another
            continue
        assert ">=" in line and "<" in line, line


def test_the_source_archive_can_build_the_wheel(distributions):
    with tarfile.open(distributions[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "amp/__init__.py", "amp/train/engine.py"} <= names
