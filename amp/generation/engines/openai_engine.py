"""Any server with OpenAI's API: `vllm serve`, `llama-server`, `transformers serve`, or a hosted model."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Literal
from urllib.parse import urlsplit

from amp.errors import require, shorten, without_secrets
from amp.generation.engines.base import Completion, EngineError, Message, Sampling
from amp.generation.engines.rendering import plain_text, without_marks
from amp.generation.grammar import Grammar

_THINKING = re.compile(r"\A\s*<think>.*?(</think>\s*|\Z)", re.DOTALL)
_RETRIED_STATUS = frozenset({408, 409, 425, 429})
_LONGEST_WAIT = 60.0


class OpenAIEngine:
    """A model on a server.

    Args:
        base_url: Address of the API, such as http://localhost:8000/v1.
        model: Name of the model on the server.
        rendering: chat uses chat/completions and the server's chat template; plain sends text to completions.
        constrained: Format in which the server accepts a grammar: vllm (a regex; version 0.11 or newer), llama.cpp
            (GBNF) or none; auto queries the server.
        concurrency: Maximum number of simultaneous requests.
        requests_per_minute: Maximum number of requests per minute; null sets no limit.
        timeout: Seconds after which a request is cancelled and tried again.
        tries: Maximum number of tries per request.
        first_wait: Seconds before the second try. The wait doubles with each try, up to a minute, with random jitter. A
            Retry-After header of the server takes precedence.
        api_key_variable: Environment variable that holds the API key. May be unset for a server without keys.

    Raises:
        EngineError: The server can't be reached, refuses the key or doesn't have the model.
    """

    def __init__(
        self,
        base_url: str = "http://localhost:8000/v1",
        model: str = "",
        rendering: Literal["chat", "plain"] = "chat",
        constrained: Literal["auto", "vllm", "llama.cpp", "none"] = "auto",
        concurrency: int = 32,
        requests_per_minute: float | None = None,
        timeout: float = 120.0,
        tries: int = 5,
        first_wait: float = 1.0,
        api_key_variable: str = "OPENAI_API_KEY",
    ) -> None:
        openai = require("openai", "the openai engine")
        require("tenacity", "the openai engine")
        for name, value in (("concurrency", concurrency), ("tries", tries), ("timeout", timeout)):
            if value <= 0:
                raise EngineError(f"openai.{name} is {value}; expected more than 0; correct it")
        if not re.fullmatch(
            r"[A-Za-z_][A-Za-z0-9_]*", api_key_variable
        ):  # the value is not printed, since it may be the key itself
            raise EngineError(
                "openai.api_key_variable is not the name of an environment variable; expected the variable that holds "
                "the key, such as OPENAI_API_KEY; correct it"
            )
        if requests_per_minute is not None and requests_per_minute <= 0:
            raise EngineError(f"openai.requests_per_minute is {requests_per_minute}; expected more than 0, or null")
        self._openai, self._model, self._rendering = openai, model, rendering
        self._concurrency, self._tries, self._first_wait = concurrency, tries, first_wait
        self._api_key_variable = api_key_variable
        self._limiter = _Limiter(requests_per_minute)
        self._where = _public(base_url)
        # This class retries itself, because the package doesn't retry truncated or empty answers.
        self._key = os.environ.get(api_key_variable) or "none"
        self._client = openai.OpenAI(base_url=base_url, api_key=self._key, timeout=timeout, max_retries=0)
        self._kind = self._ask_server() if constrained == "auto" else constrained
        self.constrained = self._kind != "none"

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "openai",
            "model": self._model,
            "rendering": self._rendering,
            "constrained": self.constrained,
            "grammar": self._kind,
        }

    def generate(
        self,
        prefix: Sequence[Message],
        suffixes: Sequence[str],
        grammar: Sequence[Grammar] | None,
        sampling: Sampling,
        seeds: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """See `Engine.generate`. Pending requests are cancelled when the caller stops iterating."""
        stopped = threading.Event()
        pool = ThreadPoolExecutor(self._concurrency, thread_name_prefix="openai")
        running: dict[Future, int] = {}
        failures = 0  # consecutive
        numbers = iter(range(len(suffixes)))

        def submit() -> None:
            for number in numbers:
                rule, seed = grammar[number] if grammar else None, seeds[number] if seeds else None
                arguments = self._arguments(prefix, suffixes[number], rule, sampling, seed)
                running[pool.submit(self._complete, arguments, stopped)] = number
                return

        try:
            for _ in range(self._concurrency):
                submit()
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    number, completion = running.pop(future), future.result()
                    failures = failures + 1 if completion.error and not completion.refused else 0
                    yield number, completion
                    if failures >= max(8, self._concurrency):
                        raise EngineError(
                            f"{self._where}: no answer to {failures} requests in a row, the last after {self._tries} "
                            f"tries: {completion.error}; expected a server that answers; check its log, then run the "
                            "same command again"
                        )
                    submit()
        finally:
            stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _arguments(self, prefix, suffix: str, grammar: Grammar | None, sampling: Sampling, seed: int | None) -> dict:
        extra: dict[str, Any] = {}
        if grammar is not None and self._kind == "llama.cpp":
            extra["grammar"] = grammar.gbnf()
        elif grammar is not None and self._kind == "vllm":
            extra["structured_outputs"] = {"regex": grammar.regex()}
        suffix = without_marks(suffix)
        arguments: dict[str, Any] = {
            "model": self._model,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
        }
        if sampling.temperature and seed is not None:
            arguments["seed"] = seed % 2**31
        if self._rendering == "plain":
            return arguments | {"prompt": plain_text(prefix, suffix), "stop": [sampling.stop], "extra_body": extra}
        if self._kind == "vllm":
            extra["chat_template_kwargs"] = {"enable_thinking": False}
        messages = [{"role": role, "content": content} for role, content in prefix]
        return arguments | {"messages": [*messages, {"role": "user", "content": suffix}], "extra_body": extra}

    def _complete(self, arguments: dict[str, Any], stopped: threading.Event) -> Completion:
        """Sends one request, with retries."""
        from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, stop_when_event_set
        from tenacity import sleep_using_event, wait_random_exponential  # isort: skip

        back_off = wait_random_exponential(multiplier=self._first_wait, max=_LONGEST_WAIT)

        def pause(state) -> float:
            asked = getattr(state.outcome.exception(), "retry_after", None)
            return back_off(state) if asked is None else min(asked, _LONGEST_WAIT)

        retrying = Retrying(
            retry=retry_if_exception_type(_TryAgain),
            stop=stop_after_attempt(self._tries) | stop_when_event_set(stopped),
            wait=pause,
            sleep=sleep_using_event(stopped),
            reraise=True,
        )
        try:
            return retrying(self._try, arguments, stopped)
        except _TryAgain as error:
            return Completion("", error=str(error))

    def _try(self, arguments: dict[str, Any], stopped: threading.Event) -> Completion:
        openai = self._openai
        self._limiter.wait(stopped)
        if stopped.is_set():
            raise _TryAgain("cancelled")
        interface = self._client.completions if self._rendering == "plain" else self._client.chat.completions
        try:
            answer = interface.create(**arguments)
            choice = answer.choices[0]
            text = choice.text if self._rendering == "plain" else choice.message.content
            if not isinstance(text, str):
                raise TypeError(f"its text is {shorten(text)}")
        except openai.APIStatusError as error:
            return self._refused(error)
        except openai.APITimeoutError:
            raise _TryAgain(f"{self._where}: no answer in time") from None
        except openai.APIConnectionError as error:
            reason = error.__cause__ or error
            raise _TryAgain(f"{self._where}: the connection failed ({shorten(self._said(reason))})") from None
        except (openai.OpenAIError, AttributeError, IndexError, TypeError, ValueError) as error:
            # Truncated JSON, bytes that are not UTF-8, or an answer without choices.
            raise _TryAgain(f"{self._where}: the answer can't be read ({shorten(self._said(error))})") from None
        usage = answer.usage
        return Completion(
            text=_THINKING.sub("", text).encode("utf-8", "replace").decode().strip(),
            tokens=getattr(usage, "completion_tokens", 0) or 0,
            prompt_tokens=getattr(usage, "prompt_tokens", 0) or 0,
        )

    def _refused(self, error) -> Completion:
        """Handles an error status: raises `_TryAgain` or `EngineError`, or returns a refused completion."""
        status, reason = error.status_code, shorten(self._said(error), 200)
        if status in (401, 403):
            raise EngineError(
                f"{self._where}: the key is refused (status {status}); expected a valid one in the environment "
                f"variable {self._api_key_variable}; set it"
            )
        if status == 404:
            raise EngineError(
                f"{self._where}: the server doesn't know the model {self._model!r} or the address (status 404: "
                f"{reason}); expected a model that it offers; check --model and --openai.base_url"
            )
        if status in _RETRIED_STATUS or status >= 500:
            again = _TryAgain(f"{self._where}: status {status}")
            again.retry_after = _seconds(error.response.headers.get("retry-after"))
            raise again
        return Completion("", error=f"status {status}: {reason}", refused=True)

    def _said(self, error: Exception) -> str:
        """Text of an error without the API key, which a server may echo."""
        text = without_secrets(str(error))
        return text.replace(self._key, "***") if len(self._key) > 4 else text

    def _ask_server(self) -> str:
        """Detects the grammar format of the server from its list of models."""
        openai = self._openai
        try:
            owners = {
                getattr(model, "owned_by", None) for model in self._client.with_options(max_retries=2).models.list()
            }
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            self._refused(error)
        except openai.APIConnectionError as error:
            raise EngineError(
                f"{self._where}: no server answers ({shorten(self._said(error.__cause__ or error))}); expected one "
                "with OpenAI's API; start it, or check --openai.base_url"
            ) from None
        except (openai.OpenAIError, AttributeError, TypeError, ValueError):
            return "none"  # not every server lists its models
        if "llamacpp" in owners:
            return "llama.cpp"
        return "vllm" if "vllm" in owners else "none"


class _TryAgain(Exception):
    """The request failed, but another try may succeed."""

    retry_after: float | None = None


class _Limiter:
    """Spreads requests evenly over time."""

    def __init__(self, per_minute: float | None) -> None:
        self._spacing = 60.0 / per_minute if per_minute else 0.0
        self._lock, self._next = threading.Lock(), 0.0

    def wait(self, stopped: threading.Event) -> None:
        if not self._spacing:
            return
        with self._lock:
            begin = max(self._next, time.monotonic())
            self._next = begin + self._spacing
        stopped.wait(begin - time.monotonic())


def _public(url: str) -> str:
    """The address without user name and password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"


def _seconds(header: str | None) -> float | None:
    try:
        return max(0.0, float(header or ""))
    except ValueError:
        return None
