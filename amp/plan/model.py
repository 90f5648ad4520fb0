"""Checks whether the base model and the `init` adapter are available and match the settings."""

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import open_clip
from huggingface_hub import try_to_load_from_cache
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

from amp.errors import AmpError
from amp.model.adapter import read_adapter
from amp.model.clip import ActionAwareCLIP
from amp.model.factory import refuse_quick_gelu_mismatch, refuse_unknown_model
from amp.plan.findings import Finding, note, ok, warning
from amp.train.config import TrainConfig


def check_model(config: TrainConfig, elsewhere: bool) -> Iterator[Finding]:
    """Checks that the base model is known, and unless `elsewhere`, that its weights are on this machine."""
    name, tag = config.model.name, config.model.pretrained
    refuse_quick_gelu_mismatch(name, tag)
    if name.startswith("hf-hub:"):
        yield ok(f"{name} is in the local cache, {local_model(name).removeprefix('local-dir:')}")
        return
    refuse_unknown_model(name, tag)
    if ":" in name:
        yield ok(f"{name} with its weights")
    elif tag is None:
        yield warning(f"{name} without weights is an untrained CLIP; give --model.pretrained")
    elif Path(tag).is_file() or (not elsewhere and weights_in_cache(name, tag)):
        yield ok(f"{name} with weights {tag!r}, on this machine")
    elif elsewhere:
        yield note(f"{name} with weights {tag!r}; a node downloads them at the first start if it doesn't have them")
    else:
        yield warning(
            f"{name}: weights {tag!r} are not on this machine; the first start downloads them. If the nodes have no "
            f"network, first run python -c \"import open_clip; open_clip.create_model('{name}', '{tag}')\""
        )


def local_model(name: str) -> str:
    """Returns the name of a local copy of a model.

    Raises:
        AmpError: The model is on the Hugging Face hub and not in the local cache.
    """
    if not name.startswith("hf-hub:"):
        return name
    repository = name.removeprefix("hf-hub:")
    found = try_to_load_from_cache(repository, "open_clip_config.json")
    if not isinstance(found, str):
        raise AmpError(
            f"model {name!r} is not on this machine, and a plan downloads nothing; run `hf download {repository}`"
        )
    return f"local-dir:{Path(found).parent}"


def weights_in_cache(name: str, tag: str) -> bool:
    """Returns whether open_clip would find the weights of a tag without a network."""
    known = open_clip.get_pretrained_cfg(name, tag)
    repository, file = os.path.split(known.get("hf_hub", ""))
    if repository:
        names = [file] if file else [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
        return any(isinstance(try_to_load_from_cache(repository, name), str) for name in names)
    return (Path("~/.cache/clip").expanduser() / os.path.basename(known.get("url", ""))).is_file()


def check_init(path: str, model: ActionAwareCLIP) -> Iterator[Finding]:
    """Checks that the `init` adapter matches the model's settings; training compares the base model's weights."""
    header, weights = read_adapter(path)
    theirs, ours = asdict(header.prompt_config), asdict(model.config)
    differing = [key for key in ours if theirs[key] != ours[key]]
    said = [f"{key} is {theirs[key]!r} in the file and {ours[key]!r} in this run" for key in differing]
    if header.quick_gelu != model.backbone.quick_gelu:
        said.append(f"its base model, {header.base_name}, has quick_gelu={header.quick_gelu}")
    expected = {name: value.shape for name, value in model.adapter_state().items()}
    if not said and expected != {name: value.shape for name, value in weights.items()}:
        said.append(f"its weights have different names or shapes; its base model is {header.base_name}")
    if said:
        raise AmpError(f"{path}: {'; '.join(said)}; use the file's settings in this run, or give another --init")
    yield ok(f"{path}: matches the prompt settings; the weights of {header.base_name} are compared at the start")
