"""The requests Q1 (triplets) and Q2 (states) of sec. 3.2 of arXiv 2506.23502, read from YAML templates."""

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

TEMPLATE = Path(__file__).with_name("prompts.yaml")
MAX_CAPTION_WORDS = 100
"""Maximum number of words of a caption in a request. The longest caption of COCO has 50."""


@dataclass(frozen=True)
class Template:
    """Prompts of the two requests.

    Attributes:
        name: Name of the file, without its suffix; "default" for this project's.
        version: Version number given by the template's author.
        triplets: Shared turns of Q1.
        states: Shared turns of Q2.
    """

    name: str
    version: int
    triplets: tuple[Message, ...]
    states: tuple[Message, ...]

    def hash(self) -> str:
        """SHA-256 of the text that the model reads, so comments and the file name have no influence."""
        content = [[list(message) for message in prefix] for prefix in (self.triplets, self.states)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "version": self.version, "sha256": self.hash()}


def load_template(path: str | None = None) -> Template:
    """Reads a YAML file of prompts; None reads those of this project (`amp/generation/prompts.yaml`).

    The file has the keys `version`, `triplets` and `states`. The last two each have `instructions` and `samples`. A
    sample has a `caption` and `triplets` (lines as in `amp.generation.grammar`); under `states` it also has one state
    per triplet, in `states`.

    Raises:
        AmpError: The template does not exist, a key is missing, or the reply of a sample fails the strict check. A
            model would copy the fault.
    """
    file = Path(path) if path is not None else TEMPLATE
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AmpError(f"{file}: no such file; expected a YAML file of prompts; check --template") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise AmpError(f"{file}: can't be read as YAML ({shorten(str(error))}); correct the file") from None
    where = str(file)
    version = _get(content, "version", int, where)
    name = file.stem if path is not None else "default"
    return Template(name, version, _triplets_prefix(content, where), _states_prefix(content, where))


def ask_triplets(caption: str) -> str:
    """The last turn of Q1."""
    return f"Caption: {readable(caption)}"


def ask_states(caption: str, triplets: tuple[Triplet, ...]) -> str:
    """The last turn of Q2. One request asks for the states of all triplets of a caption."""
    lines = [f"{number}. {triplet_line(triplet)}" for number, triplet in enumerate(triplets, start=1)]
    return "\n".join((ask_triplets(caption), *lines))


def readable(caption: str) -> str:
    """The caption on one line, cut to `MAX_CAPTION_WORDS` words, without control characters."""
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
                f"{here}.samples[{number}]: the triplets {shorten(reply)} of {shorten(caption)} fail the strict check; "
                "expected at most six different lines with only words of the caption; correct them"
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
            raise AmpError(
                f"{place}: 'triplets' is {shorten(lines)}; expected triplets only; correct the line that is none"
            )
        states = _get(sample, "states", list, place)
        reply = "\n".join(f"{index}. {state}" for index, state in enumerate(states, start=1))
        found = read_states(reply, len(triplets))
        if len(states) != len(triplets) or any(source != "strict" for _, source in found):
            raise AmpError(
                f"{place}: 'states' is {shorten(states)} for {len(triplets)} triplets; expected one sentence per "
                "triplet that passes the strict check; correct them"
            )
        messages += [Message("user", ask_states(caption, triplets)), Message("assistant", reply)]
    return tuple(messages)


def _sample(sample: Any, where: str) -> tuple[str, list[str]]:
    return _get(sample, "caption", str, where), [str(line) for line in _get(sample, "triplets", list, where)]


def _get(content: Any, key: str, kind: type, where: str) -> Any:
    """Returns the value of a key, which must not be empty."""
    value = value_of(content, key, kind, where, "correct it")
    if not value:
        raise AmpError(f"{where}: '{key}' is {shorten(value)}; expected a value that isn't empty; correct it")
    return value
