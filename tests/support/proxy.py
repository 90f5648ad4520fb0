"""A TCP proxy that adds latency and faults between a client and a web server. One request per connection."""

import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

KINDS = ("reset", "503", "early end")


class Proxy:
    """Forwards connections to a server.

    Responses get `Connection: close`, so that each request has a connection and at most one fault.

    Args:
        port: Port of the server.
        latency: Seconds before each response.
        rate: Fraction of the GET requests that get a fault.
        kinds: Faults to choose from: `reset` resets the connection in the middle of the body, `503` answers with this
            status, `early end` closes it in the middle of the body, `drop` resets it before the response.
        seed: Of the choice.
        path: Only requests whose first line contains this get faults.

    Attributes:
        url: Of the proxy.
        injected: Number of faults by kind.
        requests: Number of requests.
    """

    def __init__(
        self, port: int, latency: float = 0.0, rate: float = 0.0, kinds=KINDS, seed: int = 0, path: str = "train-"
    ) -> None:
        self.port, self.latency, self.rate, self.kinds, self.path = port, latency, rate, kinds, path
        self.random, self.lock = random.Random(seed), threading.Lock()
        self.injected: Counter[str] = Counter()
        self.in_a_row: Counter[bytes] = Counter()
        self.requests, self.url = 0, ""

    @contextmanager
    def serve(self) -> Iterator["Proxy"]:
        """Serves on a free port while the block runs."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        try:
            yield self
        finally:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            request = _head(client)
            if not request:
                return
            fault = self._fault(request)
            time.sleep(self.latency)
            if fault == "503":
                client.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            if fault == "drop":
                _reset(client)
                return
            with socket.create_connection(("127.0.0.1", self.port)) as server:
                server.sendall(_closing(request))
                head = _closing(_head(server))
                size = re.search(rb"(?i)content-length: *(\d+)", head)
                left = int(size[1]) if size and not request.startswith(b"HEAD") else 0
                if fault is not None:
                    left //= 2
                client.sendall(head)
                while left > 0 and (block := server.recv(min(left, 1 << 18))):
                    client.sendall(block)
                    left -= len(block)
            if fault == "reset":
                time.sleep(0.01)
                _reset(client)

    def _fault(self, request: bytes) -> str | None:
        first = request.partition(b"\r\n")[0].decode()
        with self.lock:
            self.requests += 1
            if not first.startswith("GET") or self.path not in first or self.random.random() >= self.rate:
                return None
            what = b"\r\n".join(line for line in request.split(b"\r\n") if line.lower().startswith((b"get", b"range")))
            if self.in_a_row[what] == 5:  # an object that always fails ends the run
                self.in_a_row[what] = 0
                return None
            self.in_a_row[what] += 1
            fault = self.random.choice(self.kinds)
            self.injected[fault] += 1
            return fault


def _head(stream: socket.socket) -> bytes:
    """The bytes up to the end of the header, read one by one: what follows stays in the socket."""
    stream.settimeout(30)
    content = b""
    while not content.endswith(b"\r\n\r\n"):
        peeked = stream.recv(8192, socket.MSG_PEEK)
        if not peeked:
            return b""
        end = (content + peeked).find(b"\r\n\r\n")
        take = len(peeked) if end < 0 else end + 4 - len(content)
        content += stream.recv(take)
    return content


def _closing(head: bytes) -> bytes:
    head = re.sub(rb"(?i)\r\nconnection: [^\r]*", b"", head)
    return head[:-2] + b"Connection: close\r\n\r\n"


def _reset(stream: socket.socket) -> None:
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.close()
