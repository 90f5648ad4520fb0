"""Knowledge of single captions, such as search queries, with the engines, prompts and rules used for datasets."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
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
        console: Where to warn about captions that are not in English and about answers of the rules; stderr by default.
        timeout: Seconds after which the rules answer in the model's place, as they also do if the model fails. Late
            replies are kept for the next time. None waits for the model.

    Raises:
        AmpError: The model or spaCy can't be loaded, the server can't be reached, or a timeout is given without rules.
    """

    def __init__(
        self,
        engine: str = "rules",
        template: str | None = None,
        retries: int = 2,
        temperature: float = 0.7,
        seed: int = 0,
        fallback: Literal["rules", "none"] = "rules",
        spacy_model: str | None = None,
        engine_options: dict[str, Any] | None = None,
        cache: Path | None = None,
        console: PlainConsole | None = None,
        timeout: float | None = None,
    ) -> None:
        if timeout is not None and (timeout <= 0 or fallback == "none"):
            seen = f"{timeout}, expected more than 0" if timeout <= 0 else f"{timeout} and fallback is 'none'"
            raise AmpError(f"knowledge_timeout is {seen}; None waits for the model")
        self._timeout, self._busy = timeout, threading.Lock()
        self._console = console or PlainConsole(stderr=True)
        self._warns = engine == "rules"
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
            AmpError: The model's server gave no reply, and there is no timeout.
        """
        if self._warns and (note := language_note([readable(caption) for caption in captions], "--knowledge")):
            self._console.print(f"warning: {note}", soft_wrap=True)
            self._warns = False  # warn only once
        if self._timeout is None or self._ladder.engine is None:
            return self._ask(self._ladder, captions)
        reason = "it still writes the answer to an earlier text"
        if self._busy.acquire(blocking=False):
            try:
                return self._start(captions).result(self._timeout)
            except TimeoutError:
                reason = f"no answer within {self._timeout:g} s"
            except AmpError as error:
                reason = str(error)
        self._console.print(f"warning: rules answer in place of the model: {reason}", soft_wrap=True)
        return self._ask(replace(self._ladder, engine=None), captions)

    def _start(self, captions: Sequence[str]) -> Future[list[Knowledge]]:
        """Asks the model in a thread, which releases `_busy`."""
        answer: Future[list[Knowledge]] = Future()

        def ask() -> None:
            # Released first: whoever gets the answer may ask again at once.
            try:
                found = self._ask(self._ladder, captions)
            except BaseException as error:
                self._busy.release()
                answer.set_exception(error)
            else:
                self._busy.release()
                answer.set_result(found)

        # A daemon, so that a command can end while the model still writes.
        threading.Thread(target=ask, daemon=True, name="knowledge").start()
        return answer

    def _ask(self, ladder: Ladder, captions: Sequence[str]) -> list[Knowledge]:
        distinct = list(dict.fromkeys(map(readable, captions)))
        with Replies() if ladder.engine is None else self._open_cache() as replies:
            lost = ask_all(distinct, ladder, lambda: self._makers, replies, PlainConsole(quiet=True))
            outcomes = [ladder.resolve(caption, replies.get) for caption in captions]
        found = [outcome.knowledge for outcome in outcomes if isinstance(outcome, Outcome)]
        if lost or len(found) < len(outcomes):
            raise AmpError(
                f"{lost:,} of {len(distinct):,} captions got no reply from the model's server, expected one each; "
                "check the server, or use the engine 'rules'"
            )
        return found

    def _open_cache(self) -> Replies:
        if self._cache is not None:
            try:
                return ReplyCache(self._cache, "queries")
            except CacheError:
                pass  # the index is read-only, or another process is searching it
        return self._in_memory
