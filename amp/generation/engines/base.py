"""The interface of a language model, and the registry of engines.

A request is a prefix that all requests share and a suffix of its own; each gets a reply.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from amp.errors import AmpError
from amp.generation.grammar import Grammar
from amp.plugins import load_plugins


class EngineError(AmpError):
    """The language model can't be loaded, reached or used; replies that came before are not lost."""


class Message(NamedTuple):
    """One turn of the shared prefix: the instructions and the in-context samples."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a reply is decoded.

    Attributes:
        max_tokens: Maximum number of new tokens.
        temperature: 0 is greedy.
        stop: The reply ends before this text, which is not part of it.
    """

    max_tokens: int
    temperature: float = 0.0
    stop: str = "\n\n"


@dataclass(frozen=True, slots=True)
class Completion:
    """The reply to one suffix.

    Attributes:
        text: The reply without the stop text; decoded with errors replaced, so always valid Unicode.
        tokens: Number of generated tokens; 0 if the engine doesn't say.
        prompt_tokens: Number of tokens of prefix and suffix; 0 if the engine doesn't say.
        error: Why there is no reply; "" if there is one. Only for what concerns this request; what concerns every
            request is an `EngineError`.
        refused: Whether the same request would fail again (too long, a content filter). The ladder goes on without it.
            After other errors (no answer within all tries) the next run asks again.
    """

    text: str
    tokens: int = 0
    prompt_tokens: int = 0
    error: str = ""
    refused: bool = False


class Engine(Protocol):
    """A language model. Keyword arguments of its ``__init__`` are options of the command: ``--NAME.batch_size`` and so
    on; ``model`` is ``--model``.

    Attributes:
        constrained: Whether `generate` obeys grammars; with False they are ignored.
    """

    constrained: bool

    def describe(self) -> dict[str, Any]:
        """Everything that decides a reply in addition to the request: engine, model, revision or hash of the weights,
        quantisation, rendering, precision, whether grammars are obeyed.

        It is part of the cache's keys and of the provenance: JSON types only, no secret, no address, no batch size.
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
        """Yields the replies to all suffixes, each as soon as it is there.

        Args:
            prefix: Turns that all requests share; an engine computes them once if it can.
            suffixes: The last user turn of each request; any text, never read as control tokens or templates.
            grammar: One per suffix; None for free text.
            sampling: How all replies are decoded.
            seeds: One per suffix. Decides the reply at a temperature above 0, regardless of the rest of the batch.

        Yields:
            (number of the suffix, its completion), each number once, in any order.

        Raises:
            EngineError: Nothing can be generated at all.
        """
        ...


_ENGINES: dict[str, type[Engine]] = {}


def register_engine(name: str, engine: type[Engine]) -> None:
    """Adds an engine.

    Args:
        name: What ``--engine`` calls it.
        engine: Its class.

    Raises:
        AmpError: The name is taken.
    """
    if name == "rules" or _ENGINES.get(name, engine) is not engine:
        raise AmpError(f"engine {name!r} is already registered; expected a new name; rename the engine")
    _ENGINES[name] = engine


def known_engines() -> dict[str, type[Engine]]:
    """All engines by name; ``rules``, which ask no model, are none of them."""
    load_plugins()
    return dict(_ENGINES)


def find_engine(name: str) -> type[Engine] | None:
    """The class of an engine; None for ``rules``.

    Raises:
        AmpError: No such engine.
    """
    known = known_engines()
    if name not in ("rules", *known):
        raise AmpError(f"engine is {name!r}; expected one of {', '.join(('rules', *known))}; correct the name")
    return known.get(name)
