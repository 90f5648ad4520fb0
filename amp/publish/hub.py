"""Writes an adapter as a folder for `amp.from_pretrained`, and uploads the folder to the Hugging Face hub.

The folder contains `adapter.safetensors` (only the trained weights), `config.json` (settings, name and hash of the base
model), `README.md` (the model card) and two files that sentence-transformers reads. It does not contain the base model.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from amp.errors import AmpError
from amp.evaluate.results import ResultFile
from amp.files import check_writable, write_atomically
from amp.model.adapter import read_adapter, write_adapter
from amp.model.pretrained import CONFIG, WEIGHTS, adapter_file, config_of
from amp.publish.model_card import model_card

CARD = "README.md"
# Files with which sentence-transformers opens the folder as a CrossEncoder. Its default activation would be a sigmoid.
CROSS_ENCODER: dict[str, Any] = {
    "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "amp.publish.cross_encoder.RerankerModule"}],
    "config_sentence_transformers.json": {
        "model_type": "CrossEncoder",
        "activation_fn": "torch.nn.modules.linear.Identity",
    },
}
# Keys of a training record that contain local paths. Only the last part of each path is published.
PATHS = (("out",), ("init",), ("deepspeed",), ("data", "shards"), ("data", "shard_cache"), ("data", "cache"))


def save_pretrained(
    folder: str | os.PathLike,
    adapter: str | os.PathLike,
    results: str | os.PathLike | None = None,
    base: str | None = None,
    base_pretrained: str | None = None,
) -> Path:
    """Writes the folder of an adapter.

    Args:
        folder: Folder to write, created if missing. Its five files are replaced if they exist; other files are kept.
        adapter: `adapter.safetensors` of a run, or a folder written by this function.
        results: JSON file of an evaluation of this adapter, whose table is added to the model card; None adds none.
        base, base_pretrained: Published name and weights of the base model, such as `ViT-B-16-quickgelu` and `openai`;
            None keeps those used in training. `from_pretrained` always verifies the hash of the weights.

    Returns:
        The folder.

    Raises:
        AmpError: The adapter or the results can't be read, they don't belong together, or the folder can't be written.
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
    check_writable(*(folder / name for name in (WEIGHTS, CONFIG, CARD, *CROSS_ENCODER)))
    write_adapter(folder / WEIGHTS, header, weights)
    parameters = sum(tensor.numel() for tensor in weights.values())
    for name, content in {CONFIG: config_of(header), **CROSS_ENCODER}.items():
        write_atomically(folder / name, (json.dumps(content, indent=1) + "\n").encode())
    write_atomically(folder / CARD, model_card(header, parameters, table).encode())
    return folder


def push_to_hub(folder: str | os.PathLike, repository: str, private: bool = False, token: str | None = None) -> str:
    """Uploads a folder written by `save_pretrained` and returns the URL of the commit.

    Args:
        folder: Folder written by `save_pretrained`. Only the files that it wrote are uploaded.
        repository: Repository `ORG/REPO`, created if missing.
        private: Whether a newly created repository is private.
        token: Access token; None uses the token of `hf auth login` or HF_TOKEN.

    Raises:
        AmpError: A file is missing, the base model is a local folder, or the hub rejects the upload.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    folder = Path(folder)
    missing = [name for name in (WEIGHTS, CONFIG, CARD) if not (folder / name).is_file()]
    if missing:
        raise AmpError(f"{folder}: no {', '.join(missing)}, expected a folder written by amp publish")
    header, _ = read_adapter(folder / WEIGHTS)
    if header.base_name.startswith("local-dir:"):
        raise AmpError(
            f"{folder}: the base model is {header.base_name!r}, a local folder, expected a model that others can load; "
            "publish the adapter again with --base hf-hub:ORG/REPO"
        )
    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        files = [WEIGHTS, CONFIG, CARD, *CROSS_ENCODER]
        return str(api.upload_folder(folder_path=folder, repo_id=repository, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise AmpError(f"{repository}: the hub rejected the upload ({reason}); log in with `hf auth login`") from error


def _without_paths(training: dict[str, Any]) -> dict[str, Any]:
    """Returns a training record with only the last part of each path in `PATHS`."""
    training = json.loads(json.dumps(training))
    for *outer, key in PATHS:
        place = training.get("config", {})
        for name in outer:
            place = place.get(name, {})
        if isinstance(place.get(key), str):
            place[key] = Path(place[key]).name
        elif isinstance(place.get(key), list):
            place[key] = [Path(path).name for path in place[key]]
    return training
