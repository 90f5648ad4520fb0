"""A server with OpenAI's chat API whose replies are a pure function of the request.

Some replies are good, some are bad, and some captions never get a good one. The server replaces a language model that
tests can't load. Everything around it is real: engine, ladder, cache and merge.
"""

import hashlib
import json
import re
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from amp.generation.words import slot_words


def number_of(*content) -> int:
    """A number that depends only on the arguments."""
    return int.from_bytes(hashlib.sha256(json.dumps(content).encode()).digest()[:4], "big")


def reply_to(request: dict) -> str:
    """The reply to a request, by the caption's hash: 4 in 10 are bad at temperature 0, 1 in 10 at any temperature."""
    turn = request["messages"][-1]["content"]
    caption, *triplets = turn.removeprefix("Caption: ").split("\n")
    draw = number_of(caption, bool(triplets)) % 10
    if draw == 0 or (draw < 4 and not request.get("temperature")):
        return "I am sorry, but this isn't a reply of any use to anyone."
    words = slot_words(caption)
    if not triplets:
        first = f"action: {words[0]} | {words[-1]} | -"
        return first if draw == 4 else f"{first}\nattribute: {words[0]} | is | {words[len(words) // 2]}"
    salt = request.get("seed") if request.get("temperature") else 0
    return "\n".join(
        f"{i}. It looks like number {number_of(turn, i, salt) % 1000} to me." for i in range(1, len(triplets) + 1)
    )


class ScriptedModel:
    """State and settings of the running server.

    Attributes:
        url: Value for ``--openai.base_url``.
        asked: Number of requests at temperature 0, by the text of the last turn.
        delay: Seconds before each response.
        fails_on: Requests whose last turn contains this text get status 500.
    """

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/v1"
        self.asked: Counter[str] = Counter()
        self.delay = 0.0
        self.fails_on = ""
        self.lock = threading.Lock()


@contextmanager
def scripted_model():
    """Serves on a free port while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            found = re.fullmatch(r"/v1/models(/.*)?", self.path) is not None
            self._send(200 if found else 404, {"object": "list", "data": [{"id": "scripted", "object": "model"}]})

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with model.lock:
                if not request.get("temperature"):
                    model.asked[request["messages"][-1]["content"]] += 1
            time.sleep(model.delay)
            if model.fails_on and model.fails_on in request["messages"][-1]["content"]:
                self._send(500, {"error": {"message": "out of order"}})
                return
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": reply_to(request)},
                "finish_reason": "stop",
            }
            usage = {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16}
            self._send(
                200,
                {
                    "id": "1",
                    "object": "chat.completion",
                    "created": 0,
                    "model": "scripted",
                    "choices": [choice],
                    "usage": usage,
                },
            )

        def _send(self, status: int, content: dict) -> None:
            body = json.dumps(content).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except ConnectionError:  # the client was killed
                self.close_connection = True

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):  # the client was killed
            pass

    server = Server(("127.0.0.1", 0), Handler)
    model = ScriptedModel(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield model
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
