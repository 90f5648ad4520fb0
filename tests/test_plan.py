"""`launchers/train.py --plan`: findings, no files left behind, and docs/plan.md shows its output."""

import json
import re
import resource
import shlex
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console
from support.drawn_data import SPLIT_SIZES
from support.processes import forget_accelerate
from support.repository import ROOT, launcher
from support.training_run import small_run

import amp
from amp.data.shards import ShardManifest
from amp.data.shards.index import side_file
from amp.errors import AmpError
from amp.knowledge.text import state_texts
from amp.plan import model as plan_model
from amp.plan import node as plan_node
from amp.plan.data import Dataset
from amp.plan.findings import counted, in_bytes
from amp.plan.launch import DEEPSPEED_KEYS
from amp.plan.node import check_workers
from amp.plan.plan import PlanSettings, Steps, make_plan
from amp.plan.simulator import StepSimulator
from amp.plan.tables import steps_table
from amp.plan.texts import check_texts
from amp.train.checkpoints import Checkpoints
from amp.train.config import ModelSettings, StageSettings, TrainConfig
from amp.train.engine import train
from amp.train.resume import record

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

PAGE = ROOT / "docs/plan.md"


@pytest.fixture(scope="module", autouse=True)
def equal_steps_are_simulated_once():
    """Most tests plan the same run with other data. tests/test_memory.py compares the simulation with real steps."""
    step, known = StepSimulator.step, {}

    def once(self, *given):
        config = self.config
        data = replace(config.data, shards="", cache="", train_split="", val_split=None)
        run = repr(replace(config, out="", init=None, deepspeed=None, data=data))
        dtypes = {parameter.dtype for parameter in self.model.parameters()}
        key = run, self.deepspeed, self.autocast, frozenset(dtypes), given
        if key not in known:
            known[key] = step(self, *given)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepSimulator, "step", once)
        yield


@pytest.fixture(scope="module")
def main():
    return launcher("launchers/train.py").main


@pytest.fixture
def config(shards, clip_folder, tmp_path) -> TrainConfig:
    """A run without problems: 5 batches of 4 images per epoch."""
    return small_run(
        shards,
        clip_folder,
        tmp_path,
        {"batch_size": 4, "val_split": "val"},
        stages=[1],
        mixed_precision="bf16",
    )


def found(config: TrainConfig, level: str, **settings) -> str:
    """All findings of one level in the plan of a run."""
    return "\n".join(
        f"{f.check}: {f.text}" for f in make_plan(config, PlanSettings(**settings)).findings if f.level == level
    )


def change(config: TrainConfig, **keys) -> TrainConfig:
    """The run with changed values; `data__workers` means data.workers."""
    for key, value in keys.items():
        outer, _, inner = key.partition("__")
        config = replace(config, **{outer: replace(getattr(config, outer), **{inner: value}) if inner else value})
    return config


def content(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in folder.rglob("*")}


# -- a valid run ------------------------------------------------------------------------------------------------------


def test_a_good_run_has_no_error_and_leaves_no_trace(config, tmp_path, main, monkeypatch, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "out": config.out,
                "model": vars(config.model),
                "prompt": vars(config.prompt),
                "data": vars(config.data),
                "mixed_precision": "bf16",
                "trackers": [],
            }
        )
    )
    monkeypatch.setenv("COLUMNS", "120")
    before = content(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["--config", str(file), "--plan"])
    said = capsys.readouterr().out
    assert stop.value.code == 0, said
    assert "0 errors, 0 warnings" in said.splitlines()[-1]
    assert all(len(line) <= 120 for line in said.splitlines())
    for word in (
        "Checks",
        "Steps",
        "Memory per GPU (estimated)",
        "Simulated: 1 node x 1 GPU",
        "assumed, not measured",
    ):
        assert word in said
    assert content(tmp_path) == before


def test_errors_end_with_status_2(config, main, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--data.shards", config.out, "--model.name", config.model.name, "--model.pretrained", "null", "--plan"])
    assert stop.value.code == 2
    assert "this job would fail" in capsys.readouterr().out.splitlines()[-1]


def test_plan_is_no_setting_of_a_run(main, monkeypatch, tmp_path, capsys):
    script = launcher("launchers/train.py")
    parse = script.parser().parse_args
    shards = ["--data.shards", "somewhere"]
    assert "plan" not in parse(shards)
    assert parse([*shards, "--plan"]).plan.nodes == 1
    parsed = parse([*shards, "--plan.gpus", "4", "--plan", "--seed", "3", "--plan.nodes", "2"])
    assert (parsed.plan.nodes, parsed.seed) == (2, 3)
    ran = []
    monkeypatch.setattr("amp.train.engine.train", ran.append)
    main([*shards, "--out", str(tmp_path / "run")])
    assert "plan" not in yaml.safe_load(record(ran[0])[0])


@pytest.mark.parametrize("keys", [{"nodes": 0}, {"gpus": -1}, {"gpu_memory_gb": 0.0}, {"captions": 5}, {"shards": 2}])
def test_wrong_settings_are_refused(keys):
    with pytest.raises(AmpError, match=r"plan\..*expected"):
        PlanSettings(**keys)


# -- figures ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(shards, clip_folder, tmp_path_factory) -> TrainConfig:
    """A real run of one stage with two batches per step, and its checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    config = small_run(
        shards,
        clip_folder,
        folder,
        {"batch_size": 4, "val_split": "val"},
        stages=[1],
        stage1=StageSettings(epochs=3),
        gradient_accumulation=2,
        validate_every=0,
    )
    forget_accelerate()
    train(config)
    forget_accelerate()
    return config


def test_steps_are_those_of_the_run(trained):
    state = Checkpoints(trained.out).newest([1]).state
    steps = Steps.of(trained, SPLIT_SIZES["train"], 1)
    assert steps.total == {1: state["steps"]} == {1: 6}
    assert steps.images == state["run"]["images_a_step"] == 8
    assert (steps.epoch, steps.left_over) == (4, 6)


def test_a_checkpoint_takes_the_space_that_the_plan_says(trained):
    plan = make_plan(trained, PlanSettings())
    said = next(f.text for f in plan.findings if f.check == "disk")
    stated = float(re.search(r"checkpoints of ([\d.]+) MB", said)[1])
    newest = Checkpoints(trained.out).newest([1]).folder
    said = said.partition(";")[0]  # without the free space, which other programs change
    assert "disk: " + said in found(trained, "ok") and f"{trained.checkpoint.keep + 1} checkpoints" in said
    real = sum((newest / name).stat().st_size for name in ("adapter.safetensors", "optimizer.safetensors"))
    assert stated == pytest.approx(real / 1e6, rel=0.1)  # headers are not negligible for a tiny model


def test_cached_features_take_the_space_that_the_plan_says(config, trained):
    stated = found(change(trained, validate_every=1), "ok")
    texts, images = (float(re.search(rf"{what} ([\d.]+) MB", stated)[1]) for what in ("texts", "validation images"))
    folder = Path(trained.data.cache)
    real = sum(path.stat().st_size for path in folder.glob("text-*/*/*.npy"))
    # Only the training split; repeated texts are stored once. 2 MB of validation tokens are not there yet.
    assert 0.3 * real / 1e6 < texts < 4 * real / 1e6
    assert images == pytest.approx(SPLIT_SIZES["val"] * (17 * 32 + 24) * 4 / 1e6, abs=0.01)


@pytest.mark.system
def test_a_larger_batch_fits_as_it_says(config):
    config = change(config, prompt__knowledge="none")  # simulated faster
    needs = lambda size: make_plan(change(config, data__batch_size=size), PlanSettings(gpus=2)).estimates[1].total  # noqa: E731
    limit = needs(7) / 1e9 + 1e-9
    assert "data.batch_size 7 would fit as well" in found(config, "ok", gpus=2, gpu_memory_gb=limit)
    assert needs(8) > limit * 1e9
    said = found(change(config, data__batch_size=9), "error", gpus=2, gpu_memory_gb=limit)
    assert "give --data.batch_size 7 or --activation_checkpointing true" in said
    assert "not even the smallest batch fits" in found(
        change(config, activation_checkpointing=True), "error", gpu_memory_gb=0.5
    )


@pytest.mark.parametrize(
    "size, text",
    [(0, "0.00 MB"), (4_796_000, "4.80 MB"), (44_100_000, "44.1 MB"), (433e6, "433 MB"), (31.71e9, "31.7 GB")],
)
def test_in_bytes(size, text):
    assert in_bytes(size) == text


def test_counted():
    assert [counted(1, "node"), counted(8, "node"), counted(1, "process"), counted(1024, "process")] == [
        "1 node",
        "8 nodes",
        "1 process",
        "1,024 processes",
    ]


# -- findings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, settings, words",
    [
        ({"data__shards": "nowhere"}, {}, "shards: nowhere: no such folder"),
        ({"data__train_split": "trian"}, {}, "split 'trian' doesn't exist"),
        (
            {},
            {"nodes": 2, "gpus": 3},
            "steps: the training split holds 22 images, fewer than one step of 4 x 6 processes",
        ),
        ({"gradient_accumulation": 6}, {}, "fewer than one step of 4 x 1 processes x 6 batches"),
        ({"stages": [1, 2], "stage2__epochs": 0}, {}, "stage2.epochs is 0, expected 1 or more"),
        ({"data__batch_size": 1}, {}, "launch: data.batch_size is 1 on one process"),
        ({"trackers": ["tensorbord"]}, {}, "trackers holds ['tensorbord']"),
        ({"model__name": "ViT-B-61"}, {}, "model 'ViT-B-61' is unknown to open_clip"),
        ({"model__name": "hf-hub:no/such"}, {}, "is not on this machine, and a plan downloads nothing"),
        ({"prompt": amp.PromptConfig(interaction="sum")}, {}, "interaction is 'sum', expected one of readout, aim"),
        ({"init": "nowhere.safetensors"}, {}, "init: nowhere.safetensors: no such adapter file"),
        ({}, {"gpu_memory_gb": 1.0}, "GPU memory: stage 1 needs an estimated 1.0"),
    ],
)
def test_errors(config, keys, settings, words):
    assert words in found(change(config, **keys), "error", **settings)


def test_damaged_shards(config, shards, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    config = change(config, data__shards=str(copy))
    assert found(config, "error", verify=True) == ""
    path = ShardManifest.load(copy).split("train")[1].path
    whole = path.read_bytes()

    last = whole.rindex(b"house")  # in a caption of the last sample
    path.write_bytes(whole[:last] + b"mouse" + whole[last + 5 :])
    assert found(config, "error") == ""
    assert re.search(rf"{path}: sha256 is \w+, expected", found(config, "error", verify=True))

    path.write_bytes(whole[:-512])
    assert f"{path}: {len(whole) - 512} bytes; expected {len(whole)}" in found(config, "error")

    with tarfile.open(path) as tar:
        first = tar.getmembers()[0]
    path.write_bytes(whole[: first.offset_data] + bytes(first.size) + whole[first.offset_data + first.size :])
    assert "can't be decoded" in found(config, "error")

    path.unlink()
    assert f"{path}: No such file" in found(config, "error")

    path.write_bytes(whole)
    manifest = json.loads((copy / "manifest.json").read_text())
    entry = manifest["splits"]["train"]
    entry["shards"][1]["samples"] -= 1
    entry["samples"] -= 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    index = path.with_name("train-000001.index.npy")
    assert f"{index}: an array int64 of shape (5, 2, 2); expected int64 (4, 2, 2)" in found(config, "error")
    del entry["shards"][1]["index"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert f"{path}: holds 5 samples; expected 4 (from the manifest)" in found(config, "error")


def deepspeed(config: TrainConfig, folder: Path, **keys) -> TrainConfig:
    """The run with a DeepSpeed file that contains these keys."""
    file = folder / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, **keys}))
    return change(config, deepspeed=str(file))


@pytest.mark.parametrize(
    "level, keys, words",
    [
        ("ok", {}, "ZeRO stage 2"),
        ("ok", {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": 1.0}, "ZeRO stage 2"),
        (
            "error",
            {"train_micro_batch_size_per_gpu": 7},
            "train_micro_batch_size_per_gpu is 7, but the run's own settings",
        ),
        ("error", {"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4, expected 1, 2 or 3"),
        ("error", {"zero_optimization": {"stage": 2, "overlap": 1}}, "zero_optimization.overlap: Extra inputs"),
        ("error", {"optimizer": {"type": "Adam"}}, "optimizer is given, but training creates its own"),
        ("warning", {"gradient_cliping": 1.0}, "ignores the key 'gradient_cliping'; write 'gradient_clipping'"),
        (
            "warning",
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer slows",
        ),
    ],
)
def test_deepspeed_files(config, tmp_path, level, keys, words):
    assert words in found(deepspeed(config, tmp_path, **keys), level, gpus=2)
    if level == "ok":
        assert found(deepspeed(config, tmp_path, **keys), "error", gpus=2) == ""


def test_a_wrong_deepspeed_file_leaves_memory_out(config, tmp_path):
    assert not make_plan(deepspeed(config, tmp_path, zero_optimization={"stage": 4}), PlanSettings()).estimates


@pytest.mark.parametrize("precision, weights", [("fp16", "fp16"), ("bf16", "fp32")])
def test_the_type_of_the_weights_under_deepspeed(config, tmp_path, precision, weights):
    plan = make_plan(change(deepspeed(config, tmp_path), mixed_precision=precision), PlanSettings(gpus=2))
    console = Console(width=100, record=True)
    console.print(steps_table(plan))
    rows = [line.split() for line in console.export_text().splitlines() if "parameters" in line]
    assert [row[-2:] for row in rows] == [["in", weights]] * 2
    trained = plan.estimates[1].trained / plan.parameters[1].trained
    assert trained == (2 if weights == "fp16" else 4)


def test_stages_under_deepspeed(config, tmp_path):
    config = change(deepspeed(config, tmp_path), stages=[1, 2])
    assert "launch: stages is [1, 2] under DeepSpeed, expected one stage per launch" in found(config, "error")


def test_known_deepspeed_keys_are_deepspeeds():
    """Each known key occurs in DeepSpeed's source, and all keys of our files are known."""
    import deepspeed

    source = "\n".join(path.read_text() for path in Path(deepspeed.__file__).parent.rglob("*.py"))
    assert {key for key in DEEPSPEED_KEYS if not re.search(rf"""["']{key}["']""", source)} == set()
    for file in (ROOT / "ds_configs").glob("*.json"):
        assert json.loads(file.read_text()).keys() <= DEEPSPEED_KEYS, file


def test_adapters_that_do_not_fit(config, trained):
    adapter = f"{trained.out}/stage1/adapter.safetensors"
    assert "init: " in found(change(config, init=adapter), "ok")
    other = change(config, init=adapter, prompt__num_prompts=3)
    assert "num_prompts is 2 in the file and 3 in this run" in found(other, "error")
    wide = change(config, init=adapter, model=ModelSettings("ViT-B-32", None))
    assert "weights have different names or shapes" in found(wide, "error")
    quick = change(config, init=adapter, model=ModelSettings("ViT-B-32-quickgelu", None))
    assert "has quick_gelu=False" in found(quick, "error")


def test_checkpoints(config, trained):
    assert "the run starts at step 0" in found(config, "ok")
    assert "stage 1, step 6 of 6; the run is finished" in found(trained, "ok")
    assert "stage 1, step 6 of 6; the run resumes from there" in found(change(trained, stages=[1, 2]), "ok")
    assert "seed was 0 and is now 1" in found(change(trained, seed=1), "error")
    assert "was 8 and is now 16" in found(trained, "error", gpus=2)
    same = change(trained, gradient_accumulation=1)
    assert "the run is finished" in found(same, "ok", gpus=2)
    again = change(trained, checkpoint__resume=False)
    assert "and all other checkpoints will be removed" in found(again, "warning")
    assert "not compared with simulated data" in found(trained, "note", images=100)
    assert "the run starts at step 0" in found(change(trained, stages=[2], init="x"), "ok")


def test_a_damaged_checkpoint_is_passed_over(trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained.out, copy)
    newest = sorted((copy / "checkpoints").iterdir())[-1]
    (newest / "optimizer.safetensors").write_bytes(b"cut")
    config = change(trained, out=str(copy))
    assert "damaged" in found(config, "warning")
    assert "step 4 of 6; the run resumes" in found(config, "ok")


@pytest.mark.parametrize("cached, level", [(False, "error"), (True, "warning")])
def test_a_full_disk(config, monkeypatch, cached, level):
    if cached:
        Path(config.data.cache).mkdir()
    assert "disk" not in found(config, "error")
    # The checkpoints alone would fit.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(2.95e6)))
    said = found(change(config, data__cache_images=True), level)
    assert "2.95 MB are free" in said and "make room" in said


def test_too_few_open_files(config, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda what: (160, 4096))
    assert "`ulimit -n` allows 160; run `ulimit -n 414` first" in found(change(config, data__workers=2), "error")
    assert "`ulimit -n` allows 160" in found(config, "ok")


def test_indexed_shards_have_one_file_more(config):
    def files() -> int:
        return int(re.search(r"up to (\d+) files", " ".join(f.text for f in check_workers(data, config, 1)))[1])

    data = Dataset.read(config)
    plain, shards = files(), sum(len(split.shards) for split in data.splits)
    for split in data.splits:
        split.shards = [replace(shard, records=side_file(b"")) for shard in split.shards]
    assert files() == plain + shards


def test_too_few_cores(config, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    config = change(config, data__workers=2, data__batch_size=2)
    assert "a node needs 6 cores: 2 processes x (1 + 2 workers); this machine has 8" in found(config, "ok", gpus=2)
    assert "give --data.workers 1" in found(config, "warning", gpus=4)


def test_too_little_memory_of_a_node(config, monkeypatch):
    assert "node memory" not in found(config, "warning")
    monkeypatch.setattr(plan_node, "CAPTION_BYTES", 10**12)
    assert "start fewer processes per node" in found(config, "warning")


def test_weights_that_are_not_here(config, monkeypatch):
    config = change(config, model=ModelSettings("ViT-B-32-quickgelu", "openai"))
    monkeypatch.setattr(plan_model, "try_to_load_from_cache", lambda repository, name: None)
    assert "weights 'openai' are not on this machine" in found(config, "warning")
    asked = []
    monkeypatch.setattr(plan_model, "try_to_load_from_cache", lambda *names: asked.append(names) or "/a/file")
    assert "with weights 'openai', on this machine" in found(config, "ok")
    assert asked[0][0] == "timm/vit_base_patch32_clip_224.openai"
    assert "without weights" in found(change(config, model__pretrained=None), "warning")


def test_fp32_is_a_warning(config):
    assert "mixed_precision is null" in found(change(config, mixed_precision=None), "warning")


# -- the page ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_shows_what_is_printed(main, monkeypatch, capsys):
    """docs/plan.md contains the command and, below it, its output at 100 columns."""
    found = re.search(
        r"```\n(python [^`]*--plan\.images [^`]*)```\n\nprints[^`]*```\n([^`]*`ulimit -n`[^`]*)```", PAGE.read_text()
    )
    command, printed = found.groups()
    _, script, *arguments = shlex.split(command.replace("\\\n", " "))
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        launcher(script).main(arguments)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert stop.value.code == 0
    assert lines == printed.splitlines()


# -- texts ------------------------------------------------------------------------------------------------------------


def test_texts_that_are_cut_are_counted(config, clip_folder):
    """Compared with the token count of each single text."""
    data = Dataset.read(config)
    encode = amp.get_tokenizer(clip_folder).encode
    texts = {"captions": [], "texts of knowledge": []}
    for split in data.splits:
        for sample in split.records():
            for caption, knowledge in split.captions(sample):
                texts["captions"].append(caption)
                texts["texts of knowledge"] += state_texts(knowledge, config.prompt.max_triplets)
    images = sum(len(split) for split in data.splits)
    for length in (10, 14, 30):
        counts = [
            f"{sum(len(encode(text)) + 2 > length for text in found)} of {len(found)} {kind}"
            for kind, found in texts.items()
        ]
        (said,) = check_texts(data, config, length)
        assert said.text.startswith(f"{' and '.join(counts)} of {images} images are longer than {length} tokens")
        assert said.level == ("ok" if counts[0].startswith("0 ") and counts[1].startswith("0 ") else "warning")
    assert "texts: 0 of " in found(config, "ok")
