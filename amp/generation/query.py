"""Knowledge of single captions, such as search queries, with the engines, prompts and rules used for datasets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from amp.errors import AmpError
from amp.generation.ask import ask_all
from amp.generation.cache import CacheError, Replies, ReplyCache
from amp.generation.ladder import Ladder, Outcome
from amp.generation.language import language_note
from amp.generation.makers import Makers
from amp.generation.prompts import load_template, readable
from amp.knowledge.schema import Knowledge
from amp.terminal import PlainConsole


class KnowledgeGenerator:
    """Generates the knowledge of captions.

    Args:
        engine, template, retries, temperature, seed, fallback, spacy_model, engine_options: As for
            `amp.generation.run.generate_knowledge`.
        cache: Folder that keeps the replies of a model for later processes. With None, or if the folder can't be
            written or another process is writing to it, they are kept in memory. Those of the rules are not kept.
        console: Where to warn about captions that are not in English; stderr by default.

    Raises:
        AmpError: The model or spaCy can't be loaded, or the server can't be reached.
    """

    def __init__(
        self,
        engine: str = "rules",
        template: str = "default",
        retries: int = 2,
        temperature: float = 0.7,
        seed: int = 0,
        fallback: Literal["rules", "none"] = "rules",
        spacy_model: str | None = None,
        engine_options: dict[str, Any] | None = None,
        cache: Path | None = None,
        console: PlainConsole | None = None,
    ) -> None:
        self._console = console or PlainConsole(stderr=True)
        self._by_rules = self._warns = engine == "rules"
        self._makers = Makers(engine, engine_options or {}, fallback, spacy_model)
        described = self._makers.describe()
        self._ladder = Ladder(
            described["engine"], load_template(template), described["rules"], retries, temperature, seed
        )
        self._cache = None if cache is None else Path(cache)
        self._in_memory = Replies()

    def describe(self) -> dict[str, Any]:
        """Everything that determines the knowledge of a caption."""
        return self._ladder.describe()

    def __call__(self, captions: Sequence[str]) -> list[Knowledge]:
        """Returns the knowledge of each caption; empty if none was found.

        Raises:
            AmpError: The model's server gave no reply.
        """
        distinct = list(dict.fromkeys(readable(caption) for caption in captions))
        if self._warns and (note := language_note(distinct, "--knowledge")):
            self._console.print(f"warning: {note}", soft_wrap=True)
            self._warns = False  # warn only once
        with self._open_cache() as replies:
            lost = ask_all(distinct, self._ladder, lambda: self._makers, replies, PlainConsole(quiet=True))
            outcomes = [self._ladder.resolve(caption, replies.get) for caption in captions]
        found = [outcome.knowledge for outcome in outcomes if isinstance(outcome, Outcome)]
        if lost or len(found) < len(outcomes):
            raise AmpError(
                f"{lost:,} of {len(distinct):,} captions got no reply from the model's server, expected one each; "
                "check the server, or use the engine 'rules'"
            )
        return found

    def _open_cache(self) -> Replies:
        if self._by_rules:
            return Replies()
        if self._cache is not None:
            try:
                return ReplyCache(self._cache, "queries")
            except CacheError:
                pass  # the index is read-only, or another process is searching it
        return self._in_memory
