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
    """Whether the base model is known and its weights are on this machine, unless the run is planned for another."""
    name, tag = config.model.name, config.model.pretrained
    refuse_quick_gelu_mismatch(name, tag)
    if name.startswith("hf-hub:"):
        yield ok(f"{name} is in the local cache, {local_model(name).removeprefix('local-dir:')}")
        return
    refuse_unknown_model(name, tag)
    if ":" in name:
        yield ok(f"{name} with its weights")
    elif tag is None:
        yield warning(f"{name} without weights: a CLIP that knows nothing; give --model.pretrained")
    elif Path(tag).is_file() or (not elsewhere and weights_in_cache(name, tag)):
        yield ok(f"{name} with weights {tag!r}, on this machine")
    elif elsewhere:
        yield note(f"{name} with weights {tag!r}, which the first start on a node downloads unless they are there")
    else:
        yield warning(
            f"{name}: weights {tag!r} are not on this machine, the first start downloads them; where nodes have no "
            f"network run python -c \"import open_clip; open_clip.create_model('{name}', '{tag}')\" before"
        )


def local_model(name: str) -> str:
    """The name of a local copy of a model, which needs no network.

    Raises:
        AmpError: A model of the Hugging Face hub that is not in the local cache.
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
    """Whether open_clip would find the weights of a tag without a network."""
    known = open_clip.get_pretrained_cfg(name, tag)
    repository, file = os.path.split(known.get("hf_hub", ""))
    if repository:
        names = [file] if file else [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
        return any(isinstance(try_to_load_from_cache(repository, name), str) for name in names)
    return (Path("~/.cache/clip").expanduser() / os.path.basename(known.get("url", ""))).is_file()


def check_init(path: str, model: ActionAwareCLIP) -> Iterator[Finding]:
    """Whether the `init` adapter matches the model's settings; the base model's weights are compared at the start."""
    header, weights = read_adapter(path)
    theirs, ours = asdict(header.prompt_config), asdict(model.config)
    said = [f"{key} is {theirs[key]!r} there and {ours[key]!r} here" for key in ours if theirs[key] != ours[key]]
    if header.quick_gelu != model.backbone.quick_gelu:
        said.append(f"its base model, {header.base_name}, has quick_gelu={header.quick_gelu}")
    expected = {name: value.shape for name, value in model.adapter_state().items()}
    if not said and expected != {name: value.shape for name, value in weights.items()}:
        said.append(f"weights have other names or shapes: its base model is {header.base_name}")
    if said:
        raise AmpError(f"{path}: {'; '.join(said)}; build the run with the file's settings, or give another --init")
    yield ok(f"{path}: fits the prompt settings; trained on {header.base_name}, weights are compared at the start")
