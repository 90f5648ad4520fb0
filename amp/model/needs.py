"""What a base model needs, judged by its configuration, before PyTorch and open_clip are imported."""

import json
from importlib.util import find_spec
from pathlib import Path

from safetensors import SafetensorError, safe_open


def needs_transformers(model: str | None, adapter: str | None) -> bool:
    """Whether a base model has a text tower or tokenizer of Hugging Face; True if that can't be determined.

    Args:
        model: Base model, as named by open_clip; None takes the one recorded in the adapter.
        adapter: Adapter file, or a folder that contains it.
    """
    try:
        text = _config(model or _base_of(Path(adapter or "")))["text_cfg"]
        return bool(text.keys() & {"hf_model_name", "hf_tokenizer_name"})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return True  # a model of the hub, or invalid input, which is refused when it is loaded


def _base_of(adapter: Path) -> str:
    with safe_open(adapter / "adapter.safetensors" if adapter.is_dir() else adapter, framework="np") as file:
        return json.loads(file.metadata()["header"])["base_name"]


def _config(model: str) -> dict:
    """The configuration of a model in a folder, or of one that open_clip knows by name."""
    if model.startswith("local-dir:"):
        folder = Path(model.removeprefix("local-dir:"))
        return json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]
    package = find_spec("open_clip")
    assert package is not None and package.origin is not None, "open_clip is a requirement of this package"
    known = Path(package.origin).parent / "model_configs"
    return json.loads((known / f"{model.replace('/', '-')}.json").read_text(encoding="utf-8"))
