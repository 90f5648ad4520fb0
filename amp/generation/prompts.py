"""The requests Q1 and Q2 (sec. 3.2 of arXiv 2506.23502): templates in readable files, rendered as chat turns."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from amp.errors import AmpError, shorten
from amp.generation.engines.base import Message
from amp.generation.replies import parse_triplet_lines, read_states, read_triplets, triplet_line
from amp.json_text import value_of
from amp.knowledge.schema import Triplet

TEMPLATES = Path(__file__).with_name("templates")
MAX_CAPTION_WORDS = 100
"""Words of a caption that the model reads; the longest caption of COCO has 50."""


@dataclass(frozen=True)
class Template:
    """The two requests.

    Attributes:
        name: Name of the file, without its suffix.
        version: A number that its author raises.
        triplets: The shared prefix of Q1.
        states: The shared prefix of Q2.
    """

    name: str
    version: int
    triplets: tuple[Message, ...]
    states: tuple[Message, ...]

    def hash(self) -> str:
        """SHA-256 of everything that the model reads; comments and the name of the file don't count."""
        content = [[list(message) for message in prefix] for prefix in (self.triplets, self.states)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "version": self.version, "sha256": self.hash()}


def load_template(name: str) -> Template:
    """Reads ``templates/NAME.yaml`` of this package, or the YAML file of that path.

    The file has ``version``, and for each of ``triplets`` and ``states`` the ``instructions`` and ``samples``. A sample
    has ``caption``, ``triplets`` (lines as in `amp.generation.grammar`) and, under ``states``, as many ``states``.

    Raises:
        AmpError: No such template, a missing key, or a sample that the strict check of its own reply refuses, from
            which no model could learn to pass it.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else TEMPLATES / f"{name}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(file.stem for file in TEMPLATES.glob("*.yaml")))
        raise AmpError(
            f"{path}: no such template; expected one of {known}, or a path that ends in .yaml; check --template"
        ) from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise AmpError(f"{path}: can't be read as YAML ({shorten(str(error))}); correct the file") from None
    where = str(path)
    version = _get(content, "version", int, where)
    return Template(path.stem, version, _triplets_prefix(content, where), _states_prefix(content, where))


def ask_triplets(caption: str) -> str:
    """The last turn of Q1."""
    return f"Caption: {readable(caption)}"


def ask_states(caption: str, triplets: tuple[Triplet, ...]) -> str:
    """The last turn of Q2, which asks for all states of a caption at once: one request instead of one per triplet."""
    lines = [f"{number}. {triplet_line(triplet)}" for number, triplet in enumerate(triplets, start=1)]
    return "\n".join((ask_triplets(caption), *lines))


def readable(caption: str) -> str:
    """A caption on one line, cut to `MAX_CAPTION_WORDS`, without control characters."""
    words = "".join(letter if letter.isprintable() else " " for letter in caption).split()
    return " ".join(words[:MAX_CAPTION_WORDS])


def _triplets_prefix(content: Any, where: str) -> tuple[Message, ...]:
    part, here = _get(content, "triplets", dict, where), f"{where}: triplets"
    messages = [Message("system", _get(part, "instructions", str, here).strip())]
    for number, sample in enumerate(_get(part, "samples", list, here)):
        caption, lines = _sample(sample, f"{here}.samples[{number}]")
        reply = "\n".join(lines)
        if not read_triplets(reply, caption).strict:
            raise AmpError(
                f"{here}.samples[{number}]: {shorten(reply)} isn't a strict reply to {shorten(caption)}; expected at "
                "most six lines, each once, of words of the caption; correct them"
            )
        messages += [Message("user", ask_triplets(caption)), Message("assistant", reply)]
    return tuple(messages)


def _states_prefix(content: Any, where: str) -> tuple[Message, ...]:
    part, here = _get(content, "states", dict, where), f"{where}: states"
    messages = [Message("system", _get(part, "instructions", str, here).strip())]
    for number, sample in enumerate(_get(part, "samples", list, here)):
        place = f"{here}.samples[{number}]"
        caption, lines = _sample(sample, place)
        triplets = parse_triplet_lines(lines)
        if triplets is None:
            raise AmpError(f"{place}: 'triplets' holds a line that is no triplet: {shorten(lines)}; correct it")
        states = _get(sample, "states", list, place)
        reply = "\n".join(f"{index}. {state}" for index, state in enumerate(states, start=1))
        found = read_states(reply, len(triplets))
        if len(states) != len(triplets) or any(source != "strict" for _, source in found):
            raise AmpError(
                f"{place}: {len(triplets)} triplets and the states {shorten(states)}; expected one sentence per "
                "triplet that passes the strict check; correct them"
            )
        messages += [Message("user", ask_states(caption, triplets)), Message("assistant", reply)]
    return tuple(messages)


def _sample(sample: Any, where: str) -> tuple[str, list[str]]:
    return _get(sample, "caption", str, where), [str(line) for line in _get(sample, "triplets", list, where)]


def _get(content: Any, key: str, kind: type, where: str) -> Any:
    """The value of a key that must not be empty."""
    value = value_of(content, key, kind, where, "correct it")
    if not value:
        raise AmpError(f"{where}: '{key}' is {shorten(value)}; expected one that isn't empty; correct it")
    return value
