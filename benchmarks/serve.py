"""Load test of `amp serve`: concurrent clients, latencies, errors, memory, and a restart after `kill -9`.

    python -m benchmarks.serve --adapter runs/demo/action-aware/stage2/adapter.safetensors --index runs/demo/index \
        --photos data/demo/scenes/images

The server is a separate process. Each client sends its next request when the last one is answered: searches, re-ranking
of images in the request, and thumbnails. Then the server is killed under the same load and started again.
"""

import base64
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException  # noqa: TID251, to this machine
from itertools import cycle
from pathlib import Path

from amp.errors import exit_on_error, require

with exit_on_error():
    import numpy as np
    from jsonargparse import auto_cli

    from amp.errors import AmpError
    from amp.files import write_atomically

    psutil = require("psutil", "this benchmark")

QUERIES = [
    "a dog jumps over a fence", "two men play football", "a girl throws a ball to a dog", "a man rides a bicycle",
    "a woman pushes a cart", "children run on the beach", "a cat chases a mouse", "a robot carries a king",
    "a boy climbs a tree", "a bear feeds a rabbit with a spoon",
]  # fmt: skip
JSON = {"Content-Type": "application/json"}


@dataclass
class Answers:
    """What the clients saw; each entry has start, seconds, kind and outcome of one request."""

    entries: list[tuple[float, float, str, str]] = field(default_factory=list)

    def table(self) -> dict:
        """Requests, errors, and latency of the answered ones, by kind."""
        found = {}
        for kind in sorted({entry[2] for entry in self.entries}):
            of_kind = [entry for entry in self.entries if entry[2] == kind]
            good = [entry[1] for entry in of_kind if entry[3] == "200"]
            middle, most = np.percentile(good, (50, 95)) if good else (np.nan, np.nan)
            found[kind] = {
                "requests": len(of_kind),
                "errors": dict(Counter(entry[3] for entry in of_kind if entry[3] != "200")),
                "median_ms": round(1e3 * float(middle), 1),
                "p95_ms": round(1e3 * float(most), 1),
            }
        return found


class Client(threading.Thread):
    """Sends requests until it is stopped.

    Args:
        number: Number of the client, which determines its requests.
        port: Port of the server.
        images: Image files to re-rank, as data URIs.
        photos: Number of photos in the index.
        answers: Where to add the answers.
        stop: Ends the client.
    """

    def __init__(self, number: int, port: int, images: list[str], photos: int, answers: Answers, stop: threading.Event):
        super().__init__(daemon=True)
        self.number, self.port, self.images, self.photos = number, port, images, photos
        self.answers, self.stop = answers, stop

    def run(self) -> None:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        for turn in cycle(range(10)):
            if self.stop.is_set():
                break
            kind, method, path, body = self.request(turn)
            begin = time.time()
            try:
                connection.request(method, path, None if body is None else json.dumps(body), JSON)
                reply = connection.getresponse()
                reply.read()
                outcome = str(reply.status)
            except (OSError, HTTPException) as error:
                outcome = type(error).__name__
                connection.close()
            self.answers.entries.append((begin, time.time() - begin, kind, outcome))
            if outcome != "200":
                time.sleep(0.1)  # as a client that tries again
        connection.close()

    def request(self, turn: int):
        """Kind, method, path and body of the next request: 6 searches, 2 re-rankings and 2 thumbnails in turn."""
        query = QUERIES[(self.number + turn) % len(QUERIES)]
        if turn in (3, 8):
            return "photos", "GET", f"/v1/photos/{(37 * self.number + turn) % self.photos}?size=240", None
        if turn in (4, 9):
            return "rerank", "POST", "/v1/rerank", {"query": query, "documents": self.images}
        return "search", "POST", "/v1/search", {"query": query, "count": 20}


class Server:
    """A process of `amp serve`.

    Args:
        options: Options of the command.
        port: Port to serve.
    """

    def __init__(self, options: list[str], port: int):
        self.command = [sys.executable, "-m", "amp", "serve", *options, "--port", str(port)]
        self.port = port
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)

    def wait(self, seconds: float = 300) -> dict:
        """Waits until the server answers. Returns its state."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise AmpError(f"amp serve ended with status {self.process.returncode}; see its output above")
            try:
                connection = HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/health")
                return json.loads(connection.getresponse().read())
            except OSError:
                time.sleep(0.1)
        raise AmpError(f"amp serve doesn't answer after {seconds:g} s, expected an answer; see its output above")

    def post(self, path: str, body: dict) -> dict:
        """Sends a request. Returns the answer."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("POST", path, json.dumps(body), JSON)
        return json.loads(connection.getresponse().read())

    def memory(self) -> float:
        """Resident memory in MB."""
        return psutil.Process(self.process.pid).memory_info().rss / 1e6

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def main(
    adapter: str,
    index: str,
    photos: str | None = None,
    clients: int = 50,
    seconds: float = 300,
    restart_seconds: float = 60,
    documents: int = 5,
    out: Path = Path("runs/serve.json"),
) -> None:
    """Runs the load test.

    Args:
        adapter, index, photos: Options of `amp serve`.
        clients: Number of clients.
        seconds: Duration of the load.
        restart_seconds: Duration of a second load, in which the server is killed and started again, without the seconds
            that it is down; 0 skips this.
        documents: Number of images in a re-ranking request.
        out: File of the figures.
    """
    options = ["--adapter", adapter, "--index", index, *(["--photos", photos] if photos else [])]
    server = Server(options, free_port())
    try:
        state = server.wait()
        images = [image_of(server.port, number) for number in range(documents)]

        def load(*events: tuple[float, Callable[[], None]]) -> Answers:
            """Runs the clients. Each event has the seconds to wait before it."""
            answers, stop = Answers(), threading.Event()
            threads = [Client(n, server.port, images, state["photos"], answers, stop) for n in range(clients)]
            for thread in threads:
                thread.start()
            for wait, event in events:
                time.sleep(wait)
                event()
            stop.set()
            for thread in threads:
                thread.join()
            return answers

        memory = [server.memory()]
        answers = load(*[(seconds / 4, lambda: memory.append(server.memory()))] * 4)
        found = {
            "clients": clients,
            "seconds": seconds,
            "cores": os.cpu_count(),
            "photos": state["photos"],
            "requests_per_second": round(len(answers.entries) / seconds, 1),
            "load": answers.table(),
            "memory_MB": [round(x) for x in memory],
        }
        if restart_seconds:
            found["restart"] = restart(server, load, restart_seconds)
    finally:
        server.kill()
    write_atomically(out, (json.dumps(found, indent=1) + "\n").encode())
    print(json.dumps(found, indent=1))


def restart(server: Server, load, seconds: float) -> dict:
    """Kills the server under load and starts it again at once."""
    times = {}

    def kill_and_start() -> None:
        times["killed"] = time.time()
        server.kill()
        server.start()
        server.wait()
        times["back"] = time.time()

    entries = load((0.2 * seconds, kill_and_start), (0.8 * seconds, lambda: None)).entries
    wrong = [entry for entry in entries if entry[3] != "200"]
    return {
        "seconds": seconds,
        "seconds_down": round(times["back"] - times["killed"], 1),
        # A request that was under way when the server was killed began before.
        "errors_of_requests_before": dict(Counter(e[3] for e in wrong if e[0] < times["killed"])),
        "errors_while_down": dict(Counter(e[3] for e in wrong if times["killed"] <= e[0] < times["back"])),
        "errors_after": dict(Counter(e[3] for e in wrong if e[0] >= times["back"])),
        "answered_after": sum(e[3] == "200" and e[0] >= times["back"] for e in entries),
    }


def image_of(port: int, number: int) -> str:
    """A photo of the index, as an image of the size that a client would send."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", f"/v1/photos/{number}?size=480")
    return "data:image/jpeg;base64," + base64.b64encode(connection.getresponse().read()).decode()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


if __name__ == "__main__":
    with exit_on_error():
        auto_cli(main, as_positional=False)
