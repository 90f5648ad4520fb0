"""The core works without the extras' packages and without Linux, and a missing package is reported."""

import re
import subprocess
import sys
import tomllib

import pytest
from support.drawn_data import draw
from support.repository import QUIET_ENVIRONMENT, ROOT

import amp
from amp.errors import AmpError, exit_on_error, require
from amp.extras import INSTALLED_BY

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = {"pillow_heif": "pillow-heif", "prometheus_client": "prometheus-client"}
LINUX_MODULES = ("fcntl", "resource", "termios", "pwd", "grp")
LINUX_NAMES = {
    "os": "sched_getaffinity register_at_fork O_NOFOLLOW O_CLOEXEC O_NONBLOCK pread sysconf fork getuid mkfifo",
    "select": "poll epoll",
    "signal": "SIGUSR1 SIGUSR2 SIGHUP SIGALRM sigwaitinfo",
}
# A user's program. Its decoding worker is spawned, as on macOS and Windows, so it also runs the first half.
PROGRAM = """
import importlib, sys
from types import SimpleNamespace

folder, blocked, modules, names = sys.argv[1:5]
for name in blocked.split():
    sys.modules[name] = None
import torch, open_clip  # which may use what they find
for name in modules.split():
    sys.modules[name] = None
for name in names.split():
    owner, _, attribute = name.partition(".")
    delattr(importlib.import_module(owner), attribute)
sys.modules["msvcrt"] = SimpleNamespace(locking=lambda descriptor, mode, count: None, LK_NBLCK=2)

if __name__ == "__main__":
    import amp, amp.train.stopping, amp.cores
    from amp.commands.search import main

    torch.multiprocessing.set_start_method("spawn")
    amp.cores.use_cores = lambda workers, gpu: None
    amp.cores.decoding_workers = lambda wanted, gpu: wanted
    model, _, preprocess = amp.from_pretrained(f"{folder}/adapter.safetensors")
    knowledge = amp.Knowledge((amp.Triplet("dog", "jumps", ""),), ("The dog is in the air",))
    search = amp.Retriever(amp.Reranker(model, preprocess), f"{folder}/index", top_k=2)
    search.update(f"{folder}/photos", workers=0)
    assert len(search.search("A dog jumps", knowledge=knowledge).hits) == 3
    options = ["--index", f"{folder}/index", "--adapter", f"{folder}/adapter.safetensors", "--workers", "1"]
    main([*options, "--photos", f"{folder}/photos", "--knowledge", "none", "A dog jumps"])
    print("LOADED", *(name for name in blocked.split() if sys.modules[name] is not None))
    main([*options, "A dog jumps"])
"""


def test_the_core_needs_no_extra_and_no_linux(clip_folder, tmp_path):
    """Simulated by hiding the extras' packages and Linux-only features. This was not run on other systems."""
    (tmp_path / "photos").mkdir()
    for number in range(3):
        draw(number).save(tmp_path / "photos" / f"{number}.png")
    model, _, _ = amp.create_model_and_transforms(clip_folder, prompt_config=amp.PromptConfig(depth=0.5))
    amp.save_adapter(tmp_path / "adapter.safetensors", model)
    (tmp_path / "program.py").write_text(PROGRAM)
    names = [f"{module}.{name}" for module, found in LINUX_NAMES.items() for name in found.split()]
    done = subprocess.run(
        [sys.executable, "program.py", tmp_path, " ".join(INSTALLED_BY), " ".join(LINUX_MODULES), " ".join(names)],
        cwd=tmp_path,
        env={**QUIET_ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
    )
    assert "LOADED\n" in done.stdout, done.stderr
    assert done.stdout.count(".png") == 3
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("program.py: error: the rules can't work without the package spacy ")
    assert 'pip install "open-clip-amp[generate]", or turn the rules off' in done.stderr


def packages(extra: str | None = None) -> set[str]:
    """Names of the packages that the project or an extra requires, including those of nested extras."""
    lines = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    found = set()
    for line in lines:
        name, inner = re.match(r"([\w-]+)(?:\[([\w,-]+)\])?", line).groups()
        found |= {name} if name != "open-clip-amp" else set().union(*map(packages, inner.split(",")))
    return found


@pytest.mark.parametrize("module", INSTALLED_BY)
def test_what_an_error_names_installs_the_package(module):
    said = INSTALLED_BY[module]
    name = DISTRIBUTIONS.get(module, module)
    assert name not in packages()
    if extra := re.fullmatch(r"open-clip-amp\[(\w+)\]", said):
        assert name in packages(extra[1])
    else:
        assert said == name.replace("_", "-")


def test_every_package_of_an_extra_has_its_line():
    asked = set().union(
        *(
            packages(extra)
            for extra in ("train", "generate", "transformers", "report", "serve", "heic", "datasets", "remote", "onnx")
        )
    )
    assert asked == {DISTRIBUTIONS.get(name, name) for name in INSTALLED_BY} - {
        "clip_benchmark",
        "vllm",
    }


def test_a_missing_package_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["amp", "train"])
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(SystemExit) as ended, exit_on_error():
        import accelerate  # noqa: F401
    shown = capsys.readouterr().err
    assert ended.value.code == 2
    assert shown.startswith("amp train: error: this can't work without the package accelerate (")
    assert shown.endswith('); pip install "open-clip-amp[train]"\n')
    with pytest.raises(ModuleNotFoundError), exit_on_error():
        import no_such_module  # noqa: F401


def test_a_package_that_cant_be_loaded_is_named(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "matplotlib.py").write_text("raise ImportError('libopenblas.so: cannot open shared object file')")
    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    with pytest.raises(AmpError, match=r"the stage can't .* matplotlib \(libopenblas.*\[report\]\", or wait$"):
        require("matplotlib", "the stage", "wait")
    with pytest.raises(ImportError, match="no_such_module"):
        require("no_such_module", "nobody")
