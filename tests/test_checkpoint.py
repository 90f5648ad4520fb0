"""Adapter files: what is in them, that they come back bit for bit, and every wrong file's own message."""

import json
import os
import resource
import signal

import pytest
import torch
from conftest import write_clip_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import amp
from amp.errors import AmpError
from amp.model.adapter import FORMAT, load_adapter, read_adapter, save_adapter
from amp.model.config import PromptConfig

CONFIG = PromptConfig(interaction_layer=1, num_prompts=2, lam=0.6)
TRAINING = {"stage": 2, "step": 138, "config": {"margin": 0.2, "stages": [1, 2], "init": None}}


@pytest.fixture
def model(clip_folder):
    """A model with random weights of its own, as after training."""
    torch.manual_seed(5)
    model, *_ = amp.create_model_and_transforms(clip_folder, prompt_config=CONFIG)
    for name, parameter in model.named_parameters():
        if not name.startswith("backbone."):
            parameter.data += torch.randn_like(parameter)
    return model


@pytest.fixture
def path(model, tmp_path):
    """Its adapter file."""
    path = tmp_path / "stage2" / "adapter.safetensors"
    save_adapter(path, model, TRAINING)
    return path


def rewritten(path, target, change):
    """The file with its header changed by `change(record)`; returns `target`."""
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
        "null_state",
        "state_projection",
        "adapter",
        "interaction",
    }
    assert path.stat().st_size < 300_000  # the base model has 9 MB


def test_the_control_stores_its_two(clip_folder, tmp_path):
    model, *_ = amp.create_model_and_transforms(clip_folder, prompt_config=PromptConfig(knowledge="none"))
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
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask  # readable by whom the user lets read


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
    with pytest.raises(AmpError, match=r"adapter\.safetensors: not a whole safetensors file.*again"):
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
    """The same weights with QuickGELU."""
    name = write_clip_folder(tmp_path / "quick", "quickgelu", seed=0)
    other, *_ = amp.create_model_and_transforms(name, prompt_config=CONFIG)
    with pytest.raises(AmpError, match="was trained on base model"):
        load_adapter(path, other)


def test_other_settings(path, clip_folder):
    config = PromptConfig(interaction_layer=2, num_prompts=2, lam=0.6)
    other, *_ = amp.create_model_and_transforms(clip_folder, prompt_config=config)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(AmpError, match=r"interaction_layer is 1 in the file and 2 in the model\. Build"):
        load_adapter(path, other)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_setting_of_a_newer_version(model, path, tmp_path):
    file = rewritten(path, tmp_path / "new.safetensors", lambda record: record["prompt_config"].update(depth=3))
    with pytest.raises(AmpError, match=rf"new\.safetensors: prompt settings \['depth'\] .*{amp.__version__}"):
        load_adapter(file, model)


def test_header_key_of_a_newer_version(model, path, tmp_path):
    file = rewritten(path, tmp_path / "new.safetensors", lambda record: record.update(pruned=True))
    with pytest.raises(AmpError, match=r"new\.safetensors: header keys \['pruned'\] are unknown"):
        load_adapter(file, model)


def test_a_setting_that_older_files_lack_takes_its_default(path, tmp_path):
    file = rewritten(path, tmp_path / "old.safetensors", lambda record: record["prompt_config"].pop("bottleneck"))
    assert read_adapter(file)[0].prompt_config == CONFIG


def test_senseless_setting(model, path, tmp_path):
    file = rewritten(path, tmp_path / "odd.safetensors", lambda record: record["prompt_config"].update(lam=7))
    with pytest.raises(AmpError, match="prompt setting lam is 7"):
        load_adapter(file, model)


def weights_without(weights):
    return {name: value for name, value in weights.items() if name != "interaction.gate"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (weights_without, "interaction.gate"),
        (lambda weights: {**weights, "extra": torch.zeros(1)}, "extra"),
        (lambda weights: {**weights, "null_state": torch.zeros(3)}, "null_state"),
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
