"""Retries of requests that may succeed later, and the count of them for the log."""

from __future__ import annotations

import errno
import multiprocessing
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

from amp.data.remote.location import Location
from amp.errors import AmpError, printable, without_secrets

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds
TRIES, FIRST_TRIES = 9, 4  # about two minutes; a first contact, whose URL may be wrong, a few seconds
LOG_SECONDS = 10.0
KINDS = ("dropped connection", "timeout", "server error", "body that ended early")
_RETRIED_STATUS = (408, 425, 429)
Result = TypeVar("Result")


class ShortBody(Exception):
    """A response had fewer bytes than requested."""


class Counts:
    """Number of retries by kind, shared with the worker processes that are forked from this one."""

    def __init__(self) -> None:
        self._numbers: Any = multiprocessing.Array("q", len(KINDS))
        self._said: Any = multiprocessing.Array("d", 2)  # time of the last line, and the number that it contained

    def add(self, kind: str, location: Location, wait: float) -> None:
        """Counts a retry. Prints a line at most every `LOG_SECONDS`."""
        with self._numbers.get_lock():
            self._numbers[KINDS.index(kind)] += 1
            now = time.monotonic()
            if now - self._said[0] >= LOG_SECONDS or not self._said[1]:
                self._say(f"; the latest: {location} again in {wait:.1f} s")

    @property
    def by_kind(self) -> dict[str, int]:
        """Number of retries so far by kind, without zeros."""
        return {kind: number for kind, number in zip(KINDS, self._numbers[:], strict=True) if number}

    def report(self) -> None:
        """Prints the total, unless the last line contained it."""
        with self._numbers.get_lock():
            if sum(self._numbers[:]) != self._said[1]:
                self._say("")

    def _say(self, latest: str) -> None:
        total = sum(self._numbers[:])
        parts = ", ".join(f"{number} x {kind}" for kind, number in self.by_kind.items())
        self._said[0], self._said[1] = time.monotonic(), total
        with suppress(OSError):
            noun = "retry" if total == 1 else "retries"
            print(printable(f"{total} {noun} so far: {parts}{latest}"), file=sys.stderr, flush=True)


counts = Counts()


def retrying(location: Location, request: Callable[[], Result], tries: int = TRIES) -> Result:
    """Calls `request` again after errors that may pass, with exponential back-off and jitter.

    Raises:
        AmpError: The object doesn't exist, may not be read, or can't be read after `tries` attempts.
    """
    for attempt in range(1, tries + 1):
        try:
            return request()
        except AmpError:
            raise
        except Exception as error:
            kind, reason = _kind(error), _reason(error)
            if kind is None:
                raise AmpError(f"{location}: {_refusal(error, reason)}") from None
            if attempt == tries:
                raise AmpError(
                    f"{location}: can't be read after {tries} attempts ({reason}); expected an answer; check the "
                    "network and the server, then run the same command again"
                ) from None
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)) * (0.5 + random.random())
            counts.add(kind, location, wait)
            time.sleep(wait)
    raise AssertionError


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def status_of(error: BaseException) -> int | None:
    """The HTTP status in an exception of aiohttp, botocore, gcsfs or huggingface_hub; None without one."""
    for part in _chain(error):
        response = getattr(part, "response", None)
        if isinstance(response, dict):  # botocore
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            found = getattr(part, "status", None) or getattr(response, "status_code", None)
            if type(part).__name__ == "HttpError":  # gcsfs; in aiohttp, `code` isn't what the server answered
                found = getattr(part, "code", None)
        if type(part) is OSError and str(part).startswith("Forbidden: "):  # gcsfs
            return 403
        with suppress(TypeError, ValueError):
            if 300 <= int(found or 0) < 600:
                return int(found)
    return None


def _kind(error: BaseException) -> str | None:
    """The kind of a passing error; None for an error that stays."""
    names = {kind.__name__ for part in _chain(error) for kind in type(part).__mro__}
    status = status_of(error)
    if status is not None and status >= 300:
        return "server error" if status >= 500 or status in _RETRIED_STATUS else None
    if isinstance(error, ShortBody) or names & {"ClientPayloadError", "IncompleteRead", "ResponseStreamingError"}:
        return "body that ended early"
    if names & {"NoCredentialsError", "PartialCredentialsError", "InvalidURL", "ParamValidationError"}:
        return None
    if isinstance(error, TimeoutError) or names & {"TimeoutError", "ReadTimeoutError", "ConnectTimeoutError"}:
        return "timeout"
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, ValueError, TypeError)):
        return None
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE):
        return None
    if isinstance(error, (OSError, EOFError)) or names & {"ClientError", "HTTPClientError", "HTTPError"}:
        return "dropped connection"
    return None


def _reason(error: BaseException) -> str:
    if (status := status_of(error)) is not None:
        return f"HTTP status {status}"
    text = without_secrets(re.sub(r"\s+", " ", str(error)))[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _refusal(error: BaseException, reason: str) -> str:
    status = status_of(error)
    if status in (401, 403) or isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return f"access is refused ({reason}); expected a readable object; set the credentials (docs/data.md)"
    if status in (404, 410) or isinstance(error, FileNotFoundError):
        return (
            f"no such object ({reason}); expected shards written by amp make_shards; check the URL, or copy them there"
        )
    if status in (412, 416):
        return f"the object was changed while in use ({reason}); copy the shards there again, then run again"
    return f"can't be read ({reason}); expected shards written by amp make_shards; check the URL"
