"""Prints launchers/configs/reference.yaml, which lists every key of a training run.

Each key has its type, default, meaning (from the docstrings of the settings) and origin: the paper or our own choice.
The paper's supplement with the hyper-parameters is not public, so few values are from the paper.
"""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, get_type_hints

from amp.errors import exit_on_error

with exit_on_error():
    import yaml
    from docstring_parser import parse

    from amp.train.config import TrainConfig

# Keys whose default is from the paper, and where the paper gives it. All others are our choice.
PAPERS = {
    "model.name": "one of its three backbones",
    "model.pretrained": "its weights",
    "prompt.knowledge": "sec. 3.3",
    "data.kinds": "Table 3",
    "stages": "sec. 3.4",
    "combined": "Table 5",
}
HEAD = """\
# Every key of a training run, with its default value. The comments give type, default, origin ("paper", or "our
# choice", since the paper's hyper-parameters are not public) and meaning. Your own file only needs the
# keys that differ. Written by:
#   python tools/reference_config.py > launchers/configs/reference.yaml
"""
WIDTH = 118


def reference() -> str:
    """Returns the content of the file."""
    return HEAD + "\n".join(_lines(TrainConfig(), "", 0)) + "\n"


def _lines(settings: Any, outer: str, depth: int) -> Iterator[str]:
    meanings = {p.arg_name: p.description or "" for p in parse(type(settings).__doc__ or "").params}
    types = get_type_hints(type(settings))
    indent = "  " * depth
    for field in fields(settings):
        key, value = f"{outer}{field.name}", getattr(settings, field.name)
        text = " ".join(re.sub(r"`+", "", meanings[field.name]).split())
        if is_dataclass(value):
            yield from _comment(text, indent)
            yield f"{indent}{field.name}:"
            yield from _lines(value, f"{key}.", depth + 1)
            continue
        source = f"paper: {PAPERS[key]}" if key in PAPERS else "our choice"
        if source == "our choice":
            text = re.sub(r" \(our choice\)|(?<=\()our choice, |, our choice(?=\))", "", text)
        head = f"{_name(types[field.name])}, default {_scalar(_default(field))} ({source})"
        yield from _comment(f"{head}: {text}", indent)
        yield f"{indent}{field.name}: {_scalar(value)}"


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}#   ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _default(field: Field) -> Any:
    """Default of the class. A run may start from another value, as for the epochs of stage 2."""
    return field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc]


def _name(annotation: Any) -> str:
    text = (
        annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    )
    text = re.sub(r"(typing\.|amp\.[\w.]+\.)", "", text).replace("NoneType", "null").replace("None", "null")
    text = re.sub(r"Optional\[(.*)\]", r"\1 | null", text)
    return re.sub(r"Literal\[(.*?)\]", lambda found: "one of " + found[1].replace("'", "").replace(", ", "/"), text)


def _scalar(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


if __name__ == "__main__":
    with exit_on_error():
        print(reference(), end="")
