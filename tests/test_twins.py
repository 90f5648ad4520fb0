"""Twin accuracy (tools/scenes/twins.py) compared with open_clip itself and with one public call per pair."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.equations.search import won_comparisons
from support.repository import ROOT

import amp
from amp.data.conversion.make import make_shards
from amp.errors import AmpError
from amp.model.adapter import save_adapter

sys.path.insert(0, str(ROOT / "tools" / "scenes"))

import comparisons
import make_scenes
import twins

MICRO_CLIP = f"local-dir:{ROOT / 'tools' / 'scenes' / 'micro-clip'}"
SETTINGS = {"interaction": "aim", "depth": 0.667, "num_prompts": 2, "interaction_options": {"bottleneck": 2}}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Drawn scenes, shards, two untrained adapters far from the base model, and the command's result."""
    folder = tmp_path_factory.mktemp("twins")
    scenes = folder / "scenes"
    make_scenes.make_scenes(out=scenes, train=0, val=0, test=24)
    make_shards(
        captions=scenes / "dataset.json",
        images=scenes / "images",
        knowledge=scenes / "knowledge.jsonl",
        out=folder / "shards",
        workers=1,
    )
    models = {}
    for name, knowledge in (("control", "none"), ("aware", "both")):
        torch.manual_seed(1)
        config = amp.PromptConfig(knowledge, **SETTINGS)
        model, _, _ = amp.create_model_and_transforms(MICRO_CLIP, prompt_config=config)
        if model.interaction.conditioned:  # so that knowledge changes images and texts
            model.interaction.aim.gate.data.normal_(std=2.0)
            model.text_enrichment.states.weight.data.normal_(std=0.1)
        model.text_enrichment.adapt.weight.data.normal_(std=0.3)
        save_adapter(folder / f"{name}.safetensors", model.eval())
        models[name] = model
    arguments = [
        *("--model.name", MICRO_CLIP, "--shards", str(folder / "shards"), "--cache", str(folder / "cache")),
        *("--workers", "0", "--dataset", str(scenes / "dataset.json"), "--out", str(folder / "twins.json")),
        *("--adapters", *(f"{name}={folder}/{name}.safetensors" for name in models)),
    ]
    twins.main(arguments)
    return folder, models, arguments


def rows_of(folder: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((folder / "twins.json").read_text())["rows"]}


@pytest.mark.parametrize("name", ["base CLIP", "control", "aware"])
def test_won_comparisons_equal_a_naive_loop(world, name):
    folder, models, _ = world
    row, expected = rows_of(folder)[name], won_comparisons(folder / "scenes", MICRO_CLIP, models.get(name))
    for change, (won, made) in expected.items():
        assert made == 3 * 2 * 3 and row[change]["twins"] == 3
        assert (row[change]["won"], row[change]["comparisons"], row[change]["ties"]) == (won, made, 0)
        assert row[change]["accuracy"] == pytest.approx(100 * won / made)


def test_models_differ(world):
    """Otherwise the comparison with the naive loop would not test conditioning."""
    rows = rows_of(world[0])
    assert len({tuple(rows[n][c]["won"] for c in comparisons.CHANGES) for n in ("base CLIP", "control", "aware")}) > 1


def test_grey_pictures_tie(world):
    row = rows_of(world[0])["aware, grey"]
    for change in comparisons.CHANGES:
        assert row[change]["accuracy"] == 50.0 and row[change]["ties"] == row[change]["comparisons"]


def test_the_control_has_no_grey_row(world):
    assert list(rows_of(world[0])) == ["base CLIP", "control", "aware", "aware, grey"]


def test_ties_are_half_won_and_errors_are_over_twins():
    """Three pairs of pictures with two captions each: both won, one won, and ties."""
    own, other = torch.tensor([0, 1, 2, 3, 4, 5]), torch.tensor([1, 0, 3, 2, 5, 4])
    table = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])  # score of the own picture of caption c

    def score(images, captions):
        return torch.where(images == own[captions], table[captions], torch.where(captions == 3, 1.0, 0.0))

    one = comparisons.Comparisons(torch.arange(6), own, other, 3)
    row = comparisons.accuracy({"roles": one}, score)["roles"]
    gains = np.array([[1, 1], [1, 0], [0.5, 0.5]])
    assert (row["won"], row["ties"], row["comparisons"]) == (3, 2, 6)
    assert row["accuracy"] == pytest.approx(100 * gains.mean())
    # All pairs have the same size, so this is the standard error of the mean of three pair means.
    assert row["standard_error"] == pytest.approx(100 * gains.mean(1).std(ddof=1) / np.sqrt(3))


def change(folder: Path, tmp_path: Path, edit) -> Path:
    data = json.loads((folder / "scenes" / "dataset.json").read_text())
    edit(data)
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda data: data.pop("images"), "not a dataset.json of drawn scenes"),
        (lambda data: data["images"][5].update(change="colour"), "change of test_00005.jpg is 'colour'"),
        (lambda data: data["images"][5].update(twin="other.jpg"), "other.jpg is not in the shards"),
        (lambda data: [image.pop("twin", None) for image in data["images"]], "no twins with another roles or action"),
    ],
)
def test_wrong_files_are_named(world, tmp_path, edit, said):
    folder, _, _ = world
    path = change(folder, tmp_path, edit)
    names = [f"test_{i:05d}.jpg" for i in range(24)]
    with pytest.raises(AmpError, match=said) as error:
        comparisons.twin_comparisons(path, names, torch.arange(24))
    assert str(path) in str(error.value)


def test_the_base_model_alone_is_measured_and_written(world, tmp_path):
    folder, _, arguments = world
    twins.main([*arguments, "--adapters", "[]", "--out", str(tmp_path / "twins.json")])
    assert rows_of(tmp_path) == {"base CLIP": rows_of(folder)["base CLIP"]}


def test_a_missing_file_is_one_line(world, capsys):
    _, _, arguments = world
    with pytest.raises(SystemExit) as stopped:
        twins.main([*arguments, "--dataset", "no/such/dataset.json"])
    assert stopped.value.code == 2
    assert ": error: no/such/dataset.json: can't be read (No such file or directory)" in capsys.readouterr().err
