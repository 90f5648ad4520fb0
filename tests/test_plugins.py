"""The plugins of docs/extending.md, as modules outside the package, used through the commands."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.repository import QUIET_ENVIRONMENT, ROOT

from amp import plugins
from amp.data.captions import Caption, base, load_captions, register_captions_format
from amp.data.shards import ShardManifest, ShardReader
from amp.errors import AmpError
from amp.generation.engines import base as engines
from amp.generation.engines import register_engine
from amp.model import towers
from amp.model.clip import ActionAwareCLIP
from amp.model.config import PromptConfig
from amp.model.factory import load_clip

PAGE = (ROOT / "docs/extending.md").read_text()


def write_plugin(folder: Path, name: str) -> None:
    """Writes the page's code block for this module."""
    code = re.search(rf"^```python\n(# {name}\.py\n.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert code is not None
    (folder / f"{name}.py").write_text(code[1])


def amp(folder: Path, plugin: str, *arguments: str) -> str:
    """Runs a command in the folder with a plugin; returns its output."""
    environment = {**QUIET_ENVIRONMENT, "AMP_PLUGINS": plugin, "PYTHONPATH": os.pathsep.join((".", str(ROOT)))}
    done = subprocess.run(
        [sys.executable, "-m", "amp", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def command_of(start: str) -> list[str]:
    """Arguments of the page's command, without ``amp``."""
    line = re.search(rf" amp ({start} .*)$", PAGE, re.MULTILINE)
    assert line is not None
    return line[1].split()


def test_a_captions_format_from_outside(tmp_path):
    write_plugin(tmp_path, "flickr_token")
    (tmp_path / "Images").mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / "Images" / name)
    (tmp_path / "Flickr8k.token").write_text("a.jpg#0\tA dog runs\na.jpg#1\tA dog jumps , high\nb.jpg#0\tA cat\n")
    amp(tmp_path, "flickr_token", *command_of("make_shards"))
    with ShardReader(ShardManifest.load(tmp_path / "data/flickr8k").split("train")[0].path) as reader:
        records = {(record := reader.record(i))["filename"]: record for i in range(len(reader))}
    captions = {name: [caption["text"] for caption in record["captions"]] for name, record in records.items()}
    assert captions == {"a.jpg": ["A dog runs", "A dog jumps , high"], "b.jpg": ["A cat"]}


def test_an_engine_from_outside(tmp_path):
    write_plugin(tmp_path, "first_words")
    (tmp_path / "captions.csv").write_text("image,caption\na.jpg,Dogs run on a beach\n")
    assert "--first_words.lower" in amp(tmp_path, "first_words", "generate_knowledge", "--help")
    amp(tmp_path, "first_words", *command_of("generate_knowledge"))
    record = json.loads((tmp_path / "knowledge/toy/knowledge.jsonl").read_text())
    assert record["triplets"] == [{"subject": "dogs", "action": "run", "object": "", "kind": "action"}]
    assert record["states"] == ["The photo shows this: Dogs run on a beach"]
    assert record["sources"] == [{"triplet": "strict", "state": "strict"}]


def test_an_interaction_from_outside(clip_folder, shards, tmp_path):
    """It is trained, recorded in its adapter, and loaded again, without changing the package."""
    write_plugin(tmp_path, "film")
    command = " ".join(command_of("train")).replace("SHARDS", str(shards)).split()
    options = [
        "--model.name",
        clip_folder,
        "--model.pretrained",
        "null",
        "--data.batch_size",
        "4",
        "--data.workers",
        "0",
    ]
    options += ["--stage1.epochs", "1", "--stage1.max_steps", "2", "--stage2.max_steps", "2", "--trackers", "[]"]
    amp(tmp_path, "film", *command, *options)
    program = "import sys, amp; model, *_ = amp.from_pretrained(sys.argv[1]); print(model.interaction)"
    adapter = "runs/film/stage2/adapter.safetensors"
    environment = {**QUIET_ENVIRONMENT, "AMP_PLUGINS": "film", "PYTHONPATH": os.pathsep.join((".", str(ROOT)))}
    found = [sys.executable, "-c", program, adapter]
    done = subprocess.run(found, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "Film(" in done.stdout and "out_features=32" in done.stdout, done.stderr
    bare = subprocess.run(found, cwd=tmp_path, env={**environment, "AMP_PLUGINS": ""}, capture_output=True, text=True)
    assert "interaction is 'film', expected one of readout, aim, cat" in bare.stderr and "AMP_PLUGINS" in bare.stderr


def test_a_tower_from_outside(fresh, clip_folder, tmp_path):
    write_plugin(tmp_path, "wrapped")
    fresh.syspath_prepend(str(tmp_path))
    fresh.setenv("AMP_PLUGINS", "wrapped")
    clip, _, _ = load_clip(clip_folder)
    images = torch.rand(2, 3, *clip.visual.image_size)
    expected = clip.encode_image(images)
    plugins.load_plugins()
    clip.visual = sys.modules["wrapped"].Wrapped(clip.visual)
    model = ActionAwareCLIP(clip, PromptConfig(num_prompts=0))
    torch.testing.assert_close(model.image_features(images), expected)


@pytest.fixture
def fresh(monkeypatch):
    """Gives a test its own registries, without loaded plugins."""
    changed = [(base, "_READERS"), (base, "_SUFFIXES"), (engines, "_ENGINES"), (towers, "TOWERS")]
    for module, name in changed:
        monkeypatch.setattr(module, name, dict(getattr(module, name)))
    plugins.load_plugins.cache_clear()
    yield monkeypatch
    plugins.load_plugins.cache_clear()
    for module in ("flickr_token", "wrapped"):
        sys.modules.pop(module, None)


def test_an_entry_point_is_loaded(fresh, tmp_path):
    """An entry point as of an installed package."""
    write_plugin(tmp_path, "flickr_token")
    package = tmp_path / "toy-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[open_clip_amp.plugins]\nflickr_token = flickr_token\n")
    fresh.syspath_prepend(str(tmp_path))
    (tmp_path / "x.token").write_text("a.jpg#0\tA dog\n")
    assert load_captions(tmp_path / "x.token").images[0].captions == [Caption(0, "A dog")]


def test_a_plugin_that_is_missing_is_named(fresh, tmp_path):
    fresh.setenv("AMP_PLUGINS", "no_such_plugin")
    with pytest.raises(AmpError, match=r"AMP_PLUGINS: module 'no_such_plugin' can't be imported .*PYTHONPATH"):
        load_captions(tmp_path / "x.token")


def test_names_are_taken_once_and_unknown_ones_refused(fresh, tmp_path):
    for name in ("csv", "auto"):
        with pytest.raises(AmpError, match=f"captions format '{name}' is already registered"):
            register_captions_format(name, (), lambda path, splits: None)
    for name in ("openai", "rules"):
        with pytest.raises(AmpError, match=f"engine '{name}' is already registered"):
            register_engine(name, int)
    with pytest.raises(AmpError, match="format is 'xml'; expected one of auto, karpathy, csv, jsonl"):
        load_captions(tmp_path / "x.csv", "xml")
    with pytest.raises(AmpError, match="engine is 'gpt'; expected one of rules, transformers, openai, vllm"):
        engines.find_engine("gpt")
