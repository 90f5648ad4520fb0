"""A run that is killed, stopped or moved ends with the same samples and the same bits as an undisturbed run."""

import functools
import json
import random
import shutil
import signal
import time
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.drawn_data import draw_shards
from support.models import write_clip_folder
from support.processes import forget_accelerate
from support.training_run import TrainingRun, small_run, steps_of
from support.weights import same_bits

from amp.data.split import ShardSplit
from amp.errors import AmpError
from amp.retrieval.split_search import SplitSearch
from amp.train.config import CheckpointSettings, StageSettings, TrainConfig
from amp.train.engine import train
from amp.train.stopping import StopRequest

pytestmark = pytest.mark.system


STAGES = ("stage1", "stage2")
EPOCHS = (2, 6)  # of both stages, with 5 steps each


def configured(shards, clip_folder, folder: Path, cache: Path, epochs: tuple[int, int] = EPOCHS) -> TrainConfig:
    """Two stages with 5 global batches of 4 per epoch, and all random choices: crops, captions, negatives, dropout."""
    return small_run(
        shards,
        clip_folder,
        folder,
        {"batch_size": 4, "augment": "crop"},
        cache,
        stage1=StageSettings(epochs=epochs[0], lr=3e-3, warmup_steps=3),
        stage2=StageSettings(epochs=epochs[1], lr=3e-3, warmup_steps=3),
        knowledge_dropout=0.2,
        checkpoint=CheckpointSettings(every_steps=2, keep=2),
    )


@pytest.fixture
def config(shards, clip_folder, tmp_path, cache_folder) -> TrainConfig:
    """See `configured`."""
    return configured(shards, clip_folder, tmp_path, cache_folder)


def final(config: TrainConfig) -> dict[str, torch.Tensor]:
    return {
        f"stage{stage}.{name}": value
        for stage in config.stages
        for name, value in load_file(Path(config.out) / f"stage{stage}" / "adapter.safetensors").items()
    }


def on_ranks(config: TrainConfig, world: int) -> TrainConfig:
    """The run with the same global batch on `world` processes."""
    return replace(config, data=replace(config.data, batch_size=4 // world))


@pytest.fixture(scope="module")
def undisturbed(shards, clip_folder, cache_folder, tmp_path_factory):
    """A function of (world, epochs) that returns the final weights and the audit of an undisturbed run."""

    @functools.cache
    def trained(world: int, epochs: tuple[int, int]) -> tuple[dict[str, torch.Tensor], Path]:
        folder = tmp_path_factory.mktemp("undisturbed")
        alone = on_ranks(configured(shards, clip_folder, folder, cache_folder, epochs), world)
        assert TrainingRun(alone, world, folder / "audit").wait() == [0] * world
        return final(alone), folder / "audit"

    return trained


def samples_by_step(audit: Path) -> dict[tuple[int, int], set[tuple[int, ...]]]:
    """Samples of the global batch by (stage, step). Fails if repeated steps saw different samples."""
    by_rank = defaultdict(set)
    for line in audit.read_text().splitlines():
        line = json.loads(line)
        by_rank[line["stage"], line["step"], line["rank"]].add(tuple(line["samples"]))
    out = defaultdict(set)
    for (stage, step, rank), seen in sorted(by_rank.items()):
        assert len(seen) == 1, f"stage {stage} step {step} rank {rank} has seen {seen}"
        out[stage, step].add((rank, *seen.pop()))
    return out


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("most", "epochs"), [(3, EPOCHS), pytest.param(20, (12, 5), marks=pytest.mark.slow)])
def test_killed_at_random_points_it_ends_as_if_never_killed(config, undisturbed, world, most, epochs, tmp_path):
    """In stage 1 and in stage 2."""
    stages = {stage: replace(getattr(config, stage), epochs=n) for stage, n in zip(STAGES, epochs, strict=True)}
    config = on_ranks(replace(config, **stages), world)
    expected, audit_alone = undisturbed(world, epochs)
    draw, audit, kills = random.Random(world), tmp_path / "audit", 0
    while True:
        # A different number of decoding workers each time; the stream position doesn't depend on it.
        data = replace(config.data, workers=draw.choice([0, 1, 2]))
        run = TrainingRun(replace(config, data=data), world, audit)
        if kills >= most or not run.wait_for_steps(draw.randint(2, 6)):
            assert run.wait() == [0] * world
            break
        time.sleep(draw.random() * 0.06)  # at any point of a step or a save
        run.signal(signal.SIGKILL)
        run.wait()
        kills += 1
    assert kills >= most
    assert same_bits(final(config), expected)
    seen, alone = samples_by_step(audit), samples_by_step(audit_alone)
    assert seen == alone and len(seen) == 5 * sum(epochs)
    # No sample is lost or repeated: each epoch reads 20 distinct images of 22, five batches of four.
    for stage, count in zip((1, 2), epochs, strict=True):
        for epoch in range(count):
            shown = Counter()
            for step in range(5 * epoch, 5 * epoch + 5):
                for _, *samples in seen[stage, step]:
                    shown.update(samples)
            assert sum(shown.values()) == len(shown) == 20
    assert len(steps_of(audit)) > 5 * sum(epochs)  # some steps were repeated


@pytest.mark.parametrize(("number", "status"), [(signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(config, undisturbed, number, status, tmp_path):
    config = on_ranks(replace(config, checkpoint=CheckpointSettings(every_steps=0, keep=2)), 2)
    config = replace(config, data=replace(config.data, workers=1))
    expected, _ = undisturbed(2, EPOCHS)
    audit = tmp_path / "audit"
    run = TrainingRun(config, 2, audit)
    assert run.wait_for_steps(3)
    run.signal(number, range(1, 2))
    assert run.wait() == [status, status]
    stopped = json.loads((Path(config.out) / "stopped.json").read_text())
    assert stopped["signal"] == signal.Signals(number).name and stopped["stage"] == 1
    (newest,) = sorted(path.name for path in (Path(config.out) / "checkpoints").iterdir())[-1:]
    assert newest == f"stage1-step{stopped['step']:08d}" and len(steps_of(audit)) == stopped["step"]
    assert "the same command resumes" in run.said(0)
    assert TrainingRun(config, 2, audit).wait() == [0, 0]
    assert not (Path(config.out) / "stopped.json").exists()
    assert len(steps_of(audit)) == 5 * sum(EPOCHS)  # no step was repeated
    assert same_bits(final(config), expected)


def test_a_second_ctrl_c_interrupts():
    with StopRequest() as request:
        with request.taking_steps():
            signal.raise_signal(signal.SIGINT)
            assert request.received == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_during_validation_interrupts_at_once_and_loses_no_step(config, monkeypatch):
    config = replace(config, stages=[1], data=replace(config.data, val_split="val"), stage1=StageSettings(epochs=2))
    train(replace(config, out=config.out + "-alone"))
    with monkeypatch.context() as during:
        during.setattr(SplitSearch, "rank", lambda *given: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert max(path.name for path in (Path(config.out) / "checkpoints").iterdir()) == "stage1-step00000005"
    train(config)
    assert same_bits(final(config), final(replace(config, out=config.out + "-alone")))


def test_it_moves_to_another_number_of_processes(config, undisturbed, tmp_path):
    """Saved on two processes and finished on one, and vice versa. The results differ only by rounding."""
    expected, _ = undisturbed(1, EPOCHS)
    for first, second in ((1, 2), (2, 1)):
        moving = replace(config, out=f"{config.out}-{first}-{second}")
        run = TrainingRun(on_ranks(moving, first), first, tmp_path / f"audit-{first}")
        assert run.wait_for_steps(12)
        run.signal(signal.SIGTERM)
        assert run.wait() == [75] * first
        assert TrainingRun(on_ranks(moving, second), second, tmp_path / f"audit-{first}").wait() == [0] * second
        moved = final(moving)
        assert max(float((moved[name] - expected[name]).abs().max()) for name in expected) < 2e-5
        seen = {
            key: sorted(sample for _, *samples in parts for sample in samples)
            for key, parts in samples_by_step_of_any(tmp_path / f"audit-{first}").items()
        }
        assert all(len(samples) == len(set(samples)) == 4 for samples in seen.values()) and len(seen) == 5 * sum(EPOCHS)


def samples_by_step_of_any(audit: Path) -> dict[tuple[int, int], set[tuple[int, ...]]]:
    out = defaultdict(set)
    for line in map(json.loads, audit.read_text().splitlines()):
        out[line["stage"], line["step"]].add((line["rank"], *line["samples"]))
    return out


# -- in this process ------------------------------------------------------------------------------------------------


def one_short_stage(config: TrainConfig) -> TrainConfig:
    """One stage of 10 steps."""
    stage1, stage2 = (StageSettings(epochs=epochs, lr=3e-3, warmup_steps=1) for epochs in (2, 1))
    return replace(config, stages=[1], stage1=stage1, stage2=stage2)


def two_short_stages(config: TrainConfig) -> TrainConfig:
    """Two stages of 5 steps."""
    stage = StageSettings(epochs=1, lr=3e-3, warmup_steps=1)
    return replace(config, stage1=stage, stage2=stage, trackers=["tensorboard"])


@pytest.fixture
def short(config, fresh_accelerate) -> TrainConfig:
    """See `one_short_stage`; not trained yet."""
    return one_short_stage(config)


@pytest.fixture(scope="module")
def originals(shards, clip_folder, cache_folder, tmp_path_factory) -> dict[str, TrainConfig]:
    """Finished runs of short stages, with copies of their folders."""
    configs = {}
    for name, change in (("one", one_short_stage), ("both", two_short_stages)):
        folder = tmp_path_factory.mktemp(name)
        configs[name] = change(configured(shards, clip_folder, folder, cache_folder))
        again(configs[name])
        shutil.copytree(configs[name].out, folder / "original")
    forget_accelerate()
    return configs


def restored(config: TrainConfig) -> TrainConfig:
    """Restores the folder of one of the `originals`, which tests change."""
    shutil.rmtree(config.out)
    shutil.copytree(Path(config.out).with_name("original"), config.out)
    return config


@pytest.fixture
def trained(originals, fresh_accelerate) -> TrainConfig:
    """A finished run of one stage of 10 steps."""
    return restored(originals["one"])


@pytest.fixture
def both(originals, fresh_accelerate) -> TrainConfig:
    """A finished run of two stages of 5 steps."""
    return restored(originals["both"])


def again(config: TrainConfig, **changes) -> Path:
    forget_accelerate()
    return train(replace(config, **changes))


def adapter_of(config: TrainConfig) -> Path:
    return Path(config.out) / "stage1" / "adapter.safetensors"


def folders(config: TrainConfig) -> list[str]:
    return sorted(path.name for path in (Path(config.out) / "checkpoints").iterdir())


def damage(kind: str, folder: Path) -> None:
    if kind == "cut":
        path = folder / "optimizer.safetensors"
        path.write_bytes(path.read_bytes()[:-7])
    elif kind == "bit":
        path = folder / "adapter.safetensors"
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content)
    elif kind == "empty state":
        (folder / "state.json").write_text("")
    elif kind == "no state":
        (folder / "state.json").unlink()
    elif kind == "other version":
        path = folder / "state.json"
        path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))


@pytest.mark.parametrize("kind", ["cut", "bit", "empty state", "no state", "other version"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(trained, kind, capfd):
    expected = load_file(adapter_of(trained))
    newest = Path(trained.out) / "checkpoints" / folders(trained)[-1]
    assert folders(trained) == ["stage1-step00000008", "stage1-step00000010"]
    damage(kind, newest)
    (Path(trained.out) / "checkpoints" / ".tmp-left-by-a-killed-process").mkdir()
    capfd.readouterr()
    assert same_bits(load_file(again(trained)), expected)
    said = " ".join(capfd.readouterr().err.split())
    assert "stage1-step00000010" in said and "The checkpoint before it is used" in said
    assert "resuming from" in said and "step 9/10" not in said.partition("resuming")[0]
    assert folders(trained) == ["stage1-step00000008", "stage1-step00000010"]


def test_a_finished_run_has_nothing_left_to_do(trained, capfd, monkeypatch):
    path = adapter_of(trained)
    before = path.stat().st_mtime_ns
    monkeypatch.setattr("amp.train.engine.create_model_and_transforms", None)  # the model isn't built
    assert again(trained) == path and path.stat().st_mtime_ns == before
    assert "the run is finished" in " ".join(capfd.readouterr().err.split())


def test_a_removed_adapter_is_written_again_from_the_checkpoint(trained):
    path = adapter_of(trained)
    expected = load_file(path)
    path.unlink()
    assert same_bits(load_file(again(trained)), expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stage1": StageSettings(epochs=3, lr=3e-3, warmup_steps=1)}, "stage1.epochs was 2 and is now 3"),
        ({"seed": 4}, "seed was 0 and is now 4"),
        ({"knowledge_dropout": 0.0}, "knowledge_dropout was 0.2 and is now 0.0"),
        ({"batch_size": 5}, "images per step .* was 4 and is now 5"),
    ],
)
def test_other_settings_are_refused_by_name(trained, change, said):
    if "batch_size" in change:
        change = {"data": replace(trained.data, **change)}
    with pytest.raises(AmpError, match=f"{said}.*--checkpoint.resume false"):
        again(trained, **change)
    assert len(folders(trained)) == 2
    again(trained, **change, checkpoint=CheckpointSettings(resume=False, keep=5))
    assert all("step0000001" in name or "step0000000" in name for name in folders(trained))


def test_other_shards_are_refused(trained, tmp_path):
    others = draw_shards(tmp_path / "others", {"train": 21})
    with pytest.raises(AmpError, match="content of the training shards"):
        again(trained, data=replace(trained.data, shards=str(others)))


def test_what_may_change_on_the_way_does_not_matter(short, tmp_path):
    """Half of a run, then the rest with other logging, workers, recomputation, and a copy of the shards."""
    expected = load_file(again(short, out=short.out + "-alone"))
    run = TrainingRun(short, 1, tmp_path / "audit")
    assert run.wait_for_steps(5)
    run.signal(signal.SIGUSR1)
    assert run.wait() == [75]
    shutil.copytree(short.data.shards, tmp_path / "copy")
    rest = again(
        short,
        log_every=1,
        validate_every=0,
        activation_checkpointing=True,
        trackers=["tensorboard"],
        data=replace(short.data, shards=str(tmp_path / "copy"), workers=2),
        checkpoint=CheckpointSettings(every_steps=1, keep=1),
    )
    assert same_bits(load_file(rest), expected)
    assert folders(short) == ["stage1-step00000010"]


def test_skipping_reads_no_sample(trained, tmp_path, monkeypatch):
    """A run that resumes at step 8 of 10 decodes only the remaining samples."""
    damage("cut", Path(trained.out) / "checkpoints" / "stage1-step00000010")
    decoded = []
    photo = ShardSplit.decoded
    monkeypatch.setattr(ShardSplit, "decoded", lambda self, i, decode: decoded.append(i) or photo(self, i, decode))
    again(trained)
    assert len(decoded) == 2 * 4


def test_a_second_stage_in_the_same_folder_starts_from_init(trained):
    first = adapter_of(trained)
    both = again(trained, out=trained.out + "-both", stages=[1, 2])
    second = again(trained, stages=[2], init=str(first))
    assert same_bits(load_file(second), load_file(both))
    assert again(trained) == first  # stage 1 is finished and not repeated


# -- the folder's record --------------------------------------------------------------------------------------------


def recorded(config: TrainConfig) -> dict:
    return yaml.safe_load((Path(config.out) / "config.yaml").read_text())


def content(folder: str) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path(folder).rglob("*")}


def test_a_refused_call_changes_nothing_in_the_folder(both, tmp_path):
    """It changes neither the record nor checkpoints nor curves."""
    before = content(both.out)
    assert recorded(both) == asdict(both)
    write_clip_folder(tmp_path / "other", seed=1)
    named = {
        "stage1.lr was 0.003 and is now 0.1": {"stage1": replace(both.stage1, lr=0.1)},
        "stage2.lr was 0.003 and is now 0.1": {"stage2": replace(both.stage2, lr=0.1)},
        "model.precision was 'fp32' and is now 'bf16'": {"model": replace(both.model, precision="bf16")},
        f"trained on base model '{both.model.name}'.*but 'local-dir:{tmp_path}/other' has weights": {
            "model": replace(both.model, name=f"local-dir:{tmp_path / 'other'}")
        },
        "no such folder": {"data": replace(both.data, shards=str(tmp_path / "nowhere"))},
        "bottleneck is 0": {
            "prompt": replace(both.prompt, interaction_options={"bottleneck": 0}),
            "checkpoint": CheckpointSettings(resume=False),
        },
        "fewer than one step": {"gradient_accumulation": 99, "checkpoint": CheckpointSettings(resume=False)},
        "stage2.epochs is 0": {"stage2": StageSettings(epochs=0), "checkpoint": CheckpointSettings(resume=False)},
    }
    for words, changes in named.items():
        with pytest.raises(AmpError, match=words):
            again(both, **changes)
        assert content(both.out) == before, words


def test_a_refused_call_makes_no_folder(short, tmp_path):
    for words, changes in {
        "bottleneck": {"prompt": replace(short.prompt, interaction_options={"bottleneck": 0})},
        "fewer than one step": {"gradient_accumulation": 99},
    }.items():
        with pytest.raises(AmpError, match=words):
            again(short, **changes, trackers=["tensorboard"])
    assert not Path(short.out).exists()


def test_a_finished_run_keeps_its_record_and_says_what_has_no_effect(both, tmp_path, capfd):
    before = content(both.out)
    again(both, log_every=3, data=replace(both.data, workers=1))
    said = " ".join(capfd.readouterr().err.split())
    assert "the run is finished" in said and "Without effect now: data.workers was 0 and is now 1, log_every" in said
    shutil.copytree(both.model.name.removeprefix("local-dir:"), tmp_path / "moved")
    moved = f"local-dir:{tmp_path / 'moved'}"
    again(both, model=replace(both.model, name=moved))
    said = " ".join(capfd.readouterr().err.split())
    assert "the run is finished" in said and f"model.name was {both.model.name!r} and is now {moved!r}" in said
    assert content(both.out) == before


def test_a_run_that_goes_on_says_what_differs_and_records_it(trained, capfd):
    damage("cut", Path(trained.out) / "checkpoints" / folders(trained)[-1])
    capfd.readouterr()
    again(trained, log_every=3)
    assert "step00000008; log_every was 10 and is now 3" in " ".join(capfd.readouterr().err.split())
    assert recorded(trained) == asdict(replace(trained, log_every=3))


def test_a_stage_of_its_own_leaves_the_other_one_as_it_was_recorded(trained, capfd):
    """`--stages [1]`, then `--stages [2]`: stage1.lr of the second call has no effect and is not recorded."""
    first = adapter_of(trained)
    capfd.readouterr()
    second = replace(
        trained, stages=[2], init=str(first), seed=5, stage1=StageSettings(lr=0.1), stage2=StageSettings(epochs=1)
    )
    again(second)
    assert recorded(trained) == {**asdict(second), "stage1": asdict(trained.stage1)}
    said = " ".join(capfd.readouterr().err.split())
    assert f"the other stage in {trained.out} was trained with other settings: seed was 0 and is now 5" in said


def test_adapters_without_checkpoints_are_not_replaced_in_silence(both):
    shutil.rmtree(Path(both.out) / "checkpoints")
    before = content(both.out)
    with pytest.raises(AmpError, match=r"stage1/adapter.safetensors: was trained by an earlier run.*resume false"):
        again(both)
    (Path(both.out) / "stage1" / "adapter.safetensors").unlink()
    with pytest.raises(AmpError, match=r"stage2/adapter.safetensors: was trained by an earlier run"):
        again(both)
    assert {**before, f"{both.out}/stage1/adapter.safetensors": 0} == {
        **content(both.out),
        f"{both.out}/stage1/adapter.safetensors": 0,
    }
    anew = replace(both, seed=1, stages=[1], checkpoint=CheckpointSettings(resume=False))
    again(anew)
    assert recorded(both) == asdict(anew)
    assert not (Path(both.out) / "stage2" / "adapter.safetensors").exists()  # it was based on the previous stage 1


def test_two_runs_in_one_folder_are_one_too_many(short, tmp_path):
    run = TrainingRun(replace(short, stage1=replace(short.stage1, epochs=500)), 1, tmp_path / "audit")
    assert run.wait_for_steps(3)
    with pytest.raises(AmpError, match=rf"{short.out}: another run is training here.*\(held by process \d+ on "):
        again(short)
    run.signal(signal.SIGKILL)
    run.wait()
    again(short, stage1=replace(short.stage1, epochs=500, max_steps=8), checkpoint=CheckpointSettings(resume=False))


def test_a_file_in_place_of_the_folder_is_no_other_run(short):
    Path(short.out).write_text("mine")
    with pytest.raises(AmpError, match=rf"{short.out}: can't be written \(File exists\); give --out a folder"):
        again(short)


def test_two_runs_that_begin_together_in_a_new_folder(short, monkeypatch):
    """The second finds the folder that the first created while both read their data."""
    from amp.train import engine

    prepare = engine.Run.prepare_data
    monkeypatch.setattr(engine.Run, "prepare_data", lambda *a: (prepare(*a), Path(short.out).mkdir()))
    with pytest.raises(AmpError, match="another run is training here"):
        again(short)
    assert not list(Path(short.out).iterdir())
