"""From shards to training with knowledge of a real model: generate, rewrite, train; also with kills in between."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
from support.drawn_data import draw_dataset
from support.repository import QUIET_ENVIRONMENT, ROOT
from support.training_run import TrainingRun, small_run

from amp.data.conversion.make import make_shards
from amp.data.conversion.rewrite import rewrite_knowledge
from amp.data.split import ShardSplit
from amp.generation.run import generate_knowledge
from amp.terminal import PlainConsole
from amp.train.config import StageSettings

pytestmark = pytest.mark.system

QUIET = PlainConsole(quiet=True)


def draw_shards(root, train: int):
    arguments = draw_dataset(root / "drawn", {"train": train, "val": 1})
    arguments.pop("knowledge")
    make_shards(**arguments, out=str(root / "shards"), workers=1, console=QUIET)
    return root / "shards"


def test_generate_rewrite_train(tmp_path, smollm2, clip_folder):
    pytest.importorskip("llguidance", reason='needs llguidance: pip install "open-clip-amp[generate]"')
    shards = draw_shards(tmp_path, 4)
    summary = generate_knowledge(
        str(shards),
        str(tmp_path / "out"),
        engine="transformers",
        engine_options={"model": str(smollm2)},
        fallback="none",
        max_fallback=1.0,
        console=QUIET,
    )
    assert summary.captions == 9 and summary.distinct == 9 and sum(summary.triplets.values()) >= 5
    assert set(summary.triplets) <= {"strict", "repaired", "retry1", "retry2"}
    out = tmp_path / "out"
    manifest = rewrite_knowledge(
        str(shards), str(out / "knowledge.jsonl"), str(out / "knowledge_provenance.json"), console=QUIET
    )
    provenance = manifest.provenance["knowledge"]["provenance"]
    assert provenance["engine"]["weights"]["sha256"] and provenance["template"]["name"] == "default"
    split = ShardSplit(shards, "train")
    stored = [len(knowledge.triplets) for record in split.records() for _, knowledge in split.captions(record)]
    assert len(stored) == 7 and sum(stored) > 0
    config = small_run(
        shards,
        clip_folder,
        tmp_path,
        {"batch_size": 4},
        stage1=StageSettings(epochs=2),
        stages=[1],
    )
    assert TrainingRun(config).wait() == [0]
    assert (tmp_path / "run" / "stage1" / "adapter.safetensors").exists()


@pytest.mark.slow
def test_killed_with_a_real_model(tmp_path, smollm2):
    """Five SIGKILLs during decoding. In fp32 the replies equal those of an undisturbed run."""
    shards = draw_shards(tmp_path, 20)

    def command(out):
        script, model = (
            str(ROOT / "tools" / "generate_knowledge.py"),
            ["--engine", "transformers", "--model", str(smollm2)],
        )
        setting = ["--transformers.batch_size", "4", "--fallback", "none", "--max_fallback", "1"]
        return [sys.executable, script, "--captions", str(shards), "--out", str(out), *model, *setting]

    alone, killed = tmp_path / "alone", tmp_path / "killed"
    subprocess.run(command(alone), check=True, env=QUIET_ENVIRONMENT, capture_output=True)
    random.seed(0)
    for kill in range(5):
        process = subprocess.Popen(command(killed), env=QUIET_ENVIRONMENT, stderr=subprocess.DEVNULL)
        cache = killed / "cache"
        size, deadline = sum(file.stat().st_size for file in cache.glob("*")), time.monotonic() + 300
        while sum(file.stat().st_size for file in cache.glob("*")) == size:
            assert process.poll() is None and time.monotonic() < deadline, kill
            time.sleep(0.02)
        time.sleep(random.uniform(0, 1.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command(killed), check=True, env=QUIET_ENVIRONMENT, capture_output=True)
    assert (killed / "knowledge.jsonl").read_bytes() == (alone / "knowledge.jsonl").read_bytes()
    keys = [json.loads(line)["key"] for file in (killed / "cache").glob("*") for line in file.read_text().splitlines()]
    assert len(keys) == len(set(keys))
