"""The interface of a language model, and the registry of engines.

A request consists of a prefix shared by all requests and its own suffix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from amp.errors import AmpError
from amp.generation.grammar import Grammar
from amp.plugins import load_plugins


class EngineError(AmpError):
    """The language model can't be loaded, reached or used. Earlier replies are kept."""


class Message(NamedTuple):
    """One turn of the shared prefix, which holds the instructions and the in-context samples."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a reply is decoded.

    Attributes:
        max_tokens: Maximum number of new tokens.
        temperature: Sampling temperature; 0 is greedy.
        stop: Text that ends the reply. It is not part of the reply.
    """

    max_tokens: int
    temperature: float = 0.0
    stop: str = "\n\n"


@dataclass(frozen=True, slots=True)
class Completion:
    """The reply to one suffix.

    Attributes:
        text: The reply without the stop text. Always valid Unicode: invalid bytes are replaced.
        tokens: Number of generated tokens; 0 if unknown.
        prompt_tokens: Number of tokens of prefix and suffix; 0 if unknown.
        error: Why there is no reply; "" if there is one. Only for errors of this request; an error that affects every
            request raises `EngineError`.
        refused: Whether the same request would fail again (too long, a content filter). The ladder continues without
            it. After other errors (no answer after all tries) the next run sends the request again.
    """

    text: str
    tokens: int = 0
    prompt_tokens: int = 0
    error: str = ""
    refused: bool = False


class Engine(Protocol):
    """A language model. The keyword arguments of its `__init__` become command-line options such as
    `--NAME.batch_size`; `model` becomes `--model`.

    Attributes:
        constrained: Whether `generate` follows grammars. If False, grammars are ignored.
    """

    constrained: bool

    def describe(self) -> dict[str, Any]:
        """Everything that determines a reply in addition to the request: engine, model, revision or hash of the
        weights, quantisation, rendering, precision, whether grammars are followed.

        It is part of the cache's keys and of the provenance, so it holds only JSON types, and no secrets, addresses or
        batch sizes.
        """
        ...

    def generate(
        self,
        prefix: Sequence[Message],
        suffixes: Sequence[str],
        grammar: Sequence[Grammar] | None,
        sampling: Sampling,
        seeds: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """Yields the reply to each suffix as soon as it is available.

        Args:
            prefix: Turns that all requests share. An engine should compute them only once.
            suffixes: Last user turn of each request. May be any text and must not be read as control tokens or
                templates.
            grammar: One grammar per suffix; None for free text.
            sampling: Decoding of all replies.
            seeds: One random seed per suffix. At a temperature above 0 it determines the reply, independently of the
                rest of the batch.

        Yields:
            (index of the suffix, its completion), each index once, in any order.

        Raises:
            EngineError: Nothing can be generated at all.
        """
        ...


_ENGINES: dict[str, type[Engine]] = {}


def register_engine(name: str, engine: type[Engine]) -> None:
    """Registers an engine.

    Args:
        name: Name of the engine for `--engine`.
        engine: Class of the engine.

    Raises:
        AmpError: The name is taken.
    """
    if name == "rules" or _ENGINES.get(name, engine) is not engine:
        raise AmpError(f"engine {name!r} is already registered; expected a new name; rename the engine")
    _ENGINES[name] = engine


def known_engines() -> dict[str, type[Engine]]:
    """All engines by name. `rules` is not included, since it uses no model."""
    load_plugins()
    return dict(_ENGINES)


def find_engine(name: str) -> type[Engine] | None:
    """Returns the class of an engine; None for `rules`.

    Raises:
        AmpError: There is no such engine.
    """
    known = known_engines()
    if name not in ("rules", *known):
        raise AmpError(f"engine is {name!r}; expected one of {', '.join(('rules', *known))}; correct the name")
    return known.get(name)
