"""The complete workflow with the real command lines: scenes, shards, both stages, evaluation."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.repository import QUIET_ENVIRONMENT, ROOT, launcher
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import amp
from amp.evaluate.adapters import adapted, read_adapters
from amp.files import sha256_of
from amp.model.adapter import read_adapter

pytestmark = pytest.mark.system

BASE = "local-dir:tools/scenes/micro-clip"
# In fp32, because in bf16 one and two processes round differently.
CONFIG = ["--config", "launchers/configs/scenes.yaml", "--mixed_precision", "no"]
STAGES = ("stage1", "stage2")


def run(*command, **environment) -> subprocess.CompletedProcess:
    """Runs a command in the repository's folder, as a user would type it."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**QUIET_ENVIRONMENT, **environment},
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("end-to-end")


@pytest.fixture(scope="module")
def ran(folder) -> dict[str, subprocess.CompletedProcess]:
    """Runs every command once. The two trainings use the same global batches, in one process and in two."""
    scenes, shards = folder / "scenes", folder / "shards"
    launch = ("-m", "accelerate.commands.launch", "--config_file")
    settings = (
        "launchers/train.py",
        *CONFIG,
        "--data.shards",
        shards,
        "--prompt.depth",
        0.67,
        "--data.workers",
        1,
        "--stage1.max_steps",
        6,
        "--stage2.epochs",
        1,
        "--stage1.lr",
        3e-3,
        "--stage2.lr",
        3e-3,
        "--log_every",
        2,
        "--validation_queries",
        6,
        "--validate_every",
        1,
    )
    adapters = [f"{name}={folder}/{name}/stage2/adapter.safetensors" for name in ("one", "two")]
    done = {}
    done["scenes"] = run(
        "tools/scenes/make_scenes.py",
        "--out",
        scenes,
        "--train",
        40,
        "--val",
        8,
        "--test",
        16,
        "--captions",
        2,
        "--size",
        72,
    )
    done["shards"] = run(
        "tools/make_shards.py",
        "--captions",
        scenes / "dataset.json",
        "--images",
        scenes / "images",
        "--knowledge",
        scenes / "knowledge.jsonl",
        "--knowledge_provenance",
        scenes / "knowledge_provenance.json",
        "--out",
        shards,
        "--samples_per_shard",
        12,
        "--workers",
        1,
    )
    done["one"] = run(
        *launch,
        "launchers/accelerate/one_process.yaml",
        *settings,
        "--data.batch_size",
        8,
        "--data.cache",
        folder / "cache",
        "--out",
        folder / "one",
    )
    done["two"] = run(
        *launch,
        "launchers/accelerate/one_node.yaml",
        "--num_processes",
        2,
        *settings,
        "--data.batch_size",
        4,
        "--data.cache",
        folder / "cache-of-two",
        "--out",
        folder / "two",
        ACCELERATE_USE_CPU="true",
    )
    done["evaluate"] = run(
        "-m",
        "amp.commands.evaluate",
        "--shards",
        shards,
        "--cache",
        folder / "cache",
        "--out",
        folder / "results.json",
        "--gallery",
        folder / "gallery.png",
        "--adapters",
        json.dumps(adapters),
        "--search.top_k",
        5,
    )
    return done


def adapter(folder: Path, name: str, stage: str) -> dict[str, torch.Tensor]:
    return load_file(folder / name / stage / "adapter.safetensors")


def test_no_command_warns(ran):
    for name, done in ran.items():
        suspicious = [
            line for line in (done.stderr + done.stdout).splitlines() if re.search("warn|error|deprec", line, re.I)
        ]
        assert not suspicious, (name, suspicious)


def test_the_log_tells_what_is_trained(ran):
    for name, processes in (("one", 1), ("two", 2)):
        log = ran[name].stderr
        assert f"40 training images, 80 captions, 5 steps of {8 // processes} x {processes} per epoch" in log
        assert "stage 1: 6 of 6 steps" in log and "stage 2: 5 of 5 steps" in log and "images/s" in log
        assert log.count("training images") == 1  # only one process logs
        assert len(re.findall("stage 1 epoch [12] validation R@1: t2i .*base", log)) == 2


def test_two_processes_end_with_the_weights_of_one(ran, folder):
    for stage in STAGES:
        one, two = (adapter(folder, name, stage) for name in ("one", "two"))
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_stage_2_trains_the_readout_alone(ran, folder):
    first, second = (adapter(folder, "one", stage) for stage in STAGES)
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    assert moved and all(name.startswith("interaction.readout.") for name in moved)
    assert first["interaction.readout.out.weight"].abs().max() > 1e-3  # its initial value is zero
    assert (first["interaction.readout.out.weight"] - second["interaction.readout.out.weight"]).abs().max() > 1e-3


def test_json_and_csv_agree(ran, folder):
    result = json.loads((folder / "results.json").read_text())
    with open(folder / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    names = ["base CLIP", *(f"{name} ({mode})" for name in ("one", "two") for mode in ("pairwise", "pooled"))]
    assert [row["name"] for row in result["rows"]] == [row["method"] for row in table] == names
    for row, line in zip(result["rows"], table, strict=True):
        total = 0.0
        for direction, queries in (("i2t", 16), ("t2i", 32)):
            assert row[direction]["queries"] == int(line[f"{direction}_queries"]) == queries
            for k in (1, 5, 10):
                value = row[direction]["recall"][f"R@{k}"]
                total += value
                assert float(line[f"{direction}_R@{k}"]) == pytest.approx(value, abs=0.00501)  # 13 of 32 is 40.625
                assert value <= row[direction]["ceiling"][f"R@{k}"] + 1e-6
                assert f"{value:.1f}" in ran["evaluate"].stdout
        assert float(line["Rsum"]) == pytest.approx(total, abs=0.05)
    protocol = result["protocol"]
    assert protocol["images"] == 16 and protocol["captions"] == 32 and protocol["top_k"] == 5
    assert protocol["knowledge"]["provenance"]["seed"] == 0


def test_both_trainings_rank_alike(ran, folder):
    result = json.loads((folder / "results.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    for mode in ("pairwise", "pooled"):
        for direction in ("i2t", "t2i"):
            one, two = (rows[f"{name} ({mode})"][direction]["recall"] for name in ("one", "two"))
            assert one == two
    for name, digest in result["protocol"]["adapters"].items():
        assert digest == sha256_of(folder / name / "stage2" / "adapter.safetensors")


def test_the_picture_is_one(ran, folder):
    with Image.open(folder / "gallery.png") as image:
        assert image.format == "PNG" and min(image.size) > 300
        assert len(image.convert("RGB").getcolors(1 << 24)) > 100


def test_the_saved_configuration_says_what_ran(ran, folder):
    options = launcher("launchers/train.py").parser()
    again = options.parse_args(["--config", str(folder / "one" / "config.yaml")]).as_dict()
    del again["config"]
    header, _ = read_adapter(folder / "one" / "stage2" / "adapter.safetensors")
    assert header.training["config"] == again
    assert header.training["stage"] == 2 and header.training["step"] == 5
    assert again["model"]["pretrained"] is None and again["stage1"]["lr"] == 3e-3


def test_tensorboard_has_the_curves(ran, folder):
    log = EventAccumulator(str(folder / "one" / "open-clip-amp")).Reload()
    assert [event.step for event in log.Scalars("stage1/loss")] == [1, 2, 4, 6]
    assert [event.step for event in log.Scalars("stage2/loss")] == [7, 8, 10, 11]
    assert all(0 < event.value < 1 for event in log.Scalars("stage1/temperature"))
    assert [event.step for event in log.Scalars("validation/t2i_R@1")] == [5, 6, 11]


def test_the_adapter_loads_into_a_model(ran, folder, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = str(folder / "two" / "stage2" / "adapter.safetensors")
    model, _, preprocess = amp.create_model_and_transforms(BASE, adapter=path)
    assert model.tower.first == 4
    image = preprocess(Image.open(folder / "scenes" / "images" / "test_00000.jpg"))[None]
    line = json.loads((folder / "scenes" / "knowledge.jsonl").read_text().splitlines()[-1])
    knowledge = amp.Knowledge(tuple(amp.Triplet(**t) for t in line["triplets"]), tuple(line["states"]))
    with torch.no_grad():
        text = model.encode_text(model.tokenizer(["a man chases a dog"]))
        plain, conditioned = model.encode_image(image), model.encode_image(image, [knowledge], text=text)
        expected = model.backbone.clip.encode_image(image)
    assert torch.equal(plain, expected)
    assert (conditioned - plain).abs().max() > 1e-3
    # Evaluation loads several adapters into one base model, one after the other.
    base, _, _ = amp.create_model_and_transforms(BASE)
    evaluated = adapted(base, BASE, read_adapters([f"two={path}"])["two"])
    assert evaluated.backbone.clip is base.backbone.clip and evaluated.config == model.config
    for name, value in load_file(path).items():
        assert torch.equal(model.state_dict()[name], value) and torch.equal(evaluated.state_dict()[name], value)
