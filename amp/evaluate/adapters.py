"""Adapters as the command line names them, and what their records say of base model, transform and data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch

from amp.errors import AmpError, Problems, shorten
from amp.evaluate.settings import BaseSettings, EvaluationSettings, Kind
from amp.model.adapter import AdapterHeader, load_adapter_state, read_adapter
from amp.model.clip import ActionAwareCLIP
from amp.model.factory import create_model_and_transforms
from amp.model.pretrained import adapter_file
from amp.retrieval.figures import BASE

Value = TypeVar("Value")


@dataclass(frozen=True)
class Adapter:
    """An adapter file.

    Attributes:
        path: The file.
        header: What it says of itself.
        weights: Its weights by name.
    """

    path: str
    header: AdapterHeader
    weights: dict[str, torch.Tensor]

    def recorded(self, *keys: str) -> Any:
        """A key of the configuration that it was trained with; None where the record lacks it."""
        value = self.header.training.get("config")
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def named_adapter(text: str) -> tuple[str, str]:
    """Splits ``NAME=FILE``; a bare file is named after its run's folder. A folder stands for the adapter in it."""
    name, equals, path = text.partition("=")
    if not equals:
        name, path = Path(text).resolve().parent.parent.name, text
    path = str(adapter_file(path))
    if not Path(path).is_file():
        raise AmpError(f"adapter {text!r}: no file {path}, expected NAME=FILE with an adapter.safetensors of amp train")
    return name, path


def read_adapters(texts: Sequence[str]) -> dict[str, Adapter]:
    """Several adapters by name, in order.

    Args:
        texts: ``NAME=FILE`` each.

    Raises:
        AmpError: Naming every file that is missing or can't be read and every name that can't be a row of a table.
    """
    problems = Problems()
    found: dict[str, str] = {}
    adapters: dict[str, Adapter] = {}
    for text in texts:
        with problems.collect():
            name, path = named_adapter(text)
            if name in found:
                raise AmpError(
                    f"adapters has two named {name!r} ({found[name]} and {path}), expected different names; "
                    "give them as NAME=FILE"
                )
            if name.strip() in ("", BASE.method) or "\t" in name:
                raise AmpError(
                    f"adapter {text!r}: the name is {name!r}, expected a text without tabs, other than "
                    f"'{BASE.method}'; give it as NAME=FILE"
                )
            found[name] = path
            adapters[name] = Adapter(path, *read_adapter(path))
    problems.check()
    return adapters


def base_of(given: BaseSettings, adapters: dict[str, Adapter]) -> BaseSettings:
    """The base model as given, and where that is null as the adapters' records say.

    Raises:
        AmpError: Neither says which model, or the adapters were trained on different models or transforms.
    """
    agreed(
        adapters,
        "base models",
        None,
        lambda a: f"{a.header.base_name}, weights {a.header.base_hash[:12]}",
        lambda a: a.header.base_hash,
    )
    resize = given.resize_mode or agreed(
        adapters, "image transforms", "model.resize_mode", lambda a: a.recorded("model", "resize_mode")
    )
    if given.name is not None:
        return replace(given, resize_mode=resize)
    if not adapters:
        raise AmpError(
            "adapters and model.name are both missing, expected one of them; add --adapters NAME=FILE, or "
            "--model.name NAME --model.pretrained TAG for the base model only"
        )
    header = next(iter(adapters.values())).header
    return BaseSettings(header.base_name, header.base_pretrained, given.precision, resize)


def load_base(base: BaseSettings, device: torch.device):
    """The model of `base_of` as `create_model_and_transforms` returns it, without an adapter."""
    assert base.name is not None
    return create_model_and_transforms(
        base.name, base.pretrained, base.precision, device, image_resize_mode=base.resize_mode
    )


def agreed(
    adapters: dict[str, Adapter],
    what: str,
    option: str | None,
    value: Callable[[Adapter], Value],
    compared: Callable[[Adapter], Any] | None = None,
) -> Value | None:
    """What all adapters' records say; None without adapters.

    Raises:
        AmpError: They differ.
    """
    said = {name: (value(adapter), (compared or value)(adapter)) for name, adapter in adapters.items()}
    if not said:
        return None
    first, *others = said
    for name in others:
        if said[name][1] != said[first][1]:
            raise AmpError(
                f"adapters were trained on different {what}: {first!r} ({adapters[first].path}) with {said[first][0]}, "
                f"{name!r} ({adapters[name].path}) with {said[name][0]}, expected the same; evaluate them separately"
                + (f", or set one for all with --{option}" if option else "")
            )
    return said[first][0]


def kinds_of(given: Sequence[Kind] | None, adapters: dict[str, Adapter]) -> list[Kind]:
    """Kinds of triplets: as given, or as the adapters' records say, or all.

    Raises:
        AmpError: The records differ, or hold something else.
    """
    if given is not None:
        return list(given)
    every = get_args(Kind)
    kinds = agreed(adapters, "kinds of triplets", "kinds", lambda a: a.recorded("data", "kinds")) or list(every)
    if not isinstance(kinds, list) or any(kind not in every for kind in kinds):
        raise AmpError(
            f"{next(iter(adapters.values())).path}: the record's data.kinds is {shorten(kinds)}, expected some of "
            f"{', '.join(every)}; give --kinds"
        )
    return kinds


def shards_of(given: str | None, adapters: dict[str, Adapter]) -> str:
    """The folder of shards: as given, or as the adapters' records say.

    Raises:
        AmpError: Neither is there, or the records differ.
    """
    found = given or agreed(adapters, "shards", "shards", lambda a: a.recorded("data", "shards"))
    if not isinstance(found, str) or not found:
        raise AmpError("shards is missing, expected a folder that amp make_shards wrote; add --shards DIR")
    return found


def cache_dtype_of(settings: EvaluationSettings, adapters: dict[str, Adapter]) -> Literal["float32", "float16"]:
    """Type of cached features: as given, or as all adapters' records say, or float32."""
    said = {adapter.recorded("data", "cache_dtype") for adapter in adapters.values()}
    return settings.cache_dtype or ("float16" if said == {"float16"} else "float32")


def load_adapters(base: ActionAwareCLIP, model_name: str, adapters: dict[str, Adapter]) -> dict[str, ActionAwareCLIP]:
    """Models of several adapters by name, in eval mode around one base model.

    Raises:
        AmpError: Naming every adapter that can't be used with this base model.
    """
    problems, models = Problems(), {}
    for name, adapter in adapters.items():
        with problems.collect():
            models[name] = adapted(base, model_name, adapter)
    problems.check()
    return models


def adapted(base: ActionAwareCLIP, model_name: str, adapter: Adapter) -> ActionAwareCLIP:
    """A model in eval mode with an adapter's weights around the base model that is already in memory."""
    header, weights, path = adapter.header, adapter.weights, adapter.path
    header.check_base(model_name, base.base_hash, where=path)
    model = ActionAwareCLIP(base.backbone.clip, header.prompt_config, base.tokenizer)
    load_adapter_state(model, header, weights, where=path)
    bad = [key for key, value in weights.items() if not torch.isfinite(value).all()]
    if bad:
        raise AmpError(
            f"{path}: {len(bad)} weights hold NaN or infinite numbers, first {bad[0]!r}, expected finite "
            "ones; give another checkpoint of the run, or train it again"
        )
    return model.to(base.logit_scale.device).eval()
