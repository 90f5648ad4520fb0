"""ZeRO 1 to 3 over two processes: same weights as DDP, one checkpoint format, bit-exact resume after a kill."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import aim_settings
from support.repository import ROOT
from support.training_run import TrainingRun
from support.weights import largest_difference

import amp
from amp.errors import AmpError
from amp.train.checkpoints import Checkpoints
from amp.train.config import CheckpointSettings, DataSettings, ModelSettings, StageSettings, TrainConfig
from amp.train.launch import deepspeed_settings

pytestmark = pytest.mark.system
FILES = sorted((ROOT / "ds_configs").glob("*.json"))


# Adam amplifies rounding errors of gradients near zero. Ten steps with lr 3e-3 move a weight by up to 3e-2; on a
# processor with AVX-512 some weights differ by up to 1.7e-4.
ROUNDING = 1e-3


@pytest.fixture(scope="module")
def config(shards, clip_folder, tmp_path_factory) -> TrainConfig:
    """One stage of 10 steps on two processes with two images each, validated twice."""
    folder = tmp_path_factory.mktemp("deepspeed")
    return TrainConfig(
        out=str(folder / "run"),
        model=ModelSettings(clip_folder, None),
        prompt=amp.PromptConfig(**aim_settings(block=1, num_prompts=2, enrich=True)),
        data=DataSettings(str(shards), batch_size=2, workers=0, augment="none", cache=str(folder / "cache")),
        stages=[1],
        stage1=StageSettings(epochs=2, lr=3e-3, warmup_steps=3),
        trackers=[],
        mixed_precision="no",  # weights are compared with DDP, on any processor
        checkpoint=CheckpointSettings(every_steps=1, keep=20),
        validation_queries=3,
    )


def weights(config: TrainConfig, stage: int = 1) -> dict[str, torch.Tensor]:
    return load_file(Path(config.out) / f"stage{stage}" / "adapter.safetensors")


def finish(config: TrainConfig, world: int = 2) -> dict[str, torch.Tensor]:
    run = TrainingRun(config, world)
    assert run.wait(300) == [0] * world, run.said(0)[-3000:]
    return weights(config, config.stages[-1])


def under(config: TrainConfig, name: str, **changes) -> TrainConfig:
    return replace(config, out=f"{config.out}-{name}", deepspeed=f"ds_configs/{name}.json", **changes)


@pytest.fixture(scope="module")
def ddp(config) -> dict[str, torch.Tensor]:
    """Weights after stage 1 with DDP."""
    return finish(config)


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", ["zero1", "zero2_offload"])
def test_zero_trains_the_weights_of_ddp(config, ddp, name):
    assert largest_difference(finish(under(config, name)), ddp) < ROUNDING


@pytest.mark.parametrize("name", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_killed_zero_run_ends_with_the_same_bits(config, ddp, name, tmp_path):
    config = under(config, name)
    whole = finish(replace(config, out=config.out + "-whole"))
    assert largest_difference(whole, ddp) < ROUNDING
    run = TrainingRun(config, 2, tmp_path / "audit")
    assert run.wait_for_steps(6, timeout=300)
    run.signal(signal.SIGKILL)
    run.wait()
    names = sorted(path.name for path in (Path(config.out) / "checkpoints").glob("stage*"))
    assert "stage1-step00000003" in names and "stage1-step00000010" not in names
    # The checkpoint, with AdamW's state, can also be resumed in one process without DeepSpeed.
    moved = replace(config, out=config.out + "-moved", deepspeed=None, data=replace(config.data, batch_size=4))
    shutil.copytree(config.out, moved.out)
    resumed = finish(replace(config, data=replace(config.data, workers=1)))
    assert largest_difference(resumed, whole) == 0
    assert largest_difference(finish(moved, world=1), whole) < ROUNDING


def test_zero_goes_on_from_a_checkpoint_of_one_process(config, ddp, tmp_path):
    config = replace(config, out=config.out + "-from-one", data=replace(config.data, batch_size=4))
    run = TrainingRun(config, 1, tmp_path / "audit")
    assert run.wait_for_steps(6)
    run.signal(signal.SIGUSR1)
    assert run.wait() == [75]
    settings = json.loads((ROOT / "ds_configs/zero3.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # otherwise weights this small stay whole
    (tmp_path / "zero3.json").write_text(json.dumps(settings))
    rest = replace(config, deepspeed=str(tmp_path / "zero3.json"), data=replace(config.data, batch_size=2))
    assert largest_difference(finish(rest), ddp) < ROUNDING


def test_stage_2_keeps_what_it_does_not_train(config, ddp):
    """In bf16 with ZeRO-2, the weights of stage 1 stay in fp32, bit for bit."""
    init = str(Path(config.out) / "stage1" / "adapter.safetensors")
    second = finish(
        under(
            config, "zero2", stages=[2], init=init, mixed_precision="bf16", stage2=StageSettings(max_steps=3, lr=3e-3)
        )
    )
    moved = {name for name in ddp if not torch.equal(ddp[name], second[name])}
    assert moved and all(name.startswith("interaction.") for name in moved)
    assert all(value.dtype == torch.float32 for value in second.values())


def test_fp16_goes_on_with_its_loss_scale(config, tmp_path):
    if not torch.ops.mkldnn._is_mkldnn_fp16_supported():  # DeepSpeed's own check
        pytest.skip("DeepSpeed trains in fp16 on processors with AVX-512 only")
    config = under(config, "zero2", mixed_precision="fp16")
    config = replace(config, out=config.out + "-fp16")
    whole = finish(replace(config, out=config.out + "-whole"))
    run = TrainingRun(config, 2, tmp_path / "audit")
    assert run.wait_for_steps(7, timeout=300)
    run.signal(signal.SIGKILL)
    run.wait()
    newest = Checkpoints(config.out).newest([1])
    assert newest.step >= 5 and 1 < newest.state["loss_scale"]["cur_scale"] < 2**16  # lowered in the first steps
    assert newest.state["updates"] < newest.step  # skipped steps are not counted as errors
    assert newest.state["skipped"] == 0 and not (Path(config.out) / "skipped.jsonl").exists()
    assert largest_difference(finish(config), whole) == 0
    assert all(value.dtype == torch.float32 for value in whole.values())


# -- configuration files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "precision"),
    list(zip(FILES, ["no", "bf16", "fp16", "bf16"], strict=True)),
    ids=lambda x: x if isinstance(x, str) else x.stem,
)
def test_shipped_files_get_the_numbers_of_the_run(config, path, precision):
    run = replace(config, mixed_precision=precision, gradient_accumulation=3, max_grad_norm=0.5)
    settings = deepspeed_settings(str(path), run, world=8)
    assert settings["zero_optimization"] == json.loads(path.read_text())["zero_optimization"]
    assert settings["train_micro_batch_size_per_gpu"] == 2 and settings["gradient_accumulation_steps"] == 3
    assert settings["train_batch_size"] == 2 * 3 * 8 and settings["gradient_clipping"] == 0.5
    # bf16 uses autocast instead of DeepSpeed's bf16 section, so the weights stay in fp32.
    assert settings["torch_autocast"]["enabled"] == (precision == "bf16")
    assert settings["bf16"] == {"enabled": False} and settings["fp16"] == {"enabled": precision == "fp16"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not a DeepSpeed file"),
        ("[]", "not a DeepSpeed file"),
        ("{}", "zero_optimization.stage; copy ds_configs/zero2.json"),
        ('{"zero_optimization": {"stage": 0}}', "stage is 0, expected 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 2}, "train_batch_size": 32}', "train_batch_size is 32, but .* make it 4"),
        ('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}', "bf16 is .*mixed_precision"),
    ],
)
def test_wrong_files_are_refused(config, content, said, tmp_path):
    path = tmp_path / "own.json"
    path.write_text(content)
    with pytest.raises(AmpError, match=said):
        deepspeed_settings(str(path), config, world=2)
    automatic = '{"zero_optimization": {"stage": 2}, "train_batch_size": "auto"}'
    path.write_text(automatic)
    assert deepspeed_settings(str(path), config, world=2)["train_batch_size"] == 4


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_commented_twin_says_the_same(path):
    page = (ROOT / "docs/deepspeed.md").read_text()
    block = page.partition(f"## {path.name}")[2].partition("```jsonc")[2].partition("```")[0]
    plain = "\n".join(line.partition("//")[0] for line in block.splitlines())
    assert json.loads(plain) == json.loads(path.read_text())
