"""Adapter files: content, bit-exact round trip, and the error message for each kind of wrong file."""

import json
import os
import resource
import signal
from dataclasses import asdict, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.equations.image_features import image_feature, prompts_of
from support.models import aim_settings, make_model, shake, write_clip_folder

import amp
from amp.errors import AmpError
from amp.model.adapter import FORMAT, load_adapter, load_adapter_state, read_adapter, save_adapter
from amp.model.config import PromptConfig

CONFIG = PromptConfig(**aim_settings(block=1, options={"lam": 0.6}, num_prompts=2))
TRAINING = {"stage": 2, "step": 138, "config": {"margin": 0.2, "stages": [1, 2], "init": None}}


@pytest.fixture
def model(clip_folder):
    """A model with random trainable weights, as after training."""
    torch.manual_seed(5)
    model, *_ = amp.create_model_and_transforms(clip_folder, prompt_config=CONFIG)
    shake(model, scale=1.0)
    return model


@pytest.fixture
def path(model, tmp_path):
    """Adapter file of `model`."""
    path = tmp_path / "stage2" / "adapter.safetensors"
    save_adapter(path, model, TRAINING)
    return path


def rewritten(path, target, change):
    """Writes the file to `target` with its header changed by `change(record)`; returns `target`."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    record = json.loads(metadata["header"])
    change(record)
    save_file(load_file(path), target, metadata={**metadata, "header": json.dumps(record)})
    return target


# -- round trip -------------------------------------------------------------------------------------------------------


def test_round_trip_is_bit_exact(model, path, clip_folder, images, knowledge):
    fresh, *_ = amp.create_model_and_transforms(clip_folder, prompt_config=CONFIG)
    load_adapter(path, fresh)
    for (name, expected), found in zip(model.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(expected, found) and expected.dtype == found.dtype, name
    assert torch.equal(fresh.encode_image(images, knowledge), model.encode_image(images, knowledge))


def test_only_the_adapters_weights_are_stored(model, path):
    names = set(load_file(path))
    assert names == {name for name, _ in model.named_parameters() if not name.startswith("backbone.")}
    assert {name.partition(".")[0] for name in names} == {
        "logit_scale",
        "visual_prompts",
        "triplet_encoder",
        "interaction",
    }
    assert path.stat().st_size < 300_000  # the base model has 9 MB


def test_the_control_stores_its_two(clip_folder, tmp_path):
    model, *_ = amp.create_model_and_transforms(
        clip_folder, prompt_config=PromptConfig(**aim_settings(knowledge="none"))
    )
    save_adapter(tmp_path / "adapter.safetensors", model)
    assert set(load_file(tmp_path / "adapter.safetensors")) == {"logit_scale", "visual_prompts.prompts"}
    load_adapter(tmp_path / "adapter.safetensors", model)


def test_header_says_what_it_belongs_to(model, path, clip_folder):
    header, weights = read_adapter(path)
    assert (header.base_name, header.base_pretrained) == (clip_folder, None)
    assert header.base_hash == model.backbone.weights_hash() and header.quick_gelu is False
    assert header.prompt_config == CONFIG and header.training == TRAINING and header.version == amp.__version__
    assert weights.keys() == model.adapter_state().keys()
    assert load_adapter(path, model) == header


def test_header_records_quick_gelu(tmp_path):
    name = write_clip_folder(tmp_path / "quick", "quickgelu")
    model, *_ = amp.create_model_and_transforms(name)
    save_adapter(tmp_path / "adapter.safetensors", model)
    assert read_adapter(tmp_path / "adapter.safetensors")[0].quick_gelu is True


def test_an_engines_own_state_is_stored_instead(model, tmp_path):
    state = {name: value + 1 for name, value in model.adapter_state().items()}
    save_adapter(tmp_path / "adapter.safetensors", model, state=state)
    _, weights = read_adapter(tmp_path / "adapter.safetensors")
    assert all(torch.equal(weights[name], state[name]) for name in state)


# -- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_write_leaves_the_old_file_or_none(existing, model, path, tmp_path):
    folder = path.parent
    before = path.read_bytes()
    if not existing:
        path.unlink()

    real, limit = resource.getrlimit(resource.RLIMIT_FSIZE), 1000
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # or the process would be killed
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, real[1]))
        with pytest.raises(OSError, match="File too large"):
            save_adapter(path, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, real)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [p.name for p in folder.iterdir()] == ([path.name] if existing else [])
    assert not existing or path.read_bytes() == before


def test_a_finished_write_leaves_one_file(model, path):
    save_adapter(path, model, {"stage": 1})
    assert [p.name for p in path.parent.iterdir()] == ["adapter.safetensors"]
    assert read_adapter(path)[0].training == {"stage": 1}
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask  # permissions follow the umask


# -- wrong files ------------------------------------------------------------------------------------------------------


def test_missing_file(model, tmp_path):
    with pytest.raises(AmpError, match=r"nowhere/adapter\.safetensors: no such adapter file.*amp train"):
        load_adapter(tmp_path / "nowhere" / "adapter.safetensors", model)


def test_a_folder_instead_of_a_file(model, tmp_path):
    with pytest.raises(AmpError, match=f"{tmp_path.name}: can't be read .*expected a file"):
        load_adapter(tmp_path, model)


@pytest.mark.parametrize("keep", [0, 5, 200, -1], ids=["empty", "length", "header", "last-byte"])
def test_truncated_file(keep, model, path):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AmpError, match=r"adapter\.safetensors: not a complete safetensors file.*again"):
        load_adapter(path, model)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_foreign_safetensors_file(metadata, model, path):
    save_file({"weight": torch.zeros(2)}, path, metadata=metadata)
    seen = repr(metadata and metadata["format"])
    with pytest.raises(AmpError, match=f"metadata key 'format' is {seen}, expected '{FORMAT}'.*amp train"):
        load_adapter(path, model)


def test_other_base_model(path, tmp_path):
    other, *_ = amp.create_model_and_transforms(write_clip_folder(tmp_path / "b", seed=1), prompt_config=CONFIG)
    with pytest.raises(
        AmpError, match=r"adapter\.safetensors: was trained on base model 'local-dir:.*tiny-clip'"
    ) as error:
        load_adapter(path, other)
    assert other.base_hash[:12] in str(error.value) and other.base_name in str(error.value)


def test_other_activation_is_another_base_model(path, clip_folder, tmp_path):
    """The same weights with QuickGELU are another base model."""
    name = write_clip_folder(tmp_path / "quick", "quickgelu", seed=0)
    other, *_ = amp.create_model_and_transforms(name, prompt_config=CONFIG)
    with pytest.raises(AmpError, match="was trained on base model"):
        load_adapter(path, other)


def test_other_settings(path, clip_folder):
    config = replace(CONFIG, depth=2 / 3)
    other, *_ = amp.create_model_and_transforms(clip_folder, prompt_config=config)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(AmpError, match=r"depth is 0\.3\d+ in the file and 0\.6\d+ in the model\. Build"):
        load_adapter(path, other)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_setting_of_a_newer_version(model, path, tmp_path):
    file = rewritten(path, tmp_path / "new.safetensors", lambda record: record["prompt_config"].update(bends=3))
    with pytest.raises(AmpError, match=rf"new\.safetensors: prompt settings \['bends'\] .*{amp.__version__}"):
        load_adapter(file, model)


def test_header_key_of_a_newer_version(model, path, tmp_path):
    file = rewritten(path, tmp_path / "new.safetensors", lambda record: record.update(pruned=True))
    with pytest.raises(
        AmpError, match=r"new\.safetensors: header keys \['pruned'\] are unknown; the file was written by"
    ):
        load_adapter(file, model)


def test_a_setting_that_older_files_lack_takes_its_default(path, tmp_path):
    file = rewritten(path, tmp_path / "old.safetensors", lambda record: record["prompt_config"].pop("max_triplets"))
    assert read_adapter(file)[0].prompt_config == CONFIG


def test_senseless_setting(model, path, tmp_path):
    file = rewritten(path, tmp_path / "odd.safetensors", lambda record: record["prompt_config"].update(depth=7))
    with pytest.raises(AmpError, match=r"odd\.safetensors: prompt setting depth is 7"):
        load_adapter(file, model)


def weights_without(weights):
    return {name: value for name, value in weights.items() if name != "interaction.aim.gate"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (weights_without, "interaction.aim.gate"),
        (lambda weights: {**weights, "extra": torch.zeros(1)}, "extra"),
        (lambda weights: {**weights, "triplet_encoder.null": torch.zeros(3)}, "triplet_encoder.null"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_weights_that_do_not_fit(change, said, model, path, tmp_path):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(change(load_file(path)), tmp_path / "odd.safetensors", metadata=metadata)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AmpError, match=rf"odd\.safetensors: 1 weights are missing, .*\['{said}'\]"):
        load_adapter(tmp_path / "odd.safetensors", model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# -- files of version 1 -----------------------------------------------------------------------------------------------

# Prefixes of weight names in version 2 and version 1, written by hand.
OLD_NAMES = (
    ("interaction.readout.", "readout."),
    ("interaction.aim.", "interaction."),
    ("interaction.adapter.", "adapter."),
    ("interaction.state_projection.", "state_projection."),
    ("interaction.null_state", "null_state"),
)
ENRICHED = {"text_enrichment": True, "text_triplets": True, "image_projection": True}
TEXTS = ["a dog jumps", "a small girl", "nothing", "men chase horses"]


def old_name(name: str) -> str:
    return next((old + name.removeprefix(new) for new, old in OLD_NAMES if name.startswith(new)), name)


def write_version_1(path, model, settings, without=()):
    """Writes a model of version 2 like open-clip-amp 0.1.0, with these `settings` and without the weights `without`."""
    weights = {old_name(k): v.clone() for k, v in model.adapter_state().items() if not k.startswith(tuple(without))}
    if not settings.get("text_triplets") and "text_enrichment.states.weight" in weights:
        weights["text_enrichment.states.weight"] = weights["text_enrichment.states.weight"][:-1].clone()
    header = {
        "base_name": "tiny",
        "base_pretrained": None,
        "base_hash": model.backbone.weights_hash(),
        "quick_gelu": False,
        "prompt_config": settings,
        "training": TRAINING,
        "version": "0.1.0",
    }
    save_file(weights, path, metadata={"format": FORMAT, "header": json.dumps(header)})


def scores(model, images, knowledge) -> torch.Tensor:
    """Cosines of images and captions; each pair is conditioned on the caption's knowledge."""
    text = model.encode_text(model.tokenizer(TEXTS))
    found = model.encode_image(images, knowledge, True, text=text)
    return (found * model.encode_text(model.tokenizer(TEXTS), True, knowledge)).sum(dim=1)


def read_back(path, model):
    """Loads the file into a new model with the settings that the file records."""
    header, weights = read_adapter(path)
    fresh = make_model(**asdict(header.prompt_config))
    load_adapter_state(fresh, header, weights, where=path)
    return fresh, header


@pytest.mark.parametrize(
    ("new", "old"),
    [
        (
            {"depth": 1 / 3, "interaction_options": {"blocks": 1}, "num_prompts": 4},
            {"interaction": "readout", "interaction_layer": 1, "readout_blocks": 1, "slot_tokens": 5, **ENRICHED},
        ),
        (
            {"depth": 2 / 3, "interaction_options": {"blocks": 0}, "num_prompts": 4, "knowledge": "none"},
            {"interaction": "readout", "interaction_layer": 2, "knowledge": "none", **ENRICHED},
        ),
        (
            {"depth": 1 / 3, "interaction": "visual_prompts", "num_prompts": 3},
            {"condition_images": False, "interaction_layer": 1, "num_prompts": 3, **ENRICHED},
        ),
        (
            {"depth": 1 / 3, "interaction": "learned_query", "interaction_options": {"blocks": 1}, "num_prompts": 4},
            {
                "condition_images": False,
                "interaction": "readout",
                "readout_blocks": 1,
                "interaction_layer": 1,
                **ENRICHED,
            },
        ),
        (
            aim_settings(options={"lam": 0.6, "residual": False}),
            {"lam": 0.6, "residual": False, "bottleneck": 4, "triplet_layers": 2, "triplet_heads": 8},
        ),
        (aim_settings(block=1, interaction="cat"), {"interaction": "cat", "bottleneck": 4, "interaction_layer": 1}),
    ],
    ids=["readout", "its control", "text only", "text only, query", "aim", "cat"],
)
@torch.no_grad()
def test_version_1_comes_back_bit_for_bit(new, old, tmp_path, images, knowledge):
    model, path = make_model(trained=True, **new), tmp_path / "old.safetensors"
    write_version_1(path, model, old)
    fresh, header = read_back(path, model)
    assert header.prompt_config == replace(model.config, interaction_options=header.prompt_config.interaction_options)
    assert set(model.config.interaction_options) <= set(header.prompt_config.interaction_options)
    assert not header.partial and header.version == "0.1.0" and header.training == TRAINING
    for name, value in model.adapter_state().items():
        assert torch.equal(fresh.adapter_state()[name], value), name
    assert torch.equal(scores(fresh, images, knowledge), scores(model, images, knowledge))
    fresh.base_name, fresh.base_pretrained, fresh.base_hash = "tiny", None, header.base_hash
    save_adapter(tmp_path / "new.safetensors", fresh)
    assert read_adapter(tmp_path / "new.safetensors")[0].prompt_config == header.prompt_config


@torch.no_grad()
def test_version_1_with_some_of_the_maps_scores_as_before(tmp_path, images, knowledge):
    """Text enrichment with states only, T + U T + mean_k(W D_k), written out; images follow the paper's equations."""
    model, path = make_model(trained=True, **aim_settings(block=1, enrich=True)), tmp_path / "old.safetensors"
    settings = {"bottleneck": 4, "interaction_layer": 1, "text_enrichment": True}
    write_version_1(path, model, settings, without=("text_enrichment.triplets.", "image_projection."))
    fresh, header = read_back(path, model)
    assert header.partial and header.prompt_config.enrich
    batch, text = model.prepare_knowledge(knowledge), model.encode_text(model.tokenizer(TEXTS), True)
    stored = load_file(path)
    for row, score in enumerate(scores(fresh, images, knowledge)):
        enriched = text[row] + stored["text_enrichment.adapt.weight"] @ text[row]
        states = batch.states[row][batch.mask[row]]
        if len(states):
            unit = states / states.norm(dim=1, keepdim=True)
            enriched = enriched + (unit @ stored["text_enrichment.states.weight"].T).mean(dim=0)
        image = image_feature(model, images[row], prompts_of(model, batch, row))
        assert score.item() == pytest.approx(float(image @ enriched / image.norm() / enriched.norm()), abs=1e-5)
    model.base_name, model.base_hash = "tiny", header.base_hash
    with pytest.raises(AmpError, match=r"weights are missing"):  # in version 2 no weight may be missing
        load_adapter_state(make_model(**asdict(model.config)), replace(header, partial=False), stored, where=path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"slot_tokens": 7}, r"prompt setting slot_tokens is 7, expected 5: other values are no longer supported"),
        ({"triplet_layers": 1}, r"prompt setting triplet_layers is 1, expected 2"),
        ({"triplet_heads": 4}, r"prompt setting triplet_heads is 4, expected 8"),
        ({"bends": 1}, r"prompt settings \['bends'\] are unknown"),
    ],
)
def test_version_1_with_retired_values_is_refused_in_one_line(settings, said, tmp_path):
    path = tmp_path / "old.safetensors"
    write_version_1(path, make_model(**aim_settings()), {"bottleneck": 4, **settings})
    with pytest.raises(AmpError, match=rf"old\.safetensors: {said}") as error:
        read_adapter(path)
    assert "\n" not in str(error.value) and "0.1.0" in str(error.value)


def test_a_file_of_a_later_version_is_refused(path, tmp_path):
    with safe_open(path, "pt") as file:
        metadata = {**file.metadata(), "format_version": "3"}
    save_file(load_file(path), tmp_path / "later.safetensors", metadata=metadata)
    with pytest.raises(
        AmpError, match=r"later\.safetensors: metadata key 'format_version' is '3', .*Install that version"
    ):
        read_adapter(tmp_path / "later.safetensors")
