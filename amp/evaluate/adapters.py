"""Reads adapters named on the command line, and the base model, transform and data that their records name."""

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
        path: Path of the file.
        header: Header of the file.
        weights: Trained weights by name.
    """

    path: str
    header: AdapterHeader
    weights: dict[str, torch.Tensor]

    def recorded(self, *keys: str) -> Any:
        """Returns a value of the training configuration, or None if the record does not contain it."""
        value = self.header.training.get("config")
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def named_adapter(text: str) -> tuple[str, str]:
    """Splits `NAME=FILE`. Without NAME, the run's folder is the name. FILE may be a folder that contains an adapter."""
    name, equals, path = text.partition("=")
    if not equals:
        name, path = Path(text).resolve().parent.parent.name, text
    path = str(adapter_file(path))
    if not Path(path).is_file():
        raise AmpError(f"adapter {text!r}: no file {path}, expected NAME=FILE with an adapter.safetensors of amp train")
    return name, path


def read_adapters(texts: Sequence[str]) -> dict[str, Adapter]:
    """Reads adapters.

    Args:
        texts: Adapters, each as `NAME=FILE`.

    Returns:
        Adapters by name, in the given order.

    Raises:
        AmpError: A file is missing or can't be read, or a name is invalid or not unique. The message lists all errors.
    """
    problems = Problems()
    found: dict[str, str] = {}
    adapters: dict[str, Adapter] = {}
    for text in texts:
        with problems.collect():
            name, path = named_adapter(text)
            if name in found:
                raise AmpError(
                    f"adapters has two named {name!r} ({found[name]} and {path}), expected unique names; "
                    "give them as NAME=FILE"
                )
            if name.strip() in ("", BASE.method) or "\t" in name:
                raise AmpError(
                    f"adapter {text!r}: the name is {name!r}, expected a text without tabs other than "
                    f"'{BASE.method}'; give it as NAME=FILE"
                )
            found[name] = path
            adapters[name] = Adapter(path, *read_adapter(path))
    problems.check()
    return adapters


def base_of(given: BaseSettings, adapters: dict[str, Adapter]) -> BaseSettings:
    """Returns the settings of the base model, with null values filled in from the adapters' records.

    Raises:
        AmpError: No base model is given or recorded, or the adapters were trained on different models or transforms.
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
            "adapters and model.name are both missing, expected one of them; give --adapters NAME=FILE, or "
            "--model.name NAME --model.pretrained TAG for the base model only"
        )
    header = next(iter(adapters.values())).header
    return BaseSettings(header.base_name, header.base_pretrained, given.precision, resize)


def load_base(base: BaseSettings, device: torch.device):
    """Loads the base model of `base_of` without an adapter. Returns the same as `create_model_and_transforms`."""
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
    """Returns a value that all adapters' records must share; None without adapters.

    Args:
        adapters: Adapters by name.
        what: Plural name of the value for the error message.
        option: Option that sets the value for all adapters, for the error message; None if there is none.
        value: Returns the value of an adapter.
        compared: Returns what is compared instead of the value; None compares the value.

    Raises:
        AmpError: The records differ.
    """
    recorded = {name: (value(adapter), (compared or value)(adapter)) for name, adapter in adapters.items()}
    if not recorded:
        return None
    first, *others = recorded
    for name in others:
        if recorded[name][1] != recorded[first][1]:
            raise AmpError(
                f"adapters were trained with different {what}: {first!r} ({adapters[first].path}) with "
                f"{recorded[first][0]}, {name!r} ({adapters[name].path}) with {recorded[name][0]}, expected the same; "
                f"evaluate them separately{f', or set one for all with --{option}' if option else ''}"
            )
    return recorded[first][0]


def kinds_of(given: Sequence[Kind] | None, adapters: dict[str, Adapter]) -> list[Kind]:
    """Returns the given kinds of triplets, or else those of the adapters' records, or else all kinds.

    Raises:
        AmpError: The records differ or contain other values.
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


def shards_of(given: str | None, adapters: dict[str, Adapter]) -> str | list[str]:
    """Returns the given folder of shards, or else that of the adapters' records.

    Raises:
        AmpError: No folder is given or recorded, or the records differ.
    """
    found = given or agreed(adapters, "shards", "shards", lambda a: a.recorded("data", "shards"))
    if not isinstance(found, str | list) or not found:
        raise AmpError("shards is missing, expected a folder written by amp make_shards; add --shards DIR")
    return found


def cache_dtype_of(settings: EvaluationSettings, adapters: dict[str, Adapter]) -> Literal["float32", "float16"]:
    """Returns the given type of cached features, or else float16 if all adapters' records have it, or else float32."""
    recorded = {adapter.recorded("data", "cache_dtype") for adapter in adapters.values()}
    return settings.cache_dtype or ("float16" if recorded == {"float16"} else "float32")


def load_adapters(base: ActionAwareCLIP, model_name: str, adapters: dict[str, Adapter]) -> dict[str, ActionAwareCLIP]:
    """Returns the models of several adapters by name, in eval mode. All share one base model.

    Raises:
        AmpError: Some adapters can't be used with this base model. The message lists all of them.
    """
    problems, models = Problems(), {}
    for name, adapter in adapters.items():
        with problems.collect():
            models[name] = adapted(base, model_name, adapter)
    problems.check()
    return models


def adapted(base: ActionAwareCLIP, model_name: str, adapter: Adapter) -> ActionAwareCLIP:
    """Returns a model in eval mode that adds an adapter's weights to an already loaded base model."""
    header, weights, path = adapter.header, adapter.weights, adapter.path
    header.check_base(model_name, base.base_hash, where=path)
    model = ActionAwareCLIP(base.backbone.clip, header.prompt_config, base.tokenizer)
    load_adapter_state(model, header, weights, where=path)
    bad = [key for key, value in weights.items() if not torch.isfinite(value).all()]
    if bad:
        raise AmpError(
            f"{path}: {len(bad)} weights contain NaN or infinite values, first {bad[0]!r}, expected finite "
            "values; use another checkpoint of the run, or train again"
        )
    return model.to(base.logit_scale.device).eval()
