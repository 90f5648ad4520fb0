"""Wrong input to the real command lines: one clear error each, exit status 2, no traceback."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.commands import arguments, evaluation_settings, one_error, training_settings
from support.drawn_data import draw_dataset
from support.models import write_clip_folder
from support.repository import launcher
from support.tars import members_of, replace_shard

import amp
from amp.data.shards import ShardManifest

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

TINY_PROMPT = {"knowledge": "both", "interaction": "aim", "depth": 0.34, "num_prompts": 2, "enrich": False}


@pytest.fixture(scope="module")
def train():
    return launcher("launchers/train.py").main


@pytest.fixture(scope="module")
def evaluate():
    return launcher("amp/commands/evaluate.py").main


@pytest.fixture(scope="module")
def convert():
    return launcher("tools/make_shards.py").main


@pytest.fixture
def dataset(tmp_path):
    """Arguments of make_shards.py for a fresh small data set."""
    given = draw_dataset(tmp_path / "drawn", {"train": 8, "val": 2, "test": 4})
    return {**given, "out": str(tmp_path / "out"), "workers": "1"}


@pytest.fixture
def run(shards, clip_folder, tmp_path):
    """`run(main, **changes)` calls a launcher with valid settings and these changes; `__` stands for a dot in a key."""

    def call(main, *more, **changes):
        settings = training_settings(shards, clip_folder, tmp_path, TINY_PROMPT, **changes)
        if main.__module__ == "evaluate_script":
            settings = evaluation_settings(settings)
        main([*arguments(settings), *more])

    return call


@pytest.fixture
def refused(capsys):
    """`refused(call)` expects one error and returns its line."""
    return lambda call: one_error(call, capsys)


def test_the_settings_work_without_changes(run, train, evaluate, tmp_path, capsys):
    """Otherwise the tests below could pass because of another error."""
    run(train, out=tmp_path / "run")
    assert (tmp_path / "run" / "stage1" / "adapter.safetensors").is_file()
    run(evaluate, adapters=f"[mine={tmp_path}/run/stage1/adapter.safetensors]")
    assert json.loads((tmp_path / "run" / "out.json").read_text())["rows"]
    assert "error" not in capsys.readouterr().err


# -- captions, photos, knowledge --------------------------------------------------------------------------------------


def test_missing_captions_file(convert, dataset, refused):
    dataset["captions"] += ".gone"
    assert dataset["captions"] in refused(lambda: convert(arguments(dataset)))


def test_missing_images_folder(convert, dataset, refused):
    dataset["images"] += "-gone"
    assert dataset["images"] in refused(lambda: convert(arguments(dataset)))


@pytest.mark.parametrize(
    ("name", "old", "new", "named"),
    [
        ("dataset.json", '"images"', '"imags"', "images"),
        ("dataset.json", '"sentences"', '"sentenses"', "sentences"),
        ("dataset.json", '"raw"', '"rwa"', "raw"),
        ("knowledge.jsonl", '"triplets"', '"triples"', "triplets"),
        ("knowledge.jsonl", '"subject"', '"subjekt"', "subject"),
    ],
)
def test_wrong_json_key(convert, dataset, refused, name, old, new, named):
    path = Path(dataset["captions"]).with_name(name)
    path.write_text(path.read_text().replace(old, new))
    line = refused(lambda: convert(arguments(dataset)))
    assert name in line and named in line and new.strip('"') in line


def test_captions_file_that_is_no_json(convert, dataset, refused):
    Path(dataset["captions"]).write_text('{"images": [')
    assert "dataset.json" in refused(lambda: convert(arguments(dataset)))


def test_too_many_truncated_photos(convert, dataset, refused):
    for index in range(3):
        path = Path(dataset["images"]) / f"train_{index:03d}.jpg"
        path.write_bytes(path.read_bytes()[:-200])
    line = refused(lambda: convert(arguments(dataset)))
    assert "train_000.jpg" in line and "max_skipped" in line
    assert not Path(dataset["out"], "manifest.json").exists()


def test_a_truncated_photo_below_the_threshold_is_listed(convert, dataset):
    path = Path(dataset["images"]) / "train_001.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    convert([*arguments(dataset), "--max_skipped", "0.5"])
    manifest = ShardManifest.load(dataset["out"])
    assert manifest.samples("train") == 7
    assert "train_001.jpg" in json.dumps(manifest.skipped)


def test_a_caption_of_500_words_passes(convert, dataset, run, train, evaluate, tmp_path, capsys):
    content = json.loads(Path(dataset["captions"]).read_text())
    for image in content["images"]:
        image["sentences"][0]["raw"] = " ".join(f"word{i}" for i in range(500)) + f" {image['filename']}"
    Path(dataset["captions"]).write_text(json.dumps(content))
    convert(arguments(dataset))
    shards = dataset["out"]
    record = json.loads(members_of(next(Path(shards).glob("test-*.tar")))[1][1])
    assert len(record["captions"][0]["text"].split()) == 501
    run(train, data__shards=shards, out=tmp_path / "run")
    run(evaluate, data__shards=shards, adapters=f"[{tmp_path}/run/stage1/adapter.safetensors]")
    assert "error" not in capsys.readouterr().err


# -- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launched", ["train", "evaluate"])
def test_missing_shards_folder(run, refused, request, tmp_path, launched):
    main = request.getfixturevalue(launched)
    line = refused(lambda: run(main, data__shards=tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in line and "amp make_shards" in line


def test_shards_are_not_given(run, train, refused):
    assert "data.shards" in refused(lambda: run(train, data__shards=None))


def test_unfinished_shards(run, train, refused, copied_shards):
    (copied_shards / "manifest.json").unlink()
    assert "manifest.json" in refused(lambda: run(train, data__shards=copied_shards))


def test_manifest_with_a_wrong_key(run, train, refused, copied_shards):
    path = copied_shards / "manifest.json"
    path.write_text(path.read_text().replace('"samples"', '"smaples"'))
    line = refused(lambda: run(train, data__shards=copied_shards))
    assert str(path) in line and "'samples' is missing" in line


@pytest.mark.parametrize(("honest", "said"), [(True, "holds no sample"), (False, "bytes; expected")])
def test_empty_shard(run, train, refused, copied_shards, honest, said):
    path = replace_shard(copied_shards, "train", [], honest=honest)
    line = refused(lambda: run(train, data__shards=copied_shards))
    assert str(path) in line and said in line


def test_unknown_split(run, train, evaluate, refused):
    assert "'trian'" in refused(lambda: run(train, data__train_split="trian"))
    assert "train, val, test" in refused(lambda: run(evaluate, split="tset"))


@pytest.mark.parametrize(("launched", "workers"), [("train", 1), ("evaluate", 0)])
def test_truncated_image_in_a_shard(run, refused, request, copied_shards, launched, workers):
    split = {"train": "train", "evaluate": "test"}[launched]
    name, content = members_of(ShardManifest.load(copied_shards).split(split)[0].path)[0]
    members = members_of(ShardManifest.load(copied_shards).split(split)[0].path)
    path = replace_shard(copied_shards, split, [(name, content[: len(content) // 2]), *members[1:]])
    main = request.getfixturevalue(launched)
    # Reads a whole epoch, which contains the sample in any order.
    changes = {"stage1__max_steps": 0, "stage1__epochs": 3}
    line = refused(lambda: run(main, data__shards=copied_shards, data__workers=workers, **changes))
    assert str(path) in line and repr(name.removesuffix(".jpg")) in line and "amp make_shards" in line


def test_a_batch_larger_than_the_split(run, train, refused):
    line = refused(lambda: run(train, data__batch_size=23))
    assert "22 images" in line and "data.batch_size" in line


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launched", ["train", "evaluate"])
def test_unknown_key_on_the_command_line(run, refused, request, launched):
    main = request.getfixturevalue(launched)
    assert "data.nonsense" in refused(lambda: run(main, "--data.nonsense", "3"))
    assert "--nonsense" in refused(lambda: run(main, "--nonsense", "3"))


@pytest.mark.parametrize(
    ("launched", "text", "named"),
    [("train", "data:\n  shrads: x\n", "shrads"), ("evaluate", "learning_rate: 1\n", "learning_rate")],
)
def test_unknown_key_in_the_file(run, refused, request, tmp_path, launched, text, named):
    (tmp_path / "config.yaml").write_text(text)
    main = request.getfixturevalue(launched)
    assert named in refused(lambda: run(main, config=tmp_path / "config.yaml"))


def test_unknown_option_of_make_shards(convert, dataset, refused):
    assert "--nonsense" in refused(lambda: convert([*arguments(dataset), "--nonsense", "3"]))


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"", "holds None, expected settings, one KEY: VALUE per line"),
        (b"- a\n- b\n", r"holds \['a', 'b'\], expected settings"),
        (b"data:\n\tshards: x\n", "Problems parsing config: .* line 2, column 1"),
        (b"\xff\xfes\x00", "can't decode byte 0xff"),
        (b"seed: many\n", 'Parser key "seed": .* many'),
        (b"data: 3\n", "data is 3, expected nested settings"),
    ],
)
def test_a_config_file_that_is_no_settings_is_named(train, refused, tmp_path, content, problem):
    (tmp_path / "own.yaml").write_bytes(content)
    assert re.search(
        f"error: {tmp_path}/own.yaml: .*{problem}", refused(lambda: train(["--config", f"{tmp_path}/own.yaml"]))
    )


def test_a_config_that_is_not_given(train, refused):
    for words in (["--config", ""], ["--config="]):
        assert "error: config is empty, expected a file; add --config FILE" in refused(lambda words=words: train(words))


def test_missing_config_file(run, train, refused, tmp_path):
    assert "gone.yaml" in refused(lambda: run(train, config=tmp_path / "gone.yaml"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"stages": "[2]"}, ["stages is [2]", "init", "stage1/adapter.safetensors"]),
        ({"stages": "[2, 1]"}, ["stages is [2, 1]"]),
        ({"prompt.knowledge": "caption"}, ["knowledge is 'caption' and interaction is 'aim'", "'readout'"]),
        ({"prompt.interaction": "visual_prompts"}, ["enrich is false", "no knowledge is used"]),
        ({"prompt.interaction": "sum"}, ["interaction is 'sum'", "readout, aim, cat"]),
        ({"data.cache_images": "true", "data.augment": "crop"}, ["data.cache_images", "data.augment"]),
        ({"data.batch_size": 0}, ["data.batch_size is 0"]),
        ({"gradient_accumulation": 0}, ["gradient_accumulation is 0"]),
        ({"stage2.max_steps": -1}, ["stage2.max_steps is -1"]),
        ({"prompt.interaction_options": "{lam: 1.5}"}, ["lam is 1.5", "0 to 1"]),
        (
            {"prompt.interaction_options": "{lamda: 1}"},
            ["holds lamda", "bottleneck, lam, residual"],
        ),
        ({"prompt.depth": 3}, ["depth is 3", "from 0 to below 1"]),
        ({"validation_queries": -1}, ["validation_queries is -1"]),
        ({"stage1.epochs": 0}, ["stage1.epochs is 0", "1 or more"]),
        ({"trackers": "[tensorbord]"}, ["tensorbord", "tensorboard"]),
        ({"model.name": "local-dir:/nowhere"}, ["local-dir:/nowhere", "open_clip_config.json"]),
        ({"model.name": "ViT-B-61"}, ["ViT-B-61", "ViT-B-16"]),
        ({"model.name": "ViT-B-16", "model.pretrained": "opnai"}, ["opnai", "openai"]),
        ({"model.name": "ViT-B-16", "model.pretrained": "openai"}, ["quick_gelu", "ViT-B-16-quickgelu"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_make_no_sense(run, train, refused, changes, named):
    line = refused(lambda: run(train, **changes))
    for part in named:
        assert part in line


def test_a_value_of_the_wrong_type_names_its_key(run, train, capsys):
    with pytest.raises(SystemExit) as ended:
        run(train, stage1__lr="fast")
    shown = capsys.readouterr().err
    assert ended.value.code == 2 and "stage1.lr" in shown and "fast" in shown and "Traceback" not in shown
    assert len(shown.splitlines()) < 6  # the usage of every key would hide the error


@pytest.mark.parametrize(("key", "value"), [("top_k", 0), ("batch_size", 0), ("i2t", "[]"), ("max_queries", -1)])
def test_search_settings_that_make_no_sense(run, evaluate, refused, key, value):
    assert f"{key} is {value}" in refused(lambda: run(evaluate, **{f"search.{key}": value}))


# -- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign_adapter(tmp_path_factory):
    """An adapter of another base model with the same shapes but other weights."""
    folder = tmp_path_factory.mktemp("foreign")
    name = write_clip_folder(folder / "clip", seed=1)
    model, _, _ = amp.create_model_and_transforms(name, prompt_config=amp.PromptConfig(**TINY_PROMPT))
    amp.save_adapter(folder / "adapter.safetensors", model)
    return folder / "adapter.safetensors"


def test_checkpoint_of_another_base_model(run, train, evaluate, refused, foreign_adapter, clip_folder):
    for line in (
        refused(lambda: run(evaluate, adapters=f"[other={foreign_adapter}]")),
        refused(lambda: run(train, stages="[2]", init=foreign_adapter)),
    ):
        assert str(foreign_adapter) in line and "base model" in line and clip_folder in line
    with pytest.raises(amp.AmpError, match="base model"):
        amp.create_model_and_transforms(clip_folder, adapter=str(foreign_adapter))


@pytest.mark.parametrize("entry", ["mine=", "mine=gone.safetensors", "gone.safetensors", "="])
def test_adapters_entry_without_a_file(run, evaluate, refused, entry):
    line = refused(lambda: run(evaluate, adapters=f'["{entry}"]'))
    assert repr(entry) in line and "NAME=FILE" in line


def test_missing_init(run, train, refused):
    assert "gone.safetensors" in refused(lambda: run(train, stages="[2]", init="gone.safetensors"))


def test_files_that_are_no_adapters(run, evaluate, refused, tmp_path, foreign_adapter):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert "'format' is None" in refused(lambda: run(evaluate, adapters=f"[{tmp_path}/other.safetensors]"))
    (tmp_path / "cut.safetensors").write_bytes(foreign_adapter.read_bytes()[:-100])
    assert "not a complete safetensors file" in refused(lambda: run(evaluate, adapters=f"[{tmp_path}/cut.safetensors]"))


def test_init_with_other_prompt_settings(run, train, refused, clip_folder, tmp_path):
    config = amp.PromptConfig(**{**TINY_PROMPT, "num_prompts": 3})
    model, _, _ = amp.create_model_and_transforms(clip_folder, prompt_config=config)
    amp.save_adapter(tmp_path / "adapter.safetensors", model)
    line = refused(lambda: run(train, stages="[2]", init=tmp_path / "adapter.safetensors"))
    assert "num_prompts is 3 in the file and 2 in the model" in line


def test_a_picture_without_adapters_is_refused_before_anything_runs(run, evaluate, refused, tmp_path):
    assert "--adapters" in refused(lambda: run(evaluate, gallery=tmp_path / "picture.png"))
    assert not (tmp_path / "run" / "out.json").exists()


# -- retrieval --------------------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_give_no_figures(run, evaluate, refused, clip_folder, tmp_path):
    model, _, _ = amp.create_model_and_transforms(clip_folder, prompt_config=amp.PromptConfig(**TINY_PROMPT))
    model.interaction.aim.gate.data[0] = float("nan")
    amp.save_adapter(tmp_path / "adapter.safetensors", model)
    line = refused(lambda: run(evaluate, adapters=f"[mine={tmp_path}/adapter.safetensors]"))
    assert "adapter.safetensors: 1 weights contain NaN or infinite values, first 'interaction.aim.gate'" in line
    assert not (tmp_path / "run" / "out.json").exists()


@pytest.mark.parametrize("kept", ["gone", "other"])
def test_a_photo_of_the_manifest_that_is_missing(run, evaluate, refused, copied_shards, kept):
    """Its shard is missing, or has one sample less than the manifest says."""
    path = ShardManifest.load(copied_shards).split("test")[1].path
    if kept == "gone":
        Path(path).unlink()
    else:
        replace_shard(copied_shards, "test", members_of(path)[2:], number=1)
    assert ".tar" in refused(lambda: run(evaluate, data__shards=copied_shards))


def test_captions_without_knowledge_and_few_candidates_are_searched(
    run, evaluate, copied_shards, clip_folder, tmp_path
):
    """No caption has a triplet, and the gallery is smaller than k. Both are valid input."""
    for number, shard in enumerate(ShardManifest.load(copied_shards).split("test")):
        members = []
        for name, content in members_of(shard.path):
            if name.endswith(".json"):
                record = json.loads(content)
                for caption in record["captions"]:
                    caption["triplets"], caption["states"] = [], []
                content = json.dumps(record).encode()
            members.append((name, content))
        replace_shard(copied_shards, "test", members, number=number)
    model, _, _ = amp.create_model_and_transforms(clip_folder, prompt_config=amp.PromptConfig(**TINY_PROMPT))
    amp.save_adapter(tmp_path / "adapter.safetensors", model)
    run(evaluate, data__shards=copied_shards, adapters=f"[mine={tmp_path}/adapter.safetensors]", search__top_k=500)
    rows = json.loads((tmp_path / "run" / "out.json").read_text())["rows"]
    assert rows[1]["t2i"]["top_k"] == 12 and rows[1]["t2i"]["ceiling"]["R@1"] == 100
    assert (tmp_path / "run" / "out.verbs.csv").read_text().count("\n") == 1


def test_more_folds_than_images(run, evaluate, refused):
    assert "folds is 13, expected at most 12" in refused(lambda: run(evaluate, search__folds=13))
