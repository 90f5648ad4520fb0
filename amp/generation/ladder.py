"""Turns a caption into knowledge by a ladder of steps: strict check, repair, retries with temperature, rules, empty.

The ladder is a pure function of the caption and the replies on disk. It returns either an `Outcome` or the next request
that it needs. Generating, resuming and merging therefore run the same code, and an improved repair applies to old
replies without calling the model again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from amp.generation.cache import Reply, key_of
from amp.generation.engines.base import Message, Sampling
from amp.generation.grammar import Grammar, StateGrammar, TripletGrammar
from amp.generation.prompts import Template, ask_states, ask_triplets, readable
from amp.generation.replies import MAX_STATE_CHARACTERS, MAX_TRIPLETS, read_states, read_triplets
from amp.generation.states import state_of
from amp.generation.words import slot_words, words_of
from amp.knowledge.schema import Knowledge, Triplet

LADDER_VERSION = 1
"""Increase when the same replies lead to other knowledge."""
NO_WORD, NOTHING_FOUND, ALL_FAILED = "no word in the caption", "nothing found in the caption", "no usable reply"

# Enough for six lines of triplets and six states of 160 characters in most languages.
MAX_TOKENS = {"triplets": 192, "states": 384}

Stage = Literal["triplets", "rules", "states"]
Lookup = Callable[[str], Reply | None]


@dataclass(frozen=True, slots=True)
class Request:
    """The next request of the ladder.

    Attributes:
        key: Key of the reply in the cache.
        stage: "triplets" (Q1), "rules" or "states" (Q2).
        attempt: 0 for the greedy request, 1 and 2 for retries with temperature.
        caption: The caption as the model reads it.
        suffix: The last turn; "" for the rules.
        grammar: Grammar of the reply; None for the rules.
        seed: Random seed of the sampling.
    """

    key: str
    stage: Stage
    attempt: int
    caption: str
    suffix: str = ""
    grammar: Grammar | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of the ladder for one caption.

    Attributes:
        knowledge: Knowledge of the caption.
        sources: For each triplet, the steps that gave it and its state: `{"triplet": ..., "state": ...}` with values
            strict, repaired, retry1, retry2 or rules.
        empty: Why there is no triplet; "" if there is one.
        dropped: Number of triplets left out because no state was found for them.
    """

    knowledge: Knowledge
    sources: tuple[dict[str, str], ...] = ()
    empty: str = ""
    dropped: int = 0

    @property
    def failed(self) -> bool:
        """Whether neither the model nor the rules gave usable knowledge, for the caption or for one of its triplets."""
        return self.empty == ALL_FAILED or self.dropped > 0


@dataclass(frozen=True)
class Ladder:
    """The settings that determine the outcomes of a run.

    Attributes:
        engine: Description from `Engine.describe`; None uses only the rules, without a model.
        template: Prompts of the requests.
        rules: Description from `Makers.describe`; None gives an empty record instead of rules.
        retries: Maximum number of further requests if a reply can't be used.
        temperature: Temperature of the retries; the first request is greedy.
        seed: Random seed of the retries.
        rule_triplets: Whether the rules write the triplets and the model only their states.
    """

    engine: dict[str, Any] | None
    template: Template
    rules: dict[str, Any] | None
    retries: int = 2
    temperature: float = 0.7
    seed: int = 0
    rule_triplets: bool = False

    def describe(self) -> dict[str, Any]:
        """Everything that determines an outcome in addition to the caption and the replies."""
        return {
            "version": LADDER_VERSION,
            "engine": self.engine,
            "template": self.template.describe() if self.engine is not None else None,
            "rules": self.rules,
            "max_tokens": MAX_TOKENS if self.engine is not None else None,
            "retries": self.retries,
            "temperature": self.temperature,
            "seed": self.seed,
            **({"rule_triplets": True} if self.rule_triplets else {}),
        }

    def fell_back(self, outcome: Outcome) -> bool:
        """Whether the rules wrote a triplet or a state that the model should have written."""
        parts = ("state",) if self.rule_triplets else ("triplet", "state")
        return self.engine is not None and any(source[part] == "rules" for source in outcome.sources for part in parts)

    def prefix(self, stage: Stage) -> tuple[Message, ...]:
        """Turns that all requests of a stage share."""
        return self.template.triplets if stage == "triplets" else self.template.states

    def sampling(self, stage: Stage, attempt: int) -> Sampling:
        """Decoding of a request: greedy at the first attempt."""
        return Sampling(MAX_TOKENS[stage], self.temperature if attempt else 0.0)

    def resolve(self, text: str, lookup: Lookup) -> Outcome | Request:
        """Returns the outcome of a caption, or the first request whose reply `lookup` does not have."""
        caption = readable(text)
        if not any(letter.isalpha() for letter in caption) or not words_of(caption):
            return Outcome(Knowledge(), empty=NO_WORD)
        triplets: tuple[Triplet, ...] = ()
        source = ""
        if self.engine is not None and not self.rule_triplets:
            for attempt in range(1 + self.retries):
                request = self._ask_triplets(caption, attempt)
                reply = lookup(request.key)
                if reply is None:
                    return request
                found = None if reply.refused else read_triplets(reply.text, caption)
                if found is not None and found.usable:
                    triplets, source = found.triplets, _rung(found.strict, attempt)
                    break
        if not source:
            if self.rules is None:
                return Outcome(Knowledge(), empty=ALL_FAILED)
            request = self._ask_rules(caption)
            reply = lookup(request.key)
            if reply is None:
                return request
            triplets, source = load_triplets(reply.text), "rules"
        if not triplets:
            return Outcome(Knowledge(), empty=NOTHING_FOUND)
        return self._resolve_states(caption, triplets, source, lookup)

    def _resolve_states(
        self, caption: str, triplets: tuple[Triplet, ...], source: str, lookup: Lookup
    ) -> Outcome | Request:
        states: list[tuple[str, str] | None] = [None] * len(triplets)  # (text, rung)
        if self.engine is not None:
            for attempt in range(1 + self.retries):
                missing = [index for index, state in enumerate(states) if state is None]
                if not missing:
                    break
                request = self._ask_states(caption, tuple(triplets[index] for index in missing), attempt)
                reply = lookup(request.key)
                if reply is None:
                    return request
                if not reply.refused:
                    for index, (text, how) in zip(missing, read_states(reply.text, len(missing)), strict=True):
                        states[index] = (text, _rung(how == "strict", attempt)) if text else None
        if self.rules is not None:
            states = [state or (state_of(triplet), "rules") for triplet, state in zip(triplets, states, strict=True)]
        kept = [(triplet, *state) for triplet, state in zip(triplets, states, strict=True) if state is not None]
        return Outcome(
            Knowledge(tuple(triplet for triplet, _, _ in kept), tuple(state for _, state, _ in kept)),
            tuple({"triplet": source, "state": rung} for _, _, rung in kept),
            empty="" if kept else ALL_FAILED,
            dropped=len(triplets) - len(kept),
        )

    def _ask_triplets(self, caption: str, attempt: int) -> Request:
        grammar = TripletGrammar(slot_words(caption), MAX_TRIPLETS)
        return self._request("triplets", attempt, caption, ask_triplets(caption), grammar)

    def _ask_states(self, caption: str, triplets: tuple[Triplet, ...], attempt: int) -> Request:
        grammar = StateGrammar(len(triplets), MAX_STATE_CHARACTERS)
        return self._request("states", attempt, caption, ask_states(caption, triplets), grammar)

    def _ask_rules(self, caption: str) -> Request:
        return Request(key_of(stage="rules", rules=self.rules, caption=caption), "rules", 0, caption)

    def _request(self, stage: Stage, attempt: int, caption: str, suffix: str, grammar: Grammar) -> Request:
        sampling = self.sampling(stage, attempt)
        key = key_of(
            stage=stage,
            prefix=_hash(self.prefix(stage)),
            engine=self.engine,
            sampling=[sampling.max_tokens, sampling.temperature, sampling.stop],
            seed=[self.seed, attempt] if attempt else None,
            grammar=grammar.regex(),
            suffix=suffix,
        )
        return Request(key, stage, attempt, caption, suffix, grammar, seed=int(key[:8], 16))


def dump_triplets(triplets: tuple[Triplet, ...]) -> str:
    """Serializes triplets of the rules for the cache."""
    return json.dumps([[t.subject, t.action, t.object, t.kind] for t in triplets], ensure_ascii=False)


def load_triplets(text: str) -> tuple[Triplet, ...]:
    """The inverse of `dump_triplets`."""
    return tuple(Triplet(*slots) for slots in json.loads(text))


@cache
def _hash(prefix: tuple[Message, ...]) -> str:
    return key_of(prefix=[list(message) for message in prefix])


def _rung(strict: bool, attempt: int) -> str:
    return f"retry{attempt}" if attempt else ("strict" if strict else "repaired")
