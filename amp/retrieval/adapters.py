"""Adapters as the command line names them, around a base model that is already in memory."""

from pathlib import Path

from amp.checkpoint import load_adapter_state, read_adapter
from amp.errors import AmpError
from amp.hub import adapter_file
from amp.model import ActionAwareCLIP


def named_adapter(text: str) -> tuple[str, str]:
    """Splits ``NAME=FILE``; a bare file is named after its run's folder. A folder stands for the adapter in it."""
    name, equals, path = text.partition("=")
    if not equals:
        name, path = Path(text).resolve().parent.parent.name, text
    path = str(adapter_file(path))
    if not Path(path).is_file():
        raise AmpError(f"adapter {text!r}: no file {path}, expected NAME=FILE with an adapter.safetensors of amp train")
    return name, path


def adapted(base: ActionAwareCLIP, model_name: str, path: str) -> ActionAwareCLIP:
    """A model with an adapter's weights around the base model that is already in memory."""
    header, weights = read_adapter(path)
    header.check_base(model_name, base.base_hash, where=path)
    model = ActionAwareCLIP(base.backbone.clip, header.prompt_config, base.tokenizer)
    load_adapter_state(model, weights, where=path)
    return model.to(base.logit_scale.device)
