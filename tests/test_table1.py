"""Table 1: published figures, manually checked anomalies, runs found by name, baselines with towers without prompts."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from accelerate import Accelerator
from clip_benchmark.metrics import zeroshot_retrieval
from support.models import write_model_folder
from support.processes import run_ranks
from support.repository import ROOT

import amp
from amp.commands import evaluate, table1, train
from amp.data.split import ShardSplit
from amp.data.split_captions import SplitCaptions
from amp.errors import AmpError
from amp.evaluate.baseline import baseline
from amp.evaluate.results import ResultFile
from amp.evaluate.settings import BaseSettings, EvaluationSettings
from amp.evaluate.table1 import anomalies, commands, load_published, render_markdown
from amp.model.adapter import save_adapter
from amp.terminal import Terminal

PUBLISHED = ROOT / "results/table1_published.yaml"


@pytest.fixture
def rows():
    return load_published(PUBLISHED)[0]


def test_every_row_of_the_paper_is_there(rows):
    paper = {(row.backbone, row.method) for row in rows if "paper" in row.figures["coco"]}
    assert paper == {
        *(("ViT-B/32", m) for m in ("CLIP", "MGCA", "PyramidCLIP", "CLIPDualDIS", "OpenCLIP", "SaCo", "action-aware")),
        *(("ViT-B/16", m) for m in ("CLIP", "MGCA", "PyramidCLIP", "EVA-02-CLIP", "FineCLIP", "SaCo", "action-aware")),
        *(("ViT-L/14-336", m) for m in ("CLIP", "MGCA", "FILIP", "REACT", "MetaCLIP", "action-aware")),
    }
    text = "".join(path.read_text() for path in (ROOT / "../shared/paper").glob("*.txt"))
    if text:  # the paper is not in the repository
        for row in rows:
            values = [*row.figures["coco"].get("paper", []), *row.figures["flickr30k"].get("paper", [])]
            printed = "\t".join("-" if v is None else f"{v:.1f}" for v in values)
            plain = text.replace("<b>", "").replace("</b>", "").replace("<u>", "").replace("</u>", "")
            assert not values or printed in plain, row.name


def test_the_papers_anomalies_are_found(rows):
    found = {(row.name, dataset): text for row, dataset, text in anomalies(rows) if "open_clip" not in text}
    pairs = {(row.name, dataset, text.split(",")[0]) for row, dataset, text in anomalies(rows)}
    assert ("CLIP, ViT-L/14-336", "coco", "Rsum is printed as 394.2") in pairs
    assert found["CLIPDualDIS, ViT-B/32", "coco"] == "all three t2i figures equal those of CLIP, ViT-L/14-336"
    assert found["CLIP, ViT-L/14-336", "coco"] == "all three t2i figures equal those of CLIPDualDIS, ViT-B/32"
    assert len([p for p in pairs if p[2].startswith("Rsum")]) == 1
    far = [text for row, dataset, text in anomalies(rows) if row.name == "CLIP, ViT-L/14-336" and "open_clip" in text]
    assert "t2i R@5 63.4 against 61.6" in far[0]


def test_runs_are_read_and_the_others_have_commands(rows, tmp_path, capsys):
    missing = commands(rows, "runs/table1")
    assert sum("launchers/train.py" in line for line in missing) == 6 and len(missing) == 26
    result = ResultFile.load_json(_result(tmp_path / "clip_vit_b32.coco.json"))
    table1.main(["--published", str(PUBLISHED), "--results", str(tmp_path), "--out", str(tmp_path / "table.md")])
    text = (tmp_path / "table.md").read_text()
    figures = [*result.rows[0].i2t.recall.values(), *result.rows[0].t2i.recall.values(), result.rows[0].rsum]
    assert f"| ViT-B/32 | CLIP | here | {' | '.join(f'{v:.1f}' for v in figures)} |" in text
    assert "| ViT-B/16 | CLIP | here |  |  |  |  |  |  |  |" in text
    assert (
        "| ViT-B/32 | CLIPDualDIS | paper [2] |" in text and "here" not in text.split("CLIPDualDIS")[1].split("\n")[0]
    )
    capsys.readouterr()
    table1.main(["--published", str(PUBLISHED), "--results", str(tmp_path), "--commands", "true"])
    assert len(capsys.readouterr().out.splitlines()) == 25


def test_results_that_cant_be_used_are_left_out_with_the_reason(rows, tmp_path, capsys):
    _result(tmp_path / "clip_vit_b16.coco.json")
    ours = next(row.id for row in rows if row.training)
    spoilt = {
        "clip_vit_b32.coco.json": ("{", "not JSON"),
        f"{ours}.coco.json": (_result(tmp_path / "x").read_text(), "has 1 rows, expected base CLIP and an adapter"),
        "clip_vit_b32.flickr30k.json": (
            json.dumps(json.loads(_result(tmp_path / "x").read_text()) | {"protocol": {"missing_rows": ["ours"]}}),
            "1 rows are missing",
        ),
    }
    for name, (text, _) in spoilt.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as error:
        table1.main(["--published", str(PUBLISHED), "--results", str(tmp_path), "--out", str(tmp_path / "table.md")])
    text, said = (tmp_path / "table.md").read_text(), capsys.readouterr().err
    assert error.value.code == 1 and "| ViT-B/16 | CLIP | here | 10.0 |" in text
    assert "| ViT-B/32 | CLIP | here |  |" in text
    listed = text.split("## Results left out")[1].split("## Sources")[0].strip().splitlines()
    assert len(listed) == 3 and said.count("left out: ") == 3
    for name, (_, reason) in spoilt.items():
        (line,) = (line for line in listed if name in line)
        assert reason in line


def test_the_table_in_the_repository_is_current(rows):
    assert (ROOT / "results/table1.md").read_text() == render_markdown(*load_published(PUBLISHED))


def _result(path: Path) -> Path:
    side = {
        "recall": {"R@1": 10.0, "R@5": 20.0, "R@10": 30.0},
        "ceiling": {"R@1": 40.0, "R@5": 40.0, "R@10": 40.0},
        "chance": {"R@1": 1.0, "R@5": 5.0, "R@10": 10.0},
        "queries": 10,
        "top_k": 20,
        "seconds": 1.0,
    }
    content = {
        "format": "open-clip-amp retrieval results",
        "version": 1,
        "protocol": {},
        "rows": [{"name": "base CLIP", "i2t": side, "t2i": side}],
    }
    path.write_text(json.dumps(content))
    return path


def test_other_files_are_refused(tmp_path):
    for content, message in (
        ("rows: 3", "not a file of published figures"),
        ("a: [", "not a file of published figures"),
    ):
        (tmp_path / "x.yaml").write_text(content)
        with pytest.raises(AmpError, match=message):
            load_published(tmp_path / "x.yaml")
    content = yaml.safe_load(PUBLISHED.read_text())
    content["rows"][0]["coco"]["paper"] = [1.0]
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(AmpError, match="CLIP, ViT-B/32, coco, paper has 1 figures, expected 7"):
        load_published(tmp_path / "x.yaml")


def test_each_row_that_can_be_run_has_its_model_or_its_training(rows):
    for row in rows:
        if row.training:
            for name, *options in map(str.split, row.training.values()):
                train.parser().parse_args(["--config", str(ROOT / "launchers/configs" / name), *options])
        elif row.id:
            name, pretrained = row.base
            assert open_clip.get_model_config(name)
            assert open_clip.get_pretrained_cfg(name, pretrained) or open_clip.get_pretrained_cfg(
                name.removesuffix("-quickgelu"), pretrained
            )


# -- baselines ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    return write_timm_folder(tmp_path_factory.mktemp("timm") / "tiny-timm", "test_vit")


def write_timm_folder(folder, tower):
    """Writes a model with a timm image tower and SigLIP's logit bias, in open_clip's own format."""
    config = {
        "embed_dim": 16,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "timm_model_name": tower,
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 160,
        },
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    clip = open_clip.CustomTextCLIP(**{k: v for k, v in config.items() if k != "custom_text"})
    return write_model_folder(folder, config, clip, size=160, std=0.5)


def _evaluate(name, shards, out, *more):
    evaluate.main(
        [
            "--model.name",
            name,
            "--model.pretrained",
            "null",
            "--shards",
            str(shards),
            "--batch_size",
            "5",
            "--workers",
            "0",
            "--out",
            str(out),
            "--bootstrap",
            "20",
            *more,
        ]
    )
    return ResultFile.load_json(out)


@pytest.mark.parametrize("tower", ["timm", "native"])
def test_a_baseline_equals_clip_benchmark(tower, timm_folder, clip_folder, shards, tmp_path, fresh_accelerate):
    name = timm_folder if tower == "timm" else clip_folder
    result = _evaluate(name, shards, tmp_path / "out.json")
    clip, _, preprocess = open_clip.create_model_and_transforms(name)
    split = ShardSplit(shards, "test")
    captions = SplitCaptions.read(split, ("action",))
    texts = [[t for t, i in zip(captions.texts, captions.image.tolist(), strict=True) if i == n] for n in range(12)]
    loader = [(torch.stack([preprocess(split.image(i)) for i in range(12)]), texts)]
    expected = zeroshot_retrieval.evaluate(
        clip.eval(), loader, open_clip.get_tokenizer(name), "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    (row,) = result.rows
    for k in (1, 5, 10):
        assert row.t2i.recall[k] == pytest.approx(100 * expected[f"image_retrieval_recall@{k}"], abs=1e-4)
        assert row.i2t.recall[k] == pytest.approx(100 * expected[f"text_retrieval_recall@{k}"], abs=1e-4)
    assert result.protocol["image_size"] == ([160, 160] if tower == "timm" else [32, 32])
    assert row.rsum_interval is not None and not (tmp_path / "out.verbs.csv").exists()


@pytest.mark.parametrize("tower", ["timm", "native"])
def test_a_baseline_in_low_precision(tower, timm_folder, clip_folder, shards, tmp_path, fresh_accelerate):
    name = timm_folder if tower == "timm" else clip_folder
    exact, low = (
        _evaluate(name, shards, tmp_path / f"{precision}.json", "--model.precision", precision).rows[0]
        for precision in ("fp32", "bf16")
    )
    assert low.rsum > 0 and abs(low.rsum - exact.rsum) < 0.5 * exact.rsum


def test_a_tower_without_plain_blocks_takes_no_adapter(clip_folder, shards, tmp_path, capsys, fresh_accelerate):
    convnext = write_timm_folder(tmp_path / "convnext", "test_convnext")
    save_adapter(tmp_path / "a.safetensors", amp.create_model_and_transforms(clip_folder)[0])
    with pytest.raises(SystemExit):
        evaluate.main(
            [
                "--model.name",
                convnext,
                "--model.pretrained",
                "null",
                "--shards",
                str(shards),
                "--out",
                str(tmp_path / "out.json"),
                "--adapters",
                f"x={tmp_path}/a.safetensors",
            ]
        )
    assert "image tower is timm's ConvNeXt, expected open_clip's native VisionTransformer" in capsys.readouterr().err


def _rank_row(name, shards):
    split, terminal = ShardSplit(shards, "test"), Terminal(False)
    settings = EvaluationSettings(str(shards), model=BaseSettings(name), workers=0, batch_size=5)
    captions = SplitCaptions.read(split, ("action",))
    retrieval, described = baseline(settings, split, captions, Accelerator(cpu=True), terminal)
    row = retrieval.base_row()
    found = row.i2t.recall, row.t2i.recall, retrieval.first["t2i"].candidates.tolist(), described
    return found, retrieval.text, torch.from_numpy(retrieval.frozen.base.__array__())


def test_two_ranks_give_the_baseline_of_one(clip_folder, shards, tmp_path, fresh_accelerate):
    one, *features = _rank_row(clip_folder, shards)
    for found, *of_rank in run_ranks(_rank_row, tmp_path / "ranks", clip_folder, shards):
        assert found == one
        torch.testing.assert_close(of_rank, features, rtol=0, atol=1e-5)  # scaled features would give the same ranks
    assert len({tuple(row) for row in one[2]}) > 10
