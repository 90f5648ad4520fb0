"""A server with OpenAI's chat API that answers, fails or hangs by a script, and an engine that queries it."""

import json
import socket
import threading
import time
from contextlib import contextmanager

from support.http_server import QuietHandler, serving


def engine_for(url: str, **options):
    """The openai engine for a server; it retries without waiting."""
    from amp.generation.engines.openai_engine import OpenAIEngine

    return OpenAIEngine(
        **{"base_url": url, "model": "m", "constrained": "none", "first_wait": 0.01, "timeout": 5.0, **options}
    )


def good(text: str = "none") -> bytes:
    """The body of a valid response."""
    message = {"role": "assistant", "content": text}
    answer = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }
    return json.dumps(answer).encode()


class Faulty:
    """Answers the n-th request by the n-th step, and further requests by the last. A step is bytes or a function."""

    def __init__(self, *steps) -> None:
        self.steps, self.requests, self.running, self.most = steps, [], 0, 0
        self.times: list[float] = []
        self.lock = threading.Lock()
        self.models = b'{"object": "list", "data": []}'

    @contextmanager
    def serve(self):
        """Serves on a free port while the block runs; yields the URL."""
        faulty = self

        class Handler(QuietHandler):
            def do_GET(self):
                self.reply(faulty.models)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with faulty.lock:
                    step = faulty.steps[min(len(faulty.requests), len(faulty.steps) - 1)]
                    faulty.requests.append(body)
                    faulty.times.append(time.monotonic())
                    faulty.running += 1
                    faulty.most = max(faulty.most, faulty.running)
                try:
                    step(self) if callable(step) else self.reply(step)
                except ConnectionError:
                    self.close_connection = True
                finally:
                    with faulty.lock:
                        faulty.running -= 1

            def reply(self, body: bytes, status: int = 200, length: int | None = None, **headers) -> None:
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                self.wfile.write(body)
                self.wfile.flush()

        with serving(Handler) as url:
            yield f"{url}/v1"


def status(code: int, **headers):
    """A step that answers with an HTTP error."""
    return lambda handler: handler.reply(b'{"error": {"message": "because"}}', code, **headers)


def cut(handler):
    """A step that sends half of a response, then closes the connection."""
    handler.reply(good()[:40], length=len(good()))
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def late(handler):
    """A step that answers after one second."""
    time.sleep(1.0)
    handler.reply(good())
