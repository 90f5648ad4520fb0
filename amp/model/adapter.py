"""Adapter files: the trained weights in safetensors format, with the identity of their base model."""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from amp.errors import AmpError, shorten
from amp.files import whole_file
from amp.json_text import parse_json
from amp.model.adapter_v1 import convert
from amp.model.clip import ActionAwareCLIP
from amp.model.config import PromptConfig
from amp.version import __version__

FORMAT, VERSION = "open-clip-amp adapter", 2  # version 1: `amp.model.adapter_v1`
_MAPS = ("text_enrichment.", "image_projection.", "triplet_encoder.")
_AGAIN = "Give an adapter.safetensors that amp train wrote"


@dataclass
class AdapterHeader:
    """The header of an adapter file.

    Attributes:
        base_name, base_pretrained: Name and weights with which the base model was created.
        base_hash: SHA-256 of the base model's weights (`Backbone.weights_hash`).
        quick_gelu: Whether the base model uses QuickGELU.
        prompt_config: Architecture of the prompts.
        training: Free-form record of the run: stage, step, resolved configuration.
        version: Version of open-clip-amp that wrote the file.
        partial: Whether maps of `PromptConfig.enrich` are missing because they are zero. Only in files converted from
            version 1.
    """

    base_name: str
    base_pretrained: str | None
    base_hash: str
    quick_gelu: bool
    prompt_config: PromptConfig
    training: dict[str, Any] = field(default_factory=dict)
    version: str = __version__
    partial: bool = False

    def check_base(self, model_name: str, base_hash: str, where: str | os.PathLike) -> None:
        """Raises `AmpError` if the given weights are not those that the adapter was trained on."""
        if base_hash != self.base_hash:
            raise AmpError(
                f"{where}: was trained on base model {self.base_name!r} (pretrained {self.base_pretrained!r}, "
                f"weights {self.base_hash[:12]}), but {model_name!r} has weights {base_hash[:12]}. "
                "Load it with its own base model"
            )


def save_adapter(
    path: str | os.PathLike,
    model: ActionAwareCLIP,
    training: dict[str, Any] | None = None,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes the adapter's weights and header.

    Args:
        path: File name that ends in `.safetensors`.
        model: A model from `create_model_and_transforms`.
        training: Record of the run, stored as JSON.
        state: Weights to store instead of the model's own, for engines that shard them.
    """
    header = AdapterHeader(
        model.base_name, model.base_pretrained, model.base_hash, model.backbone.quick_gelu, model.config, training or {}
    )
    write_adapter(path, header, state or model.adapter_state())


def write_adapter(path: str | os.PathLike, header: AdapterHeader, weights: dict[str, torch.Tensor]) -> None:
    """Writes header and weights to a temporary file, then renames it to `path`."""
    weights = {k: v.detach().to("cpu").contiguous() for k, v in weights.items()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:  # not `save_file`, whose files others in the user's group can't read
        metadata = {"format": FORMAT, "format_version": str(VERSION), "header": json.dumps(asdict(header))}
        file.write(save(weights, metadata=metadata))


def read_adapter(path: str | os.PathLike) -> tuple[AdapterHeader, dict[str, torch.Tensor]]:
    """Reads an adapter file.

    Raises:
        AmpError: The file doesn't exist, is damaged, or is a safetensors file of something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise AmpError(
                    f"{path}: metadata key 'format' is {metadata.get('format')!r}, expected {FORMAT!r}. Give an "
                    "adapter.safetensors that amp train wrote"
                )
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except FileNotFoundError as error:
        raise AmpError(
            f"{path}: no such adapter file. amp train writes it to OUT/stage2/adapter.safetensors"
        ) from error
    except SafetensorError as error:
        raise AmpError(f"{path}: not a complete safetensors file ({error}). Copy or train it again") from error
    except OSError as error:
        raise AmpError(f"{path}: can't be read ({error}), expected a file") from error
    record = _header(path, metadata)
    known = {f.name for f in fields(AdapterHeader)}
    version = metadata.get("format_version", "1")
    try:
        if version not in ("1", str(VERSION)):
            raise AmpError(f"metadata key 'format_version' is {version!r}, expected '1' or '{VERSION}'")
        if unknown := sorted(set(record) - known):
            raise AmpError(f"header keys {unknown} are unknown")
        settings = record["prompt_config"]
        if version == "1":
            record["prompt_config"], weights, record["partial"] = convert(settings, weights)
        elif unknown := sorted(set(settings) - {f.name for f in fields(PromptConfig)}):
            raise AmpError(f"prompt settings {unknown} are unknown")
        else:
            record["prompt_config"] = PromptConfig(**settings)
        return AdapterHeader(**record), weights
    except AmpError as error:
        raise AmpError(
            f"{path}: {error}; the file was written by open-clip-amp {record['version']}, this is {__version__}. "
            "Install that version or a newer one"
        ) from None
    except (TypeError, KeyError) as error:  # a key is missing, or a value to compare with a number is not one
        raise AmpError(f"{path}: {error}; expected the header of an adapter. {_AGAIN}") from None


def _header(path: str | os.PathLike, metadata: dict[str, str]) -> dict[str, Any]:
    """Parses the header and checks its required keys and their types, but not yet unknown keys."""
    try:
        record = parse_json(metadata["header"])
    except (KeyError, ValueError) as error:
        raise AmpError(f"{path}: metadata key 'header' is missing or not JSON ({error!r}). {_AGAIN}") from None
    if not isinstance(record, dict):
        raise AmpError(f"{path}: the header is {shorten(record)}, expected a JSON object. {_AGAIN}")
    types = {
        "base_name": str,
        "base_hash": str,
        "version": str,
        "quick_gelu": bool,
        "prompt_config": dict,
        "training": dict,
        "base_pretrained": str | None,
    }
    for key, kind in types.items():
        if key not in record:
            raise AmpError(f"{path}: header key {key!r} is missing; keys seen: {shorten(sorted(record))}. {_AGAIN}")
        if not isinstance(record[key], kind):
            raise AmpError(f"{path}: header key {key!r} is {shorten(record[key])}, expected {kind}. {_AGAIN}")
    return record


def load_adapter(path: str | os.PathLike, model: ActionAwareCLIP) -> AdapterHeader:
    """Loads an adapter file into a model with the same base model and prompt settings.

    Raises:
        AmpError: The base model or the settings differ, or the weights don't fit.
    """
    header, weights = read_adapter(path)
    header.check_base(model.base_name, model.base_hash, where=path)
    theirs, ours = asdict(header.prompt_config), asdict(model.config)
    differing = {k: (theirs[k], ours[k]) for k in ours if theirs[k] != ours[k]}
    if differing:
        said = ", ".join(f"{k} is {a!r} in the file and {b!r} in the model" for k, (a, b) in differing.items())
        raise AmpError(f"{path}: prompt settings differ: {said}. Build the model with the file's settings")
    load_adapter_state(model, header, weights, where=path)
    return header


def load_adapter_state(
    model: ActionAwareCLIP, header: AdapterHeader, weights: dict[str, torch.Tensor], where: str | os.PathLike
) -> None:
    """Copies adapter weights into a model. Every name and shape must match.

    Raises:
        AmpError: The weights don't fit.
    """
    expected = model.adapter_state()
    wrong = sorted(expected.keys() ^ weights.keys())
    if header.partial:
        wrong = [name for name in wrong if name in weights or not name.startswith(_MAPS)]
    wrong += [k for k in expected.keys() & weights.keys() if expected[k].shape != weights[k].shape]
    if wrong:
        raise AmpError(f"{where}: {len(wrong)} weights are missing, unknown or of another shape, first {wrong[:3]}")
    model.load_state_dict(weights, strict=False)
