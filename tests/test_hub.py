"""Sharing adapters: folder, hub cache, model card, CLIP_benchmark's loader, and the exported graph."""

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.models import aim_settings, make_model, shake, write_clip_folder

import amp
from amp.commands import publish
from amp.evaluate.results import ResultFile
from amp.files import sha256_of
from amp.publish.export import INPUTS, ImageEncoder
from amp.retrieval.figures import DirectionResult, RetrievalRow, RowKey
from amp.retrieval.metrics import KS

READOUT = {"interaction_options": {"blocks": 1}, "depth": 1 / 3, "num_prompts": 4}
RECORD = {
    "stage": 2,
    "step": 7,
    "config": {
        "out": "/home/someone/runs/x",
        "init": None,
        "seed": 3,
        "stages": [1, 2],
        "data": {"shards": "/home/someone/data/dogs", "cache": "/scratch/cache", "batch_size": 8},
        "stage1": {"epochs": 2, "lr": 0.1},
        "stage2": {"epochs": 1, "lr": 0.2},
        "mixed_precision": None,
        "conditioning": "contrastive",
        "model": {"resize_mode": "squash"},
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A separate copy of the base model, because a test moves it."""
    return write_clip_folder(tmp_path_factory.mktemp("hub") / "tiny-clip")


def trained(base: str, **settings) -> amp.ActionAwareCLIP:
    model, _, _ = amp.create_model_and_transforms(base, prompt_config=amp.PromptConfig(**settings))
    generator = torch.Generator().manual_seed(2)
    shake(model, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run") / "adapter.safetensors"
    amp.save_adapter(path, trained(base, **READOUT), RECORD)
    return path


@pytest.fixture
def folder(adapter, tmp_path) -> Path:
    return amp.save_pretrained(tmp_path / "model", adapter)


def aware(model, images, knowledge) -> torch.Tensor:
    text = model.encode_text(model.tokenizer(["a dog jumps", "a girl", "nothing", "men"]))
    with torch.no_grad():
        return model.encode_image(images, knowledge, text=text)


# -- the folder -------------------------------------------------------------------------------------------------------


def test_the_folder_gives_the_same_model(folder, adapter, base, images, knowledge, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", None)  # nothing here may use a network
    assert {path.name for path in folder.iterdir()} == {
        "adapter.safetensors",
        "config.json",
        "README.md",
        "modules.json",  # these two for sentence-transformers; see test_cross_encoder.py
        "config_sentence_transformers.json",
    }
    expected, _, preprocess = amp.create_model_and_transforms(base, adapter=str(adapter), image_resize_mode="squash")
    model, _, own = amp.from_pretrained(folder)
    assert not model.training and repr(own) == repr(preprocess)
    assert torch.equal(aware(model, images, knowledge), aware(expected.eval(), images, knowledge))


def test_config_json_names_the_base_and_no_place_of_the_machine(folder, adapter, base):
    config = json.loads((folder / "config.json").read_text())
    header, _ = amp.publish.hub.read_adapter(adapter)
    assert config["base_model"] == {"name": base, "pretrained": None, "sha256": header.base_hash, "quick_gelu": False}
    assert config["prompt"]["interaction"] == "readout"
    assert config["training"]["config"]["data"]["shards"] == "dogs"
    for name in ("config.json", "README.md", "adapter.safetensors"):
        for place in (b"/home/someone", b"/scratch"):
            assert place not in (folder / name).read_bytes()
    assert RECORD["config"]["data"]["shards"] == "/home/someone/data/dogs"  # the caller's record is unchanged


def test_config_and_weights_that_disagree_are_refused(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"num_prompts": 4', '"num_prompts": 5'))
    with pytest.raises(amp.AmpError, match=r"config\.json: prompt differs from the one in adapter\.safetensors"):
        amp.from_pretrained(folder)
    path.write_text("{")
    with pytest.raises(amp.AmpError, match="not a config"):
        amp.from_pretrained(folder)


def test_a_config_of_version_1_is_compared_by_what_it_means(folder):
    old = {
        "knowledge": "both",
        "interaction": "readout",
        "condition_images": True,
        "interaction_layer": 1,
        "readout_blocks": 1,
        "num_prompts": 4,
        "max_triplets": 6,
        "triplet_heads": 8,
        "text_enrichment": True,
        "text_triplets": True,
        "image_projection": True,
    }
    path = folder / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"prompt": old}))
    amp.from_pretrained(folder)
    path.write_text(json.dumps(content | {"prompt": old | {"num_prompts": 5}}))
    with pytest.raises(amp.AmpError, match=r"config\.json: prompt differs from the one in adapter\.safetensors"):
        amp.from_pretrained(folder)


def test_another_base_model_is_refused_and_a_moved_one_named(folder, base, tmp_path, images, knowledge):
    other = write_clip_folder(tmp_path / "other", seed=5)
    with pytest.raises(amp.AmpError, match="base model"):
        amp.from_pretrained(folder, base=other)
    moved = shutil.copytree(base.removeprefix("local-dir:"), tmp_path / "moved")
    model, _, _ = amp.from_pretrained(folder, base=f"local-dir:{moved}")
    assert torch.equal(aware(model, images, knowledge), aware(amp.from_pretrained(folder)[0], images, knowledge))


def test_an_empty_folder_and_a_results_file_of_another_adapter(tmp_path, adapter):
    (tmp_path / "empty").mkdir()
    with pytest.raises(amp.AmpError, match="no such adapter file"):
        amp.from_pretrained(tmp_path / "empty")
    results = result_file("0" * 64).save_json(tmp_path / "results.json")
    with pytest.raises(amp.AmpError, match="no row was made with"):
        amp.save_pretrained(tmp_path / "model", adapter, results)
    assert not (tmp_path / "model").exists()


# -- the card ---------------------------------------------------------------------------------------------------------


def result_file(sha256: str) -> ResultFile:
    def direction(first: float) -> DirectionResult:
        recall = {k: first + i for i, k in enumerate(KS)}
        return DirectionResult(recall, {k: 90.0 for k in KS}, {k: 1.0 for k in KS}, 10, 20, 1.0)

    rows = [RetrievalRow(RowKey("base | <b>CLIP</b>"), direction(10.0), direction(20.25))]
    return ResultFile({"dataset": "dogs", "images": 10, "adapters": {"mine": sha256}}, rows)


def test_the_card_tells_the_run_and_escapes_what_it_quotes(adapter, tmp_path):
    import yaml

    results = result_file(sha256_of(adapter)).save_json(tmp_path / "results.json")
    publish.main(
        [
            "--adapter",
            str(adapter),
            "--results",
            str(results),
            "--out",
            str(tmp_path / "model"),
            "--base",
            "hf-hub:org/clip",
        ]
    )
    card = (tmp_path / "model" / "README.md").read_text()
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header)["base_model"] == "org/clip"
    assert "| base \\| &lt;b&gt;CLIP&lt;/b&gt; | 10.0 | 11.0 | 12.0 | 20.2 | 21.2 | 22.2 | 96.8 |" in text
    assert "| stage 1: epochs, peak rate | 2, 0.1 |" in text and "| data | dogs |" in text
    assert amp.publish.hub.read_adapter(adapter)[0].base_hash in text
    assert "Not evaluated" in (amp.save_pretrained(tmp_path / "bare", adapter) / "README.md").read_text()


# -- the hub ----------------------------------------------------------------------------------------------------------


def test_a_repository_in_the_hub_cache_loads_offline(folder, base, tmp_path, images, knowledge):
    """The hub client finds its own download cache without a network."""
    repository = tmp_path / "cache" / "models--org--dogs"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
    model, _, _ = amp.from_pretrained("hf-hub:org/dogs", cache_dir=tmp_path / "cache", local_files_only=True)
    assert torch.equal(aware(model, images, knowledge), aware(amp.from_pretrained(folder)[0], images, knowledge))
    with pytest.raises(amp.AmpError, match="hf-hub:org/cats: can't be downloaded"):
        amp.from_pretrained("hf-hub:org/cats", cache_dir=tmp_path / "cache", local_files_only=True)


def test_push_uploads_the_written_files_and_refuses_a_local_base(folder, adapter, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, *a, **k: calls.append((a, k)))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **k: calls.append(k) or "address")
    with pytest.raises(amp.AmpError, match="a local folder, expected a model that others can load"):
        amp.push_to_hub(folder, "org/dogs")
    assert not calls
    public = amp.save_pretrained(tmp_path / "public", adapter, base="hf-hub:org/clip")
    assert amp.push_to_hub(public, "org/dogs", private=True) == "address"
    (create, upload) = calls
    assert create == (("org/dogs",), {"private": True, "exist_ok": True})
    assert upload["repo_id"] == "org/dogs" and sorted(upload["allow_patterns"]) == sorted(
        path.name for path in public.iterdir()
    )
    (public / "modules.json").unlink()  # as in a folder of an older version
    assert amp.push_to_hub(public, "org/dogs") == "address"
    (public / "README.md").unlink()
    with pytest.raises(amp.AmpError, match=r"no README\.md"):
        amp.push_to_hub(public, "org/dogs")


def test_publish_says_what_is_missing(capsys):
    with pytest.raises(SystemExit) as ended:
        publish.main(["--adapter", "x"])
    assert ended.value.code == 2 and "error: out is empty" in capsys.readouterr().err


def test_a_file_in_place_of_the_folder_is_refused(adapter, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(amp.AmpError, match=r"file/adapter.safetensors: can't be written \(File exists\)"):
        amp.save_pretrained(tmp_path / "file", adapter)
    assert (tmp_path / "file").read_text() == "mine"


# -- CLIP_benchmark ---------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path) -> tuple[Path, list[tuple[str, str]]]:
    """Five photos with two captions each, as CLIP_benchmark reads Flickr8k."""
    generator = torch.Generator().manual_seed(3)
    (tmp_path / "photos").mkdir()
    rows = []
    for n in range(5):
        pixels = torch.randint(0, 255, (40, 36, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "photos" / f"{n}.jpg")
        rows += [(f"{n}.jpg", f"animal {n} runs"), (f"{n}.jpg", f"house {n}")]
    with open(tmp_path / "annotations.txt", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    return tmp_path, rows


@pytest.mark.parametrize("pretrained", ["adapter", "base"])
def test_clip_benchmark_evaluates_through_its_own_loader(folder, photos, monkeypatch, pretrained):
    pytest.importorskip("clip_benchmark")
    from amp.commands import clip_benchmark as command

    root, rows = photos
    monkeypatch.setattr(sys, "argv", ["clip_benchmark"])
    given = {
        "model_type": "amp",
        "model": folder,
        "pretrained": pretrained,
        "dataset": "flickr8k",
        "dataset_root": root / "photos",
        "annotation_file": root / "annotations.txt",
        "num_workers": 0,
        "batch_size": 2,
        "output": root / "out.json",
    }
    options = [str(part) for key, value in given.items() for part in (f"--{key}", value)]
    command.main(["eval", *options, "--recall_k", "1", "2", "--no_amp"])
    metrics = json.loads((root / "out.json").read_text())["metrics"]

    model, _, preprocess = amp.from_pretrained(folder)
    images = torch.stack([preprocess(Image.open(root / "photos" / f"{n}.jpg").convert("RGB")) for n in range(5)])
    with torch.no_grad():
        if pretrained == "base":
            image, text = (
                model.backbone.clip.encode_image(images),
                model.backbone.clip.encode_text(model.tokenizer([caption for _, caption in rows])),
            )
        else:
            image = model.image_features(images)
            text = model.encode_text(model.tokenizer([c for _, c in rows]), knowledge=[amp.Knowledge()] * len(rows))
    scores = F.normalize(text, dim=-1) @ F.normalize(image, dim=-1).T
    for k in (1, 2):
        found = [n // 2 in row.topk(k).indices for n, row in enumerate(scores)]
        assert metrics[f"image_retrieval_recall@{k}"] == pytest.approx(sum(found) / len(found))
        found = [any(c // 2 == n for c in row.topk(k).indices) for n, row in enumerate(scores.T)]
        assert metrics[f"text_retrieval_recall@{k}"] == pytest.approx(sum(found) / len(found))


def test_clip_benchmark_refuses_other_names(folder):
    from amp.publish.clip_benchmark import load_amp

    with pytest.raises(amp.AmpError, match="expected 'adapter' or 'base'"):
        load_amp(str(folder), "laion2b")


# -- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(READOUT, id="readout"),
        pytest.param(aim_settings(), id="aim", marks=pytest.mark.slow),  # tracing takes many seconds
        pytest.param(aim_settings(interaction="cat"), id="cat", marks=pytest.mark.slow),
    ],
)
def test_the_exported_encoder_is_the_model_for_any_number_of_images(settings, images, knowledge, tmp_path):
    model = make_model(trained=True, **settings).eval()
    amp.export_image_encoder(model, tmp_path / "encoder.pt2")
    program = torch.export.load(tmp_path / "encoder.pt2").module()
    batch = model.prepare_knowledge(knowledge)
    text = torch.randn(4, model.backbone.embed_dim, generator=torch.Generator().manual_seed(1))
    values = (images, *vars(batch).values(), text)
    assert list(INPUTS) == ["images", *vars(batch), "text"]
    for rows in (4, 1, 3):
        part = [value[:rows] for value in values]
        with torch.no_grad():
            expected = model.encode_image(part[0], batch[:rows], text=part[-1])
            torch.testing.assert_close(program(*part), expected, atol=2e-6, rtol=1e-5)


def test_a_control_has_no_action_aware_encoder():
    with pytest.raises(amp.AmpError, match="not a control"):
        ImageEncoder(make_model(knowledge="none"))
