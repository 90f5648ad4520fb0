"""Sharing a trained adapter: a folder, or a repository of the Hugging Face hub, that `from_pretrained` loads.

The folder holds ``adapter.safetensors`` (the trained weights alone), ``config.json`` (settings, and the base model by
name and hash) and ``README.md`` (the model card). The base model itself is not in it.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from amp.errors import AmpError
from amp.evaluate.results import ResultFile
from amp.files import check_writable, write_atomically
from amp.model.adapter import AdapterHeader, read_adapter, write_adapter
from amp.model.factory import create_model_and_transforms
from amp.publish.model_card import model_card

WEIGHTS, CONFIG, CARD = "adapter.safetensors", "config.json", "README.md"
HUB = "hf-hub:"
# Of a training record: places on the machine that trained, which are nobody else's business.
PATHS = (("out",), ("init",), ("deepspeed",), ("data", "shards"), ("data", "cache"))


def save_pretrained(
    folder: str | os.PathLike,
    adapter: str | os.PathLike,
    results: str | os.PathLike | None = None,
    base: str | None = None,
    base_pretrained: str | None = None,
) -> Path:
    """Writes the folder of an adapter.

    Args:
        folder: Made if it isn't there; its three files are replaced, others stay.
        adapter: ``adapter.safetensors`` of a run, or another such folder.
        results: JSON file of an evaluation, whose table the card shows.
        base, base_pretrained: How others name the base model, such as ``ViT-B-16-quickgelu`` and ``openai``; None
            keeps the names that it was trained with. `from_pretrained` compares the weights' hash anyway.

    Returns:
        The folder.

    Raises:
        AmpError: No adapter or results file, or a folder that can't be written to.
    """
    adapter = adapter_file(adapter)
    header, weights = read_adapter(adapter)
    table = None if results is None else ResultFile.load_json(results)
    if table is not None and results is not None:
        table.check_adapter(adapter, where=results)
    if base is not None:
        header = replace(header, base_name=base, base_pretrained=base_pretrained)
    header = replace(header, training=_without_paths(header.training))
    folder = Path(folder)
    check_writable(folder / WEIGHTS, folder / CONFIG, folder / CARD)
    write_adapter(folder / WEIGHTS, header, weights)
    parameters = sum(tensor.numel() for tensor in weights.values())
    write_atomically(folder / CONFIG, (json.dumps(_config(header), indent=1) + "\n").encode())
    write_atomically(folder / CARD, model_card(header, parameters, table).encode())
    return folder


def from_pretrained(
    source: str | os.PathLike,
    base: str | None = None,
    base_pretrained: str | None = None,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    **download,
):
    """Builds the base model and puts an adapter around it.

    Args:
        source: A folder of `save_pretrained`, an ``adapter.safetensors``, or ``hf-hub:ORG/REPO``, which asks the
            network, as does a base model whose weights are not on this machine.
        base, base_pretrained: Where the base model lies now; None takes the names in the adapter.
        device, precision: As of `create_model_and_transforms`.
        **download: Of `huggingface_hub.hf_hub_download`: ``revision``, ``cache_dir``, ``token``,
            ``local_files_only``.

    Returns:
        `ActionAwareCLIP` in eval mode, the training transform and the validation transform that it was trained with.

    Raises:
        AmpError: No such folder or repository, ``config.json`` and weights that disagree, or another base model.
    """
    file = adapter_file(source, **download)
    header, _ = read_adapter(file)
    config = file.with_name(CONFIG)
    if config.is_file():
        _check_config(config, header)
    if base is None:
        base, base_pretrained = header.base_name, header.base_pretrained
    resize = header.training.get("config", {}).get("model", {}).get("resize_mode")
    model, *transforms = create_model_and_transforms(
        base, base_pretrained, precision, device, adapter=str(file), image_resize_mode=resize
    )
    return model.eval(), *transforms


def push_to_hub(folder: str | os.PathLike, repository: str, private: bool = False, token: str | None = None) -> str:
    """Uploads a folder of `save_pretrained`; returns the address of the commit.

    Args:
        folder: What is uploaded: its three files, nothing else that lies there.
        repository: ``ORG/REPO``, made if it isn't there.
        private: Of a repository that is made.
        token: None takes the one of ``hf auth login`` or HF_TOKEN.

    Raises:
        AmpError: A file is missing, the base model is a folder of this machine, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    folder = Path(folder)
    missing = [name for name in (WEIGHTS, CONFIG, CARD) if not (folder / name).is_file()]
    if missing:
        raise AmpError(f"{folder}: no {', '.join(missing)}, expected a folder that save_pretrained wrote")
    header, _ = read_adapter(folder / WEIGHTS)
    if header.base_name.startswith("local-dir:"):
        raise AmpError(
            f"{folder}: the base model is {header.base_name!r}, a folder that nobody else has; save it with one that "
            "others can load: --base hf-hub:ORG/REPO"
        )
    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repository, allow_patterns=[WEIGHTS, CONFIG, CARD]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise AmpError(f"{repository}: the hub refuses ({reason}); log in with `hf auth login`") from error


def adapter_file(source: str | os.PathLike, **download) -> Path:
    """The ``adapter.safetensors`` that `from_pretrained`'s `source` names; a repository's is downloaded.

    Raises:
        AmpError: A repository can't be downloaded; whether a local file is there is seen where it is read.
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


def _config(header: AdapterHeader) -> dict[str, Any]:
    """``config.json``; `format` of the weights' header stands in their own metadata."""
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


def _check_config(path: Path, header: AdapterHeader) -> None:
    try:
        seen = json.loads(path.read_text(encoding="utf-8"))
        compared = {key: seen[key] for key in ("base_model", "prompt")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AmpError(f"{path}: not a config of save_pretrained ({error!r}); write the folder again") from None
    expected = json.loads(json.dumps(_config(header)))
    for key, value in compared.items():
        if value != expected[key]:
            raise AmpError(
                f"{path}: {key} is not what {WEIGHTS} was saved with; one of the two was changed. Download or save "
                "both again"
            )


def _without_paths(training: dict[str, Any]) -> dict[str, Any]:
    """The record of a run without the folders of its machine: their last part says what they were."""
    training = json.loads(json.dumps(training))
    for *outer, key in PATHS:
        place = training.get("config", {})
        for name in outer:
            place = place.get(name, {})
        if isinstance(place.get(key), str):
            place[key] = Path(place[key]).name
    return training
