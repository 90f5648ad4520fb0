"""Every shipped configuration loads and refuses wrong keys; the big ones take a step on meta tensors."""

import inspect
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from support.repository import ROOT, launcher

import amp
from amp.data.stream import Batch
from amp.errors import AmpError
from amp.knowledge.tensors import KnowledgeBatch
from amp.knowledge.text import SLOT_TOKENS
from amp.model.factory import refuse_quick_gelu_mismatch
from amp.model.interactions.aim import Aim
from amp.retrieval.settings import RetrievalSettings
from amp.train.config import TrainConfig
from amp.train.launch import deepspeed_file, deepspeed_settings
from amp.train.objective import Objective
from amp.train.resume import record
from amp.train.schedule import adamw
from amp.train.stages import set_trainable

REFERENCE = ROOT / "launchers/configs/reference.yaml"
CONFIGS = [path for path in sorted((ROOT / "launchers/configs").glob("*.yaml")) if path != REFERENCE]
PAPER = [path for path in CONFIGS if path.stem in ("coco", "flickr30k")]
COCO = ROOT / "launchers/configs/coco.yaml"
BACKBONES = [f"ViT-{size}-quickgelu" for size in ("B-32", "B-16", "L-14-336")]


def name_of(path: Path) -> str:
    return path.stem


@pytest.fixture(scope="module")
def read():
    """`read(*arguments)` returns the TrainConfig that `launchers/train.py` would use."""
    script = launcher("launchers/train.py")

    def read(*arguments) -> TrainConfig:
        options = script.parser()
        settings = options.instantiate(options.parse_args([str(a) for a in arguments]))
        del settings["config"]
        return TrainConfig(**settings)

    return read


@pytest.fixture(scope="module")
def meta_models():
    """`meta_models(name, prompt)` returns a model on the meta device, built once per backbone."""
    built = {}

    def model(name, prompt):
        key = (name, repr(prompt))
        if key not in built:
            # pretrained=None: the weights' values don't matter here, and tests download nothing.
            built[key], _, _ = amp.create_model_and_transforms(name, None, device="meta", prompt_config=prompt)
        return built[key]

    return model


def meta_batch(model: amp.ActionAwareCLIP, size: int = 3) -> Batch:
    """A batch of `size` images with one caption each, on the meta device."""
    config, backbone = model.config, model.backbone
    with torch.device("meta"):
        ids = torch.zeros(size, config.max_triplets, 3, SLOT_TOKENS, dtype=torch.long)
        states = torch.zeros(size, config.max_triplets, backbone.embed_dim)
        knowledge = KnowledgeBatch(ids, ids.bool(), states, torch.zeros(size, config.max_triplets, dtype=torch.bool))
        images = torch.zeros(size, 3, *backbone.visual.image_size)
        return Batch(images, None, torch.zeros(size, backbone.embed_dim), knowledge, torch.arange(size))


def step(model: amp.ActionAwareCLIP, config: TrainConfig, stage: int) -> set[str]:
    """Takes one optimizer step like the engine; returns the names of the parameters that got a gradient."""
    model.zero_grad(set_to_none=True)
    model.tower.recompute = config.activation_checkpointing
    trained = set_trainable(model, stage)
    settings = config.stage(stage)
    optimizer = adamw(model, settings.lr, settings.weight_decay)
    objective = Objective(stage, model.interaction, config.conditioning, config.negatives, config.margin)
    loss, scale = objective(model, meta_batch(model), 0)
    assert loss.shape == () and scale.shape == (1,)
    loss.backward()
    optimizer.step()
    count, total = sum(p.numel() for p in trained), sum(p.numel() for p in model.parameters())
    print(f"{config.model.name}, stage {stage}, {config.conditioning}: {count:,} of {total:,} parameters are trained")
    named = dict(model.named_parameters())
    got_gradient = {name for name, p in named.items() if p.grad is not None and p.grad.shape == p.shape}
    assert got_gradient == {name for name, p in named.items() if p.requires_grad}  # no unused parameters
    return got_gradient


def test_the_configs_are_there():
    assert {name_of(path) for path in CONFIGS} == {"coco", "flickr30k", "flickr8k", "scenes"}


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_config_loads_and_agrees_with_itself(path, read):
    config = read("--config", path)
    config.check()
    assert config.out.startswith("runs/") and config.data.shards.startswith("data/")
    assert RetrievalSettings().top_k == 20  # the paper's


def test_the_reference_holds_every_key_with_type_default_and_source(read):
    """Each key has its default, so that the file can be copied. It contains all keys of the other files."""
    assert launcher("tools/reference_config.py").reference() == REFERENCE.read_text(), "write it again, see its header"
    assert asdict(read("--config", REFERENCE)) == asdict(TrainConfig())
    lines = REFERENCE.read_text().splitlines()
    head, count = re.compile(r"# \S.*, default .* \((our choice|paper: .+?)\): \S"), 0
    for number, line in enumerate(lines):
        if line.lstrip().startswith("#") or line.endswith(":"):
            continue
        first = number - 1
        while not lines[first].lstrip().startswith("# "):
            first -= 1
        while not head.search(lines[first]) and lines[first - 1].lstrip().startswith("#"):
            first -= 1
        assert head.search(" ".join(x.strip().removeprefix("#   ") for x in lines[first:number])), line
        count += 1
    known = _leaves(yaml.safe_load(REFERENCE.read_text()))
    assert count == len(known)
    everywhere = [*(ROOT / "launchers/configs").glob("**/*.yaml"), *(ROOT / "amp/recipes").glob("*.yaml")]
    for path in everywhere:
        assert _leaves(yaml.safe_load(path.read_text())) <= known, path


def _leaves(content: dict, outer: str = "") -> set[str]:
    found = set()
    for key, value in content.items():
        group = isinstance(value, dict) and key != "interaction_options"
        found |= _leaves(value, f"{outer}{key}.") if group else {f"{outer}{key}"}
    return found


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("stage1.lr", "-1"),
        ("prompt_lr_factor", "-1"),
        ("stage1.weight_decay", "-1"),
        ("stage2.warmup_steps", "-5"),
        ("margin", "-1"),
        ("max_grad_norm", "-1"),
        ("validate_every", "-1"),
        ("seed", "-5"),
        ("seed", str(2**32)),
    ],
)
def test_numbers_out_of_range_are_refused_by_their_key(read, option, value):
    config = read("--config", "photos", "--data.shards", "shards", f"--{option}={value}")
    with pytest.raises(AmpError, match=f"^{option} is .*, expected"):
        config.check()
    with pytest.raises(AmpError, match=r"^out is empty"):
        replace(config, out="").check()


def test_a_recipe_goes_by_its_name_wherever_it_is_typed(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()  # a folder of the user's photos with the same name
    for path in (ROOT / "amp/recipes").glob("*.yaml"):
        config = read("--config", path.stem, "--data.shards", "shards")
        config.check()
        assert asdict(config) == asdict(read("--config", path, "--data.shards", "shards"))
    assert read("--config", "photos").prompt.interaction == "readout"
    paper = read("--config", "paper")
    assert (paper.prompt.interaction, paper.prompt.depth, paper.prompt.enrich) == ("aim", 0.0, False)
    assert inspect.signature(Aim).parameters["lam"].default == 0.7
    (tmp_path / "photos").rmdir()
    (tmp_path / "photos").write_text("seed: 5")  # an existing file takes precedence
    assert read("--config", "photos").seed == 5
    with pytest.raises(SystemExit):
        read("--config", "no_such_recipe")


def test_printed_config_reads_back_equal(read, tmp_path, capsys):
    path = ROOT / "launchers/configs/flickr8k.yaml"
    with pytest.raises(SystemExit) as stop:
        read("--config", path, "--seed", 7, "--print_config")
    assert stop.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert set(yaml.safe_load(printed.read_text())) == set(TrainConfig.__dataclass_fields__)
    expected = replace(read("--config", path), seed=7)
    assert asdict(read("--config", printed)) == asdict(expected)


def test_saved_config_of_a_run_reads_back_equal(read, tmp_path, monkeypatch):
    """A null must be saved: without `pretrained: null`, OpenAI's weights would be used."""
    ran = []
    monkeypatch.setattr("amp.train.engine.train", ran.append)
    arguments = [
        "--config",
        ROOT / "launchers/configs/scenes.yaml",
        "--data.val_split",
        "null",
        "--out",
        tmp_path / "run",
    ]
    launcher("launchers/train.py").main([str(a) for a in arguments])
    assert ran[0].model.pretrained is None and ran[0].data.val_split is None
    assert not (tmp_path / "run").exists()  # only training creates it, after all checks
    (tmp_path / "config.yaml").write_bytes(record(ran[0])[0])
    assert asdict(read("--config", tmp_path / "config.yaml")) == asdict(ran[0]) == asdict(read(*arguments))


@pytest.mark.parametrize(
    "change", [{"lerning_rate": 1}, {"data": {"batchsize": 8}}, {"stage1": {"lr": "fast"}}, {"conditioning": "both"}]
)
def test_unknown_key_or_value_is_one_error(change, read, tmp_path, capsys):
    content = yaml.safe_load(COCO.read_text())
    for key, value in change.items():
        content[key] = {**content.get(key, {}), **value} if isinstance(value, dict) else value
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit) as stop:
        read("--config", wrong)
    assert stop.value.code == 2
    key = next(iter(change))
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert (next(iter(change[key])) if isinstance(change[key], dict) else key) in said


@pytest.mark.parametrize("path", PAPER, ids=name_of)
def test_header_and_comments(path):
    """The paper's rows add up (up to rounding and one misprinted Rsum), and each key has a meaning and an origin."""
    lines = path.read_text().splitlines()
    header = [line for line in lines if line.startswith("#")]
    rows = [[float(x) for x in re.findall(r"\d+\.\d", line)] for line in header]
    rows = [row for row in rows if len(row) == 14]  # rows of CLIP and of the paper
    assert len(rows) == 3
    misprint = [float(x) for x in re.findall(r"add up to (\d+\.\d)", "".join(header))]
    for six, total in ((row[low : low + 6], row[low + 6]) for row in rows for low in (0, 7)):
        assert any(sum(six) == pytest.approx(x, abs=0.11) for x in (total, *misprint))
    assert any("The paper reports" in line for line in header)
    assert any("This project has not trained or evaluated with this file" in line for line in header)
    for line in lines:
        if not line.startswith("#") and not line.endswith(":"):
            key, _, comment = line.partition("#")
            if key.split(":")[0].strip() not in ("out", "shards", "name"):
                assert comment.strip().startswith(("the paper", "our choice")), line


@pytest.mark.parametrize("path", PAPER, ids=name_of)
def test_base_model_is_the_one_the_weights_were_made_for(path, read):
    config = read("--config", path)
    for name in (config.model.name, *BACKBONES):
        refuse_quick_gelu_mismatch(name, config.model.pretrained)
        with pytest.raises(AmpError, match="quick_gelu"):
            refuse_quick_gelu_mismatch(name.removesuffix("-quickgelu"), config.model.pretrained)


@pytest.mark.parametrize(
    ("file", "recipe", "name"),
    [
        ("coco", (), BACKBONES[1]),
        ("coco", ("--config", "paper"), BACKBONES[2]),
        ("flickr30k", (), BACKBONES[0]),
        ("flickr30k", ("--config", "paper"), BACKBONES[0]),
    ],
    ids=lambda x: x if isinstance(x, str) else "paper" if x else "recommended",
)
def test_one_step_on_meta_tensors(file, recipe, name, read, meta_models):
    config = read("--config", ROOT / f"launchers/configs/{file}.yaml", *recipe, "--model.name", name)
    config.check()
    model = meta_models(config.model.name, config.prompt)
    for stage in (1, 2):
        got_gradient = step(model, config, stage)
        new = {name for name, _ in model.named_parameters() if not name.startswith("backbone.")}
        part = "interaction.aim." if recipe else "interaction.readout."
        assert got_gradient == (new if stage == 1 else {name for name in new if name.startswith(part)})
        assert {p.device.type for p in model.parameters()} == {"meta"}
    assert len(model.visual_prompts.prompts) == model.backbone.num_layers * (3 if recipe else 1) // 3


def test_one_step_of_the_papers_control_on_meta_tensors(read, meta_models):
    config = read("--config", COCO, "--config", "paper", "--prompt.knowledge", "none")
    config.check()
    model = meta_models(config.model.name, config.prompt)
    assert step(model, config, 1) == {"visual_prompts.prompts", "logit_scale"}
    assert step(model, config, 2) == {"visual_prompts.prompts"}


def test_a_run_takes_the_deepspeed_file_of_either_command_line(read, monkeypatch):
    file = "ds_configs/zero2.json"
    config = read("--config", COCO)
    assert deepspeed_file(config) is None
    assert deepspeed_file(replace(config, deepspeed=file)) == file
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(AmpError, match="--deepspeed_config_file"):
        deepspeed_file(config)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", file)
    assert deepspeed_file(config) == file
    settings = deepspeed_settings(str(ROOT / file), config, world=8)
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["train_batch_size"] == 8 * config.data.batch_size * config.gradient_accumulation


@pytest.mark.parametrize("path", sorted((ROOT / "launchers/accelerate").glob("*.yaml")), ids=name_of)
def test_accelerate_reads_the_launch_files(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    kind, processes, machines = {
        "one_process": ("NO", 1, 1),
        "one_node": ("MULTI_GPU", 8, 1),
        "several_nodes": ("MULTI_GPU", 16, 2),
        "one_node_deepspeed": ("DEEPSPEED", 8, 1),
        "several_nodes_deepspeed": ("DEEPSPEED", 16, 2),
    }[path.stem]
    assert (config.distributed_type.value, config.num_processes, config.num_machines) == (kind, processes, machines)
    assert config.mixed_precision is None  # set in the run's own file
    if kind == "DEEPSPEED":
        assert (ROOT / config.deepspeed_config["deepspeed_config_file"]).is_file()
    if machines > 1:
        # DeepSpeed's own launchers need ssh between the nodes.
        assert kind != "DEEPSPEED" or config.deepspeed_config["deepspeed_multinode_launcher"] == "standard"
