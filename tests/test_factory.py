"""Model creation: open_clip's signature and return value, its transforms, and errors before any download."""

import json
import shutil

import open_clip
import pytest
import torch
from PIL import Image
from support.models import aim_settings, make_clip, write_clip_folder

import amp
from amp.errors import AmpError
from amp.model.adapter import save_adapter
from amp.model.config import PromptConfig
from amp.model.factory import load_clip, refuse_quick_gelu_mismatch, refuse_unsupported_model
from amp.model.towers import base
from amp.model.towers.base import weights_hash
from amp.plan.simulator import shapes_only
from amp.train.config import ModelSettings, TrainConfig


@pytest.fixture
def no_download(monkeypatch):
    """Fails if open_clip would download anything."""

    def refuse(*args, **kwargs):
        pytest.fail(f"open_clip was asked to fetch {args}")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", refuse)
    monkeypatch.setattr(open_clip.factory, "download_pretrained_from_hf", refuse)


@pytest.fixture
def photo():
    """A photo whose left half is black and right half is white."""
    picture = Image.new("RGB", (40, 30), "black")
    picture.paste("white", (20, 0, 40, 30))
    return picture


def test_mirrors_open_clips_call_and_triple(clip_folder, tokenizer, images):
    model, train_transform, val_transform = amp.create_model_and_transforms(clip_folder)
    clip, _, expected = open_clip.create_model_and_transforms(clip_folder)
    assert isinstance(model, amp.ActionAwareCLIP) and model.config == PromptConfig()
    assert repr(val_transform) == repr(expected) and "RandomResizedCrop" in repr(train_transform)
    clip.eval().requires_grad_(False)
    ids = amp.get_tokenizer(clip_folder)(["a dog", ""])
    assert torch.equal(ids, tokenizer(["a dog", ""]))
    assert torch.equal(model.encode_image(images), clip.encode_image(images))
    assert torch.equal(model.encode_text(ids), clip.encode_text(ids))
    assert model.logit_scale.item() == pytest.approx(clip.logit_scale.item())
    assert (model.base_name, model.base_pretrained) == (clip_folder, None)
    assert model.base_hash == model.backbone.weights_hash() == weights_hash(clip, quick_gelu=False)


def test_the_hash_of_the_weights_is_computed_once_until_they_change(clip_folder, monkeypatch):
    calls = []
    monkeypatch.setattr(base, "weights_hash", lambda *arguments: calls.append(arguments) or weights_hash(*arguments))
    model, *_ = amp.create_model_and_transforms(clip_folder)
    backbone = model.backbone
    assert backbone.weights_hash() == model.base_hash and len(calls) == 1
    assert backbone.weights_hash("text") != model.base_hash
    changed = {name: weight + 1 for name, weight in model.state_dict().items()}
    model.load_state_dict(changed)
    loaded = backbone.weights_hash()
    backbone.remember_hash(loaded)
    model.half()
    assert len({model.base_hash, loaded, backbone.weights_hash()}) == 3
    model, *_ = amp.create_model_and_transforms(clip_folder, precision="bf16")
    assert model.backbone.weights_hash() != model.base_hash


def test_options_go_to_open_clip(clip_folder):
    *_, val_transform = amp.create_model_and_transforms(clip_folder, image_resize_mode="shortest")
    assert "CenterCrop" in repr(val_transform)


def test_no_transform_swaps_left_and_right(clip_folder, photo):
    _, train_transform, val_transform = amp.create_model_and_transforms(clip_folder)
    torch.manual_seed(0)
    for transform in [val_transform] + [train_transform] * 50:
        pixels = transform(photo)
        assert pixels.shape == (3, 32, 32)
        assert pixels[:, :, 0].max() < 0 < pixels[:, :, -1].min()


def test_prompt_settings(clip_folder):
    config = PromptConfig(num_prompts=1)
    model, *_ = amp.create_model_and_transforms(clip_folder, prompt_config=config)
    assert model.config is config and model.visual_prompts.prompts.shape == (1, 1, 32)


def test_meta_device_builds_shapes_only():
    model, *_ = amp.create_model_and_transforms("ViT-L-14-336-quickgelu", device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    sizes = (
        model.backbone.vision_width,
        model.backbone.text_width,
        model.backbone.num_patches,
        model.backbone.num_layers,
    )
    assert sizes == (1024, 768, 576, 24)
    assert model.backbone.quick_gelu
    assert model.image_features(torch.empty(2, 3, 336, 336, device="meta")).shape == (2, 768)
    assert model.tower.first == 16


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_casts_the_backbone_alone_and_keeps_its_hash(precision, clip_folder, images, knowledge):
    config = PromptConfig(**aim_settings())
    model, *_ = amp.create_model_and_transforms(clip_folder, precision=precision, prompt_config=config)
    full, *_ = amp.create_model_and_transforms(clip_folder)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert model.backbone.dtype == dtype and model.interaction.aim.mlp[0].weight.dtype == torch.float32
    assert model.base_hash == full.base_hash
    assert model.encode_image(images, knowledge).isfinite().all()


# -- adapters ---------------------------------------------------------------------------------------------------------


def test_adapter_brings_its_settings_and_weights(clip_folder, tmp_path, images, knowledge):
    config = PromptConfig(**aim_settings(block=1, num_prompts=2))
    trained, *_ = amp.create_model_and_transforms(clip_folder, prompt_config=config)
    for parameter in trained.interaction.parameters():
        parameter.data += 0.1
    save_adapter(tmp_path / "adapter.safetensors", trained)
    loaded, *_ = amp.create_model_and_transforms(clip_folder, adapter=tmp_path / "adapter.safetensors")
    assert loaded.config == config
    assert torch.equal(loaded.encode_image(images, knowledge), trained.encode_image(images, knowledge))


def test_adapter_of_another_base_model_is_refused(clip_folder, tmp_path):
    trained, *_ = amp.create_model_and_transforms(clip_folder)
    save_adapter(tmp_path / "adapter.safetensors", trained)
    other = write_clip_folder(tmp_path / "other", seed=1)
    with pytest.raises(AmpError, match=r"adapter\.safetensors: was trained on base model .*tiny-clip.*other"):
        amp.create_model_and_transforms(other, adapter=tmp_path / "adapter.safetensors")


def test_adapter_and_settings_exclude_each_other(clip_folder):
    with pytest.raises(AmpError, match="give either prompt_config or adapter"):
        amp.create_model_and_transforms(clip_folder, adapter="a.safetensors", prompt_config=PromptConfig())


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weights", "has", "use"),
    [
        ("ViT-B-32", "openai", False, "ViT-B-32-quickgelu"),
        ("ViT-B/32", "openai", False, "ViT-B-32-quickgelu"),
        ("ViT-L-14-336", "OpenAI", False, "ViT-L-14-336-quickgelu"),
        ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", True, "ViT-B-32"),
    ],
)
def test_quick_gelu_mismatch_is_refused(name, weights, has, use, no_download):
    expected = f"model '{name}' has quick_gelu={has}, .* '{weights}' .* quick_gelu={not has}, .* Use model '{use}'$"
    with pytest.raises(AmpError, match=expected):
        amp.create_model_and_transforms(name, weights)
    refuse_quick_gelu_mismatch(use, weights)


def test_forced_quick_gelu_counts(no_download):
    refuse_quick_gelu_mismatch("ViT-B-32", "openai", force_quick_gelu=True)
    with pytest.raises(AmpError, match="quick_gelu=True"):
        amp.create_model_and_transforms("ViT-B-32", "laion2b_s34b_b79k", force_quick_gelu=True)


def test_every_suggested_model_exists_and_is_accepted():
    refused = 0
    for name, weights in open_clip.list_pretrained():
        try:
            refuse_quick_gelu_mismatch(name, weights)
        except AmpError as error:
            use = str(error).split("'")[-2]
            if name.startswith("roberta"):  # its text tower isn't supported
                continue
            refused += 1
            refuse_quick_gelu_mismatch(use, weights)
            assert weights in open_clip.list_pretrained_tags_by_model(use)
    assert refused > 20


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"model_name": "ViT-B-31"}, r"model 'ViT-B-31' is unknown to open_clip.*ViT-B-32"),
        ({"model_name": "ViT-B-32", "pretrained": "nonsense"}, r"weights 'nonsense' of model 'ViT-B-32': no such tag"),
        ({"model_name": "local-dir:nowhere"}, r"no file nowhere/open_clip_config\.json"),
        ({"model_name": "ViT-B-32", "precision": "fp8"}, r"precision is 'fp8', expected one of fp32, bf16, fp16"),
    ],
)
def test_what_does_not_exist_is_refused(call, said, no_download):
    with pytest.raises(AmpError, match=said):
        amp.create_model_and_transforms(**call)


def test_a_folder_without_weights_is_refused(tmp_path):
    """open_clip only warns, and training would use random weights."""
    name = write_clip_folder(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(AmpError, match=r"no weights in .*open_clip_model\.safetensors"):
        amp.create_model_and_transforms(name)


@pytest.mark.parametrize("name", ["RN50", "convnext_base"])
def test_foreign_towers_are_refused(name):
    with pytest.raises(AmpError, match="expected open_clip's native VisionTransformer"):
        amp.create_model_and_transforms(name, device="meta", pretrained_image=False)


def test_weights_in_a_file_have_no_tag_to_compare(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(make_clip().state_dict(), path)
    refuse_quick_gelu_mismatch("ViT-B-32-quickgelu", str(path))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"genlip_cfg": {}}, r"the key genlip_cfg: it generates captions"),
        ({"genlap_cfg": {}}, r"the key genlap_cfg: its input is audio"),
        ({"audio_cfg": {}}, r"the key audio_cfg: its input is audio"),
        (
            {"vision_cfg": {"timm_model_name": "naflexvit_base_patch16_gap"}},
            r"vision_cfg.timm_model_name 'naflexvit_base_patch16_gap', expected timm's VisionTransformer or Eva",
        ),
        ({"text_cfg": {"text_arch": "modern"}}, r"text_cfg.text_arch 'modern', expected 'clip', or hf_model_name"),
        ({"text_cfg": {"from_the_future": 1}}, r"can't load it .*from_the_future.* newer open_clip"),
    ],
)
def test_architectures_of_open_clip_4_are_refused_by_their_key(clip_folder, tmp_path, keys, said):
    """A run and its plan refuse them before weights are read or downloaded, even if open_clip doesn't know the key."""
    shutil.copytree(clip_folder.removeprefix("local-dir:"), tmp_path / "clip")
    path = tmp_path / "clip/open_clip_config.json"
    content = json.loads(path.read_text())
    for key, value in keys.items():
        content["model_cfg"][key] = {**content["model_cfg"].get(key, {}), **value}
    path.write_text(json.dumps(content))
    name = f"local-dir:{tmp_path / 'clip'}"
    with pytest.raises(AmpError, match=said) as error:
        amp.create_model_and_transforms(name)
    assert str(path.parent) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(AmpError):
        shapes_only(TrainConfig(out="runs/x", model=ModelSettings(name, None)))
    if "Vision" in said or "hf_model" in said:  # baselines accept any tower
        refuse_unsupported_model(name, prompted=False)
    else:
        with pytest.raises(AmpError, match=said):
            load_clip(name)


def test_a_tokenizer_that_cannot_be_loaded_is_one_clear_error(clip_folder, tmp_path, monkeypatch):
    def fail(name):
        raise ImportError("Please install tiktoken")

    monkeypatch.setattr(open_clip, "get_tokenizer", fail)
    with pytest.raises(AmpError, match=r"can't load its tokenizer \(Please install tiktoken\)"):
        amp.create_model_and_transforms(clip_folder)


def test_damaged_weights_are_one_clear_error(clip_folder, tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder.removeprefix("local-dir:"), folder)
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(AmpError, match="can't load it"):
        amp.create_model_and_transforms(f"local-dir:{folder}")
