"""Adapters as the command line names them, around a base model that is already in memory."""

from collections.abc import Sequence
from pathlib import Path

import torch

from amp.errors import AmpError, Problems
from amp.model.adapter import load_adapter_state, read_adapter
from amp.model.clip import ActionAwareCLIP
from amp.model.pretrained import adapter_file


def named_adapter(text: str) -> tuple[str, str]:
    """Splits ``NAME=FILE``; a bare file is named after its run's folder. A folder stands for the adapter in it."""
    name, equals, path = text.partition("=")
    if not equals:
        name, path = Path(text).resolve().parent.parent.name, text
    path = str(adapter_file(path))
    if not Path(path).is_file():
        raise AmpError(f"adapter {text!r}: no file {path}, expected NAME=FILE with an adapter.safetensors of amp train")
    return name, path


def named_adapters(texts: Sequence[str]) -> dict[str, str]:
    """Files of several adapters by name, in order.

    Raises:
        AmpError: Naming every file that is missing and every name that can't be a row of a table.
    """
    problems = Problems()
    found: dict[str, str] = {}
    for text in texts:
        with problems.collect():
            name, path = named_adapter(text)
            if name in found:
                raise AmpError(
                    f"adapters has two named {name!r} ({found[name]} and {path}), expected different names; "
                    "give them as NAME=FILE"
                )
            if name.strip() in ("", "base CLIP") or "\t" in name:
                raise AmpError(
                    f"adapter {text!r}: the name is {name!r}, expected a text without tabs, other than "
                    "'base CLIP'; give it as NAME=FILE"
                )
            found[name] = path
    problems.check()
    return found


def load_adapters(base: ActionAwareCLIP, model_name: str, named: dict[str, str]) -> dict[str, ActionAwareCLIP]:
    """Models of several adapters by name, in eval mode around one base model.

    Raises:
        AmpError: Naming every adapter that can't be used with this base model.
    """
    problems, models = Problems(), {}
    for name, path in named.items():
        with problems.collect():
            models[name] = adapted(base, model_name, path).eval()
    problems.check()
    return models


def adapted(base: ActionAwareCLIP, model_name: str, path: str) -> ActionAwareCLIP:
    """A model with an adapter's weights around the base model that is already in memory."""
    header, weights = read_adapter(path)
    header.check_base(model_name, base.base_hash, where=path)
    model = ActionAwareCLIP(base.backbone.clip, header.prompt_config, base.tokenizer)
    load_adapter_state(model, header, weights, where=path)
    bad = [key for key, value in weights.items() if not torch.isfinite(value).all()]
    if bad:
        raise AmpError(
            f"{path}: {len(bad)} weights hold NaN or infinite numbers, first {bad[0]!r}, expected finite "
            "ones; give another checkpoint of the run, or train it again"
        )
    return model.to(base.logit_scale.device)
