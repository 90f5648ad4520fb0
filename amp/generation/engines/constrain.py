"""Constrained decoding with llguidance: each step allows only tokens that keep a reply within its grammar."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from amp.errors import require, shorten
from amp.generation.engines.base import EngineError
from amp.generation.grammar import Grammar


class Constraint:
    """Compiles grammars for a tokenizer. Takes a second to construct, so make one per model.

    Args:
        tokenizer: A fast tokenizer of transformers.
        vocabulary: Width of the model's logits, which may exceed the tokenizer's vocabulary.
        ends: Tokens that end a reply.

    Raises:
        AmpError: llguidance isn't installed, or can't use this tokenizer.
    """

    def __init__(self, tokenizer, vocabulary: int, ends: Sequence[int]) -> None:
        hf = require("llguidance.hf", "constrained decoding", "set --transformers.constrained false")
        try:
            self._tokenizer = hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=list(ends))
        except (TypeError, ValueError) as error:
            raise EngineError(
                f"llguidance can't use this model's tokenizer ({shorten(str(error))}); set --transformers.constrained "
                "false"
            ) from None
        self.vocabulary = vocabulary
        # Retries, and replies with the same number of states, share a grammar. Compiling one takes a millisecond.
        self._compiled = lru_cache(maxsize=4096)(self._compile)

    def rows(self, grammars: Sequence[Grammar]) -> Rows:
        """Starts a batch of replies."""
        return Rows(self.vocabulary, [self._compiled(grammar.regex()).deep_copy() for grammar in grammars])

    def _compile(self, regex: str):
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_regex(regex))
        if matcher.is_error():
            raise EngineError(f"llguidance refuses the grammar {shorten(regex)} ({shorten(matcher.get_error())})")
        return matcher


class Rows:
    """The grammar state of each reply of a batch."""

    def __init__(self, vocabulary: int, matchers: list) -> None:
        from llguidance.torch import allocate_token_bitmask

        self._matchers = matchers
        self._allowed = allocate_token_bitmask(len(matchers), vocabulary)  # int32 (rows, vocabulary / 32)

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Sets the logits (rows, vocabulary) of tokens that would leave the grammar to -inf, in place.

        In a complete reply only the end tokens stay allowed.
        """
        from llguidance.torch import fill_next_token_bitmask

        for row, matcher in enumerate(self._matchers):
            fill_next_token_bitmask(matcher, self._allowed, row)
        # Unpack the bits here: llguidance's own function first compiles a kernel, which takes seconds and a compiler.
        words = self._allowed[: len(self._matchers)].to(logits.device, non_blocking=True)
        bits = (words.unsqueeze(2) >> torch.arange(32, device=logits.device)) & 1
        return logits.masked_fill_(bits.flatten(1)[:, : logits.shape[1]] == 0, -torch.inf)

    def advance(self, tokens: Sequence[int]) -> list[bool]:
        """Adds the chosen token of each row. Returns which replies have ended."""
        ended = []
        for matcher, token in zip(self._matchers, tokens, strict=True):
            if not matcher.consume_token(token):
                raise EngineError(f"llguidance refuses token {token} ({shorten(matcher.get_error())})")
            ended.append(matcher.is_stopped())
        return ended

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all other rows."""
        self._matchers = [self._matchers[row] for row in rows]
