"""Training runs in this process: which settings may change the result, and which may not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.processes import forget_accelerate
from support.training_run import small_run
from support.weights import largest_difference

from amp import launch
from amp.data.order import BatchOrder
from amp.data.split import ShardSplit
from amp.errors import AmpError
from amp.model.adapter import read_adapter
from amp.model.config import PromptConfig
from amp.train.checkpoints import open_checkpoint
from amp.train.config import CheckpointSettings, StageSettings, TrainConfig
from amp.train.engine import train

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def config(shards, clip_folder, tmp_path, cache_folder) -> TrainConfig:
    """One short stage with 5 batches of 4 images per epoch."""
    return small_run(
        shards,
        clip_folder,
        tmp_path,
        {"batch_size": 4},
        cache_folder,
        stages=[1],
        stage1=StageSettings(epochs=1, lr=3e-3, warmup_steps=1),
        stage2=StageSettings(epochs=1, lr=3e-3, warmup_steps=1),
        checkpoint=CheckpointSettings(resume=False),
    )


def weights_of(config: TrainConfig, **changes) -> dict[str, torch.Tensor]:
    forget_accelerate()
    return load_file(train(replace(config, **changes)))


def test_a_run_can_be_repeated_bit_for_bit(config):
    first = weights_of(config)
    assert largest_difference(first, weights_of(config)) == 0
    assert largest_difference(first, weights_of(config, seed=1)) > 1e-3


@pytest.mark.parametrize("conditioning", ["control", "paired", "contrastive"])
def test_what_only_saves_memory_or_time_changes_nothing(config, conditioning):
    if conditioning == "control":
        config = replace(config, prompt=replace(config.prompt, knowledge="none"))
    else:
        config = replace(config, conditioning=conditioning)
    config = replace(config, stages=[1, 2])
    expected = weights_of(config)
    # Stored features and recomputed activations. Validation uses no random numbers, and must put the model back into
    # training mode.
    changed = replace(
        config,
        activation_checkpointing=True,
        data=replace(config.data, cache_images=True, val_split="val"),
        validation_queries=3,
    )
    assert largest_difference(weights_of(changed), expected) < 2e-5
    assert largest_difference(weights_of(config, data=replace(config.data, workers=1)), expected) == 0


def test_random_crops_are_those_of_the_sample_whatever_worker_draws_them(config):
    data = replace(config.data, augment="crop")
    assert largest_difference(weights_of(config, data=data), weights_of(config, data=replace(data, workers=2))) == 0


def test_two_launches_of_one_stage_are_the_run_of_both(config):
    both = weights_of(config, stages=[1, 2])
    first = f"{config.out}/stage1/adapter.safetensors"
    again = weights_of(config, stages=[2], init=first, out=config.out + "-2")
    assert largest_difference(again, both) < 2e-5
    assert largest_difference(load_file(first), both) > 1e-3


@pytest.mark.parametrize("cache_images", [False, True])
def test_stored_features_in_float16_are_close(config, cache_images):
    data = replace(config.data, cache_images=cache_images)
    exact = weights_of(config, data=data)
    rounded = weights_of(config, data=replace(data, cache_dtype="float16"))
    # AdamW's first steps follow the sign of the gradient, so single weights may differ.
    assert 0 < largest_difference(exact, rounded) < 3e-2
    for name, value in exact.items():
        assert float((value - rounded[name]).abs().mean()) < 1e-3, name


@pytest.mark.parametrize(
    ("flags", "gpu", "expected"),
    [
        ("fpu avx2 fma", False, "no"),
        ("avx512f avx512_bf16", False, "bf16"),
        ("asimd bf16", False, "bf16"),
        ("fpu", True, "bf16"),
    ],
)
def test_auto_takes_bf16_where_it_is_fast(config, flags, gpu, expected, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: {flags}\n")
    monkeypatch.setattr(launch, "Path", lambda _: tmp_path / "cpuinfo")
    assert launch.precision_of(replace(config, mixed_precision="auto"), gpu) == expected
    assert launch.precision_of(replace(config, mixed_precision="no"), gpu) == "no"


def test_mixed_precision_trains_fp32_weights(config):
    weights = weights_of(config, mixed_precision="bf16", stages=[1, 2])
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights.values())
    exact = weights_of(config, stages=[1, 2])
    assert 0 < largest_difference(exact, weights) < 0.1


@pytest.mark.parametrize(
    ("epochs", "accumulation", "max_steps", "steps"),
    [(2, 1, 7, 7), (2, 2, 0, 4), (1, 2, 0, 2), (1, 5, 0, 1)],
)
def test_the_number_of_optimizer_steps(config, epochs, accumulation, max_steps, steps):
    settings = StageSettings(epochs=epochs, max_steps=max_steps)
    path = train(replace(config, stage1=settings, gradient_accumulation=accumulation))
    assert read_adapter(path)[0].training["step"] == steps


def test_fewer_images_than_an_optimizer_step_are_refused(config):
    with pytest.raises(AmpError, match="22 images, fewer than one step of 4 x 1 processes x 6 batches = 24"):
        train(replace(config, gradient_accumulation=6))


def test_no_epoch_is_refused(config):
    with pytest.raises(AmpError, match=r"stage1.epochs is 0, expected 1 or more"):
        train(replace(config, stage1=StageSettings(epochs=0)))


@pytest.mark.parametrize("conditioning", ["control", "paired", "readout"])
def test_accumulated_parts_of_a_batch_are_the_batch(config, conditioning):
    """Batches of 1 x 16 and 4 x 4 give the same images, negatives, losses and weights."""
    prompt = {
        "control": replace(config.prompt, knowledge="none"),
        "paired": config.prompt,
        "readout": PromptConfig(depth=1 / 3, num_prompts=2),
    }[conditioning]
    config = replace(
        config,
        prompt=prompt,
        conditioning="paired" if conditioning == "paired" else "contrastive",
        stages=[1, 2],
        knowledge_dropout=0.0 if conditioning == "control" else 0.3,
        stage1=StageSettings(epochs=3, lr=3e-3, warmup_steps=1),
    )
    whole = weights_of(config, data=replace(config.data, batch_size=16))
    parts = weights_of(config, gradient_accumulation=4)
    start = weights_of(
        config, data=replace(config.data, batch_size=16), stage1=StageSettings(max_steps=1, lr=1e-12), stages=[1]
    )
    assert largest_difference(whole, start) > 1e-3
    assert largest_difference(whole, parts) < 2e-5


def test_parts_that_draw_their_own_negatives_are_averaged(config, monkeypatch):
    """For `contrastive` without readout and plain SGD, a step of two batches is the mean of the two single steps."""
    from amp.train import loop

    monkeypatch.setattr(
        loop,
        "adamw",
        lambda model, lr, *_: torch.optim.SGD(
            [{"params": [p for p in model.parameters() if p.requires_grad], "peak": lr}], lr
        ),
    )
    monkeypatch.setattr(loop, "learning_rate", lambda *_: 0.1)
    plain = {"max_grad_norm": 0.0, "stage1": StageSettings(max_steps=1), "gradient_accumulation": 2}
    two = weights_of(config, **plain)
    start, moved_by = {}, []
    contrastive = loop.Objective._contrastive

    def only(batch):
        """Zeroes the loss of all batches except one."""

        def call(self, model, data, number):
            start.update({k: v.clone() for k, v in model.adapter_state().items()})
            loss, scale = contrastive(self, model, data, number)
            return loss * (number == batch), scale

        return call

    for batch in (0, 1):
        monkeypatch.setattr(loop.Objective, "_contrastive", only(batch))
        moved_by.append(weights_of(config, **plain))
    moved = 0.0
    for name, value in two.items():
        expected = start[name] + sum(part[name] - start[name] for part in moved_by)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)
        moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 1e-3


def test_random_crops_differ_from_the_validation_transform(config):
    assert largest_difference(weights_of(config), weights_of(config, data=replace(config.data, augment="crop"))) > 1e-4


def test_dropped_attributes_change_the_result(config):
    assert (
        largest_difference(weights_of(config), weights_of(config, data=replace(config.data, kinds=["action"]))) > 1e-4
    )


def test_a_loss_that_stays_infinite_stops_the_run(config):
    stage = StageSettings(epochs=5, lr=1e30, warmup_steps=1)
    with pytest.raises(AmpError, match=r"step 5: the loss is nan.*in 4 steps in a row.*max_skipped = 3.*stage1\.lr"):
        train(replace(config, stage1=stage, max_skipped=3))
    lines = [json.loads(line) for line in (Path(config.out) / "skipped.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 5]
    assert all(line["loss"] == "nan" and len(set(line["keys"])) == 4 for line in lines)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_batch_whose_loss_is_not_finite_is_skipped_and_counted(config, monkeypatch, max_grad_norm):
    """The weights equal those of a run in which this step changed nothing. AdamW doesn't count the step."""
    from amp.train import loop

    parts = loop.Objective.parts

    def spoilt(self, model, batches, step):
        for loss, scale in parts(self, model, batches, step):
            yield loss * (float("inf") if step == 2 else 1.0), scale

    monkeypatch.setattr(loop.Objective, "parts", spoilt)
    skipped = weights_of(config, max_grad_norm=max_grad_norm)
    state = open_checkpoint(Path(config.out) / "checkpoints" / "stage1-step00000005").state
    assert (state["step"], state["skipped"], state["updates"]) == (5, 1, 4)
    (line,) = (Path(config.out) / "skipped.jsonl").read_text().splitlines()
    split = ShardSplit(config.data.shards, "train")
    samples = [index for index, _ in list(BatchOrder(split.sizes, 4, 0, 1, config.seed))[2]]
    assert json.loads(line)["keys"] == [split.record(index)["key"] for index in samples]

    monkeypatch.setattr(loop.Objective, "parts", parts)
    update = loop.StageLoop.update

    def drop(self):
        if self.step == 2:
            self.optimizer.zero_grad()
            return False
        return update(self)

    monkeypatch.setattr(loop.StageLoop, "update", drop)
    assert largest_difference(weights_of(config, max_grad_norm=max_grad_norm), skipped) == 0


def test_a_wrong_shards_folder_shows_before_the_model_is_built(config, monkeypatch, tmp_path):
    def build(*args, **kwargs):
        raise AssertionError("the model, perhaps a download of gigabytes, was built first")

    monkeypatch.setattr("amp.train.engine.create_model_and_transforms", build)
    missing = replace(config, data=replace(config.data, shards=str(tmp_path / "nowhere")))
    with pytest.raises(AmpError, match="nowhere: no such folder"):
        train(missing)


def test_mining_changes_the_batches_and_needs_no_stored_tokens(config):
    """Mining only needs base features; stored tokens don't change the groups."""
    plain, mined = weights_of(config), weights_of(config, mined_group=2)
    assert largest_difference(plain, mined) > 1e-3
    stored = weights_of(config, mined_group=2, data=replace(config.data, cache_images=True))
    assert largest_difference(stored, mined) < 1e-4
