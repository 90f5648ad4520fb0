"""Loading of a shared adapter from a folder, a file, or a repository of the Hugging Face Hub."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from amp.errors import AmpError
from amp.model.adapter import AdapterHeader, read_adapter
from amp.model.adapter_v1 import convert
from amp.model.factory import create_model_and_transforms

WEIGHTS, CONFIG = "adapter.safetensors", "config.json"
HUB = "hf-hub:"


def from_pretrained(
    source: str | os.PathLike,
    base: str | None = None,
    base_pretrained: str | None = None,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    **download,
):
    """Builds the base model and loads an adapter into it.

    Args:
        source: A folder written by `save_pretrained`, an `adapter.safetensors` file, or `hf-hub:ORG/REPO`, which needs
            network access. So does a base model whose weights are not on this machine.
        base, base_pretrained: Name and weights of the base model on this machine. None uses those named in the adapter.
        device, precision: See `create_model_and_transforms`.
        **download: Arguments of `huggingface_hub.hf_hub_download`: `revision`, `cache_dir`, `token`,
            `local_files_only`.

    Returns:
        `ActionAwareCLIP` in eval mode, the training transform and the validation transform, both with the resize mode
        that the adapter was trained with.

    Raises:
        AmpError: The folder or repository doesn't exist, `config.json` and the weights disagree, or the base model is
            another one.
    """
    file = adapter_file(source, **download)
    header, weights = read_adapter(file)
    config = file.with_name(CONFIG)
    if config.is_file():
        _check_config(config, header, weights)
    if base is None:
        base, base_pretrained = header.base_name, header.base_pretrained
    resize = header.training.get("config", {}).get("model", {}).get("resize_mode")
    model, *transforms = create_model_and_transforms(
        base, base_pretrained, precision, device, adapter=str(file), image_resize_mode=resize
    )
    return model.eval(), *transforms


def adapter_file(source: str | os.PathLike, **download) -> Path:
    """Path of the `adapter.safetensors` of a `source` of `from_pretrained`, downloaded if it is in a repository.

    Raises:
        AmpError: A repository can't be downloaded. A missing local file is only detected when it is read.
    """
    if not str(source).startswith(HUB):
        path = Path(source)
        return path / WEIGHTS if path.is_dir() else path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repository = str(source).removeprefix(HUB)
    try:
        hf_hub_download(repository, CONFIG, **download)
        return Path(hf_hub_download(repository, WEIGHTS, **download))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise AmpError(
            f"{source}: can't be downloaded ({reason}); check the name and the network, or give a folder"
        ) from error


def config_of(header: AdapterHeader) -> dict[str, Any]:
    """Content of `config.json`, taken from the header of the weights."""
    return {
        "library_name": "open-clip-amp",
        "version": header.version,
        "base_model": {
            "name": header.base_name,
            "pretrained": header.base_pretrained,
            "sha256": header.base_hash,
            "quick_gelu": header.quick_gelu,
        },
        "prompt": vars(header.prompt_config),
        "training": header.training,
    }


def _check_config(path: Path, header: AdapterHeader, weights: dict[str, torch.Tensor]) -> None:
    try:
        seen = json.loads(path.read_text(encoding="utf-8"))
        compared = {key: seen[key] for key in ("base_model", "prompt")}
        if "interaction_layer" in compared["prompt"]:  # written with an adapter file of version 1
            compared["prompt"] = vars(convert(compared["prompt"], weights)[0])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AmpError(f"{path}: not a config that save_pretrained wrote ({error!r}); write the folder again") from None
    expected = json.loads(json.dumps(config_of(header)))
    for key, value in compared.items():
        if value != expected[key]:
            raise AmpError(
                f"{path}: {key} differs from the one in {WEIGHTS}; one of the two files was changed. Download or "
                "save both again"
            )
