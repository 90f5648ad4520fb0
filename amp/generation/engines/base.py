"""What a language model is to this package: a prefix that all requests share, many suffixes, a reply to each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from amp.errors import AmpError
from amp.generation.grammar import Grammar


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
        max_tokens: at most so many new tokens.
        temperature: 0 is greedy.
        stop: the reply ends before this text, which is not part of it.
    """

    max_tokens: int
    temperature: float = 0.0
    stop: str = "\n\n"


@dataclass(frozen=True, slots=True)
class Completion:
    """The reply to one suffix.

    Attributes:
        text: without the stop text; decoded with errors replaced, so always valid Unicode.
        tokens: generated tokens, 0 where the engine doesn't say.
        prompt_tokens: tokens of prefix and suffix, 0 where the engine doesn't say.
        error: why there is no reply; "" where there is one. For what concerns this request alone; what concerns every
            request is an `EngineError`.
        refused: the same request would fail again (too long, a content filter): the ladder goes on without it. Other
            errors (no answer within all tries) are asked again in the next run.
    """

    text: str
    tokens: int = 0
    prompt_tokens: int = 0
    error: str = ""
    refused: bool = False


class Engine(Protocol):
    """A language model.

    Attributes:
        constrained: whether `generate` obeys grammars; with False they are ignored.
    """

    constrained: bool

    def describe(self) -> dict[str, Any]:
        """Everything that decides a reply beside the request: engine, model, revision or hash of the weights,
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
        """Replies to all suffixes, each as soon as it is there.

        Args:
            prefix: the same for all; an engine computes it once where it can.
            suffixes: the last user turn of each request; any text, never read as control tokens or templates.
            grammar: one a suffix, None for free text.
            sampling: the same for all.
            seeds: one a suffix; decides the reply at a temperature above 0, whatever stands in the same batch.

        Yields:
            (number of the suffix, its completion), each number once, in any order.

        Raises:
            EngineError: nothing can be generated at all.
        """
        ...
