"""Protects the server: checks hosts, sizes and times, and refuses requests when too many wait."""

import asyncio
import json
from collections.abc import Collection

from amp.serve.limits import ANSWER_SECONDS, BODIES, BODY_SECONDS, Limits
from amp.serve.refusal import Refusal, answer

FREE = ("/", "/health", "/metrics")
"""Paths that answer also when too many requests wait."""
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}
"""Added to each answer, unless it has its own."""


class Unread(Exception):
    """The client doesn't read its answer."""


class Guard:
    """ASGI middleware. It reads the whole body before the application sees the request.

    Args:
        app: The application.
        limits: Sizes, times and number of requests.
        hosts: Accepted values of the header Host, without port; None accepts all. The check keeps a web page of
            another host from reading answers by giving its own name the address of this server (DNS rebinding).
    """

    def __init__(self, app, limits: Limits, hosts: Collection[str] | None):
        self.app, self.limits, self.hosts = app, limits, hosts
        self.requests = self.bytes = 0  # handled at the moment

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        free = scope["path"] in FREE
        held = _Held(self)
        self.requests += not free
        try:
            headers = dict(scope["headers"])
            self._check_host(headers)
            if not free and self.requests > self.limits.queue:
                raise Refusal(503, f"{self.limits.queue} requests are waiting; try again later", retry_after=1)
            body = await self._body(headers, receive, held)
            await self.app(scope, _replayed(body, receive), _careful(send))
        except Refusal as refusal:
            await _refuse(_careful(send), refusal)
        except Unread:
            pass  # uvicorn closes the connection
        finally:
            self.requests -= not free
            held.release()

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        name = headers.get(b"host", b"").decode("latin-1").lower()
        name = name.partition("]")[0] + "]" if name.startswith("[") else name.partition(":")[0]
        if self.hosts is not None and name not in self.hosts:
            raise Refusal(
                421, f"the host is {name!r:.80}, expected {', '.join(sorted(self.hosts))}; serve others with --host"
            )

    async def _body(self, headers: dict[bytes, bytes], receive, held: "_Held") -> bytes:
        limit = self.limits.body
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal(400, "the body is incomplete")
                    part = message.get("body", b"")
                    parts.append(part)
                    size += len(part)
                    if size > limit:
                        raise _too_large(limit)
                    held.add(len(part))
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise Refusal(408, f"the body has not arrived within {BODY_SECONDS} s; send it faster") from None


class _Held:
    """Counts the bytes of a body that is in memory."""

    def __init__(self, guard: Guard):
        self.guard, self.bytes = guard, 0

    def add(self, count: int) -> None:
        """Raises `Refusal` if all bodies together become too large."""
        self.bytes += count
        self.guard.bytes += count
        if self.guard.bytes > BODIES * self.guard.limits.body:
            raise Refusal(503, "too many large requests at the same time; try again later", retry_after=1)

    def release(self) -> None:
        self.guard.bytes -= self.bytes


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"the body is larger than {limit:,} bytes; send less, or start the server with --max_mb")


def _replayed(body: bytes, receive):
    """A `receive` that returns the body first."""
    given = False

    async def replay():
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _careful(send):
    """A `send` that adds `HEADERS`, and gives up when the client doesn't read."""

    async def sending(message):
        if message["type"] == "http.response.start":
            given = {name for name, _ in message["headers"]}
            added = [(name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in given]
            message = {**message, "headers": [*message["headers"], *added]}
        try:
            await asyncio.wait_for(send(message), ANSWER_SECONDS)
        except TimeoutError:
            raise Unread from None

    return sending


async def _refuse(send, refusal: Refusal) -> None:
    body = json.dumps(answer(refusal.status, str(refusal))).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"connection", b"close"))  # the rest of a body that was not read
    if refusal.retry_after is not None:
        headers.append((b"retry-after", str(refusal.retry_after).encode()))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
