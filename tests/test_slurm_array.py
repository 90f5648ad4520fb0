"""Slurm job arrays: conversion with tasks that fail, are requeued or are cancelled, and shared features."""

import pytest
from support.drawn_data import draw_dataset

from amp.data.conversion.make import make_shards
from amp.data.shards import ShardManifest, ShardReader

pytestmark = pytest.mark.system

TASKS = 4


def test_job_array(slurm, tmp_path):
    dataset = draw_dataset(tmp_path, {"train": 48, "test": 12})
    make_shards(**dataset, out=str(tmp_path / "plain"), samples_per_shard=4, workers=1)
    plain = ShardManifest.load(tmp_path / "plain")
    out = tmp_path / "out"
    arguments = [f"--{key}={value}" for key, value in {**dataset, "out": out, "samples_per_shard": 4}.items()]

    def submit(*options: str) -> str:
        logs = f"--output={tmp_path}/%A_%a.log" if "--array" in options[0] else f"--output={tmp_path}/%j.log"
        return slurm.sbatch(*options, logs, "launchers/slurm/make_shards.sbatch", *arguments)

    def log(job: str) -> str:
        return (tmp_path / f"{job}.log").read_text()

    # An image of shard 2, which belongs to task 2, is truncated: 1 of 60 is more than may be skipped.
    with ShardReader(plain.split("train")[2].path) as reader:
        image = tmp_path / "images" / reader.read(1)[1]["filename"]
    content = image.read_bytes()
    image.write_bytes(content[:100])
    array = submit(f"--array=0-{TASKS - 1}")
    last = submit(f"--dependency=afterany:{array}")
    slurm.wait(last, {"FAILED"})
    states = [slurm.state(f"{array}_{task}") for task in range(TASKS)]
    assert states == ["COMPLETED", "COMPLETED", "FAILED", "COMPLETED"]
    assert f"(part 2/{TASKS}): 1 of 60 images" in log(f"{array}_2") and image.name in log(f"{array}_2")
    assert "1 of 60 images" in log(last) and image.name in log(last)
    assert not (out / "manifest.json").exists()
    assert len(list(out.glob("*.tar"))) == 15
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}

    # A requeued task finds its shards and appends to its log.
    slurm.run("scontrol", "requeue", f"{array}_0")
    slurm.wait(f"{array}_0", {"COMPLETED"})
    assert log(f"{array}_0").count(f"part 0/{TASKS}: 4 of its 4 shards are complete") == 2

    # Repairs the image and submits again. Task 2 is cancelled before it starts, so the last job writes its shard.
    image.write_bytes(content)
    array = submit(f"--array=0-{TASKS - 1}", "--hold")
    last = submit(f"--dependency=afterany:{array}")
    slurm.run("scancel", f"{array}_2")
    slurm.run("scontrol", "release", array)
    slurm.wait(last, {"COMPLETED"})
    assert not (tmp_path / f"{array}_2.log").exists()
    assert "keeping 14 of 15 shards that are already complete" in " ".join(log(last).split())
    assert {name for name, time in times.items() if (out / name).stat().st_mtime_ns != time} == {"train-000002.tar"}
    for shard in (shard for shards in plain.splits.values() for shard in shards):
        assert (out / shard.name).read_bytes() == shard.path.read_bytes()
    made, expected = (manifest.to_dict() for manifest in (ShardManifest.load(out), plain))
    assert made["provenance"].pop("command")[0] == "make_shards.py" and expected["provenance"].pop("command") is None
    assert made == expected


def test_features_by_a_job_array(slurm, shards, clip_folder, tmp_path):
    settings = {
        "data.shards": shards,
        "data.cache": tmp_path / "cache",
        "data.workers": 0,
        "model.name": clip_folder,
        "model.pretrained": "null",
        "prompt.depth": 0.34,
    }
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    logs = f"--output={tmp_path}/%A_%a.log"
    array = slurm.sbatch("--array=0-1", "--cpus-per-task=1", logs, "launchers/slurm/prepare.sbatch", *arguments)
    for task in range(2):
        slurm.wait(f"{array}_{task}", {"COMPLETED"})
        assert "all features of" in (tmp_path / f"{array}_{task}.log").read_text()
    manifest = ShardManifest.load(shards)
    count = sum(len(manifest.split(split)) for split in ("train", "val"))
    texts = [path.name for path in (tmp_path / "cache").glob("text-*/*")]
    assert len(texts) == 2 * count and all(name.startswith("shard-") for name in texts)
    assert len(list((tmp_path / "cache").glob("image-*"))) == len(manifest.split("val"))
