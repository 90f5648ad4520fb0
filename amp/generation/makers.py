"""Loads the engine and the rules that generate knowledge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amp.generation.engines.base import Engine, find_engine
from amp.generation.states import lexicon_version

if TYPE_CHECKING:
    from amp.generation.rules import RuleTriplets


class Makers:
    """The engine and the rules, each loaded once, at first use."""

    def __init__(self, engine: str, options: dict[str, Any], fallback: str, spacy_model: str | None) -> None:
        self._name, self._options, self._fallback, self._spacy_model = engine, options, fallback, spacy_model
        self._engine: Engine | None = None
        self._rules: RuleTriplets | None = None

    @property
    def engine(self) -> Engine | None:
        if self._engine is None:
            engine = find_engine(self._name)
            self._engine = engine(**self._options) if engine is not None else None
        return self._engine

    @property
    def rules(self) -> RuleTriplets | None:
        if self._rules is None and (self._name == "rules" or self._fallback == "rules"):
            from amp.generation.rules import RuleTriplets

            self._rules = RuleTriplets(self._spacy_model)
        return self._rules

    def describe(self) -> dict[str, Any]:
        return {
            "engine": self.engine.describe() if self.engine is not None else None,
            "rules": {**self.rules.describe(), "lexicon": lexicon_version()} if self.rules is not None else None,
        }
