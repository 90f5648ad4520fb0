"""A web server with range requests that fails as a test says."""

import hashlib
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from support.http_server import QuietHandler, serving

Fault = Callable[[QuietHandler, bytes], None]


class RangeServer:
    """Serves the files of a folder.

    Attributes:
        requests: "METHOD /path RANGE" of each request.
        faults: Called with (handler, body) instead of answering a GET, one per request, until the list is empty; None
            answers.
        failed: Number of requests that were answered with a fault.
        match: Only requests whose path contains this get faults.
        headers: Headers of each request.
    """

    def __init__(self, folder: Path, ranges: bool = True, latency: float = 0.0) -> None:
        self.folder, self.ranges, self.latency, self.match = folder, ranges, latency, ""
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.faults: list[Fault | None] = []
        self.failed, self.lock, self.url = 0, threading.Lock(), ""

    def got(self, text: str) -> list[str]:
        """The requests that contain a text."""
        return [request for request in self.requests if text in request]

    @contextmanager
    def serve(self) -> Iterator["RangeServer"]:
        """Serves on a free port while the block runs."""
        outer = self

        class Handler(QuietHandler):
            def do_HEAD(self):
                self.answer(False)

            def do_GET(self):
                self.answer(True)

            def answer(self, body: bool) -> None:
                path = outer.folder / self.path.partition("?")[0].lstrip("/")
                span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                fault = None
                with outer.lock:
                    outer.requests.append(f"{self.command} {self.path} {span[0] if span else ''}".rstrip())
                    outer.headers.append(dict(self.headers))
                    if body and outer.faults and outer.match in self.path:
                        fault = outer.faults.pop(0)
                        outer.failed += fault is not None
                time.sleep(outer.latency)
                if not path.is_file():
                    self.reply(404, b"")
                    return
                content = path.read_bytes()
                tag = {"ETag": f'"{hashlib.sha256(content).hexdigest()[:12]}"'}
                if span and outer.ranges:
                    low, high = int(span[1]), min(int(span[2]), len(content) - 1)
                    tag["Content-Range"] = f"bytes {low}-{high}/{len(content)}"
                    content = content[low : high + 1]
                if fault is not None:
                    self.close_connection = True
                    fault(self, content)
                    return
                self.reply(206 if span and outer.ranges else 200, content, body, **tag)

            def reply(
                self, status: int, content: bytes, body: bool = True, length: int | None = None, **headers
            ) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content) if length is None else length))
                self.end_headers()
                if body:
                    self.wfile.write(content)
                    self.wfile.flush()

        with serving(Handler) as self.url:
            yield self


def status(code: int) -> Fault:
    """A fault: an answer with an error status."""
    return lambda handler, content: handler.reply(code, b"")


def cut(handler, content: bytes) -> None:
    """A fault: half of the body."""
    handler.reply(206, content[: len(content) // 2], length=len(content))


def short(handler, content: bytes) -> None:
    """A fault: a complete answer with half of the bytes."""
    handler.reply(206, content[: len(content) // 2])


def dropped(handler, content: bytes) -> None:
    """A fault: the connection is reset before an answer."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def silent(handler, content: bytes) -> None:
    """A fault: no answer for a while."""
    time.sleep(2.0)
