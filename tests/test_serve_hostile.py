"""Hostile requests to `amp serve`: each is refused in words, and the server answers the next request."""

import asyncio
import base64
import http.client
import http.server
import io
import json
import logging
import os
import socket
import struct
import threading
import time
import zlib

import pytest
from support.drawn_data import draw
from support.serving import QUERY, data_uri, make_app, make_service, served

from amp.serve import fetch as fetching
from amp.serve import guard, server
from amp.serve.fetch import FetchError, fetch, host_of, is_host

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def service(clip_folder, tmp_path_factory):
    return make_service(clip_folder, tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def client(service):
    with TestClient(make_app(service, body=1 << 20)) as client:
        yield client


def refused(reply, status, said):
    assert reply.status_code == status, reply.text
    assert said in reply.json()["error"]["message"] and "Traceback" not in reply.text


def reason(client, document):
    """Why a document is skipped."""
    found = client.post("/v1/rerank", json={"query": QUERY, "documents": [document]}).json()
    assert found["results"] == []
    return found["skipped"][0]["reason"]


# -- sizes ----------------------------------------------------------------------------------------------------------


def test_huge_bodies(client):
    reply = client.post("/v1/rerank", content=b" " * (1 << 20) + b"{}", headers=JSON)
    refused(reply, 413, "the body is larger than 1,048,576 bytes; send less, or start the server with --max_mb")
    parts = (b" " * 100_000 for _ in range(11))  # without Content-Length
    refused(client.post("/v1/rerank", content=parts, headers=JSON), 413, "the body is larger than 1,048,576 bytes")


def png_of_zeros(width, height):
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width // 8 + 1) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("size", "said"),
    [((8000, 8000), "8000 x 8000 pixels, expected at most 50,000,000; resize it"), ((40_000, 40_000), "decompression")],
)
def test_decompression_bombs_are_not_decoded(client, size, said):
    bomb = png_of_zeros(*size)
    assert len(bomb) < 300_000
    assert said in reason(client, {"image": base64.b64encode(bomb).decode()})
    reply = client.post("/v1/search", json={"image": "data:image/png;base64," + base64.b64encode(bomb).decode()})
    refused(reply, 400, said)


def test_too_much_knowledge(client):
    knowledge = {"triplets": [{"subject": "a", "action": "b"}] * 33, "states": [""] * 33}
    reply = client.post("/v1/search", json={"query": "a", "knowledge": knowledge})
    refused(reply, 400, "knowledge.triplets is ")
    knowledge = {"triplets": [{"subject": "a" * 501, "action": "b"}], "states": [""]}
    reply = client.post("/v1/search", json={"query": "a", "knowledge": knowledge})
    refused(reply, 400, "knowledge.triplets.0.subject is ")


# -- paths, files and JSON ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../index/index.json",
        "/etc/passwd",
        "below/../photo 01.png",
        "./photo 01.png",
        "photo 01.png\0",
        "file:///etc/passwd",
        "",
        "below",
        "below/",
        "~",
        "secret.png",
    ],
)
def test_only_names_of_the_index_are_paths(service, client, name):
    secret = service.index.root / "secret.png"
    draw(9).save(secret)  # not in the index
    try:
        assert "is neither a photo of the index nor base64 of an image" in reason(client, name)
        query = {"query": {"image": name}, "documents": ["a"]}
        refused(client.post("/v1/rerank", json=query), 400, "is neither a photo of the index")
    finally:
        secret.unlink()


@pytest.mark.parametrize("path", ["/v1/photos/../../etc/passwd", "/v1/photos/..%2f..%2fetc%2fpasswd", "/%2e%2e/x"])
def test_addresses_outside(client, path):
    assert client.get(path).status_code in (400, 404)


@pytest.mark.parametrize(
    ("content", "headers", "said"),
    [
        (b"", JSON, "the body is None, expected a JSON object"),
        (b"{", JSON, "the body is not JSON (Expecting property name"),
        (b"\xff\xfe{}", JSON, "the body is not JSON"),
        (b"[]", JSON, "the body is [], expected a JSON object"),
        (b"[" * 100_000, JSON, "error parsing the body"),
        (b'{"query": "a", "documents": [' + b"9" * 5000 + b"]}", JSON, "error parsing the body"),
        (b'{"query": "a", "documents": [1e999]}', JSON, "documents[0] is inf, expected a text"),
        (b'{"query": "a", "documents": ["b"]}', {"Content-Type": "text/plain"}, "with Content-Type: application/json"),
        (b'{"query": "a", "documents": ["b"]}', {}, "with Content-Type: application/json"),
    ],
    ids=["empty", "cut", "no text", "list", "deep", "digits", "infinite", "plain text", "no type"],
)
def test_bad_json(client, content, headers, said):
    refused(client.post("/v1/rerank", content=content, headers=headers), 400, said)


def test_an_error_of_the_server_has_no_traceback_in_the_answer(service, caplog, monkeypatch):
    monkeypatch.setattr(service.reranker, "rank", lambda *_, **__: 1 / 0)
    with TestClient(make_app(service), raise_server_exceptions=False) as client, caplog.at_level(logging.ERROR):
        reply = client.post("/v1/rerank", json={"query": "a", "documents": ["photo 01.png"]})
        refused(reply, 500, "the server has an error; its log says more")
        assert "division" not in reply.text and "ZeroDivisionError" in caplog.text


# -- hosts ----------------------------------------------------------------------------------------------------------


def test_other_names_of_this_machine_are_refused(service):
    """A web page whose name is rebound to this machine sends its own name."""
    with TestClient(make_app(service, names=server.LOOPBACK)) as client:
        for host in ("localhost:8000", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST"):
            assert client.get("/health", headers={"Host": host}).status_code == 200
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "", "[::2]:8000"):
            refused(client.get("/health", headers={"Host": host}), 421, "expected 127.0.0.1, [::1], localhost; serve")
    with TestClient(make_app(service)) as client:
        assert client.get("/health", headers={"Host": "photos.example"}).status_code == 200


def test_the_names_that_are_accepted():
    for host, expected in (("127.0.0.1", server.LOOPBACK), ("localhost", server.LOOPBACK), ("0.0.0.0", None)):  # noqa: S104
        with server.bound_socket(host, 0) as found:
            assert server.accepted_names(found) == expected
            assert server.address_of(found).startswith("http://") and server.address_of(found).endswith("/")


# -- too many, too slow ---------------------------------------------------------------------------------------------


def post(port, body, path="/v1/rerank"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, json.dumps(body), JSON)
    reply = connection.getresponse()
    return reply.status, json.loads(reply.read()), reply.headers


class Stopped:
    """Holds the model until it is released."""

    def __init__(self, service, monkeypatch):
        self.entered, self.release, rank = threading.Semaphore(0), threading.Event(), service.reranker.rank
        self.threads = set()

        def waiting(*arguments, **options):
            self.threads.add(threading.get_ident())
            self.entered.release()
            assert self.release.wait(60)
            return rank(*arguments, **options)

        monkeypatch.setattr(service.reranker, "rank", waiting)


BODY = {"query": QUERY, "documents": ["photo 01.png"]}


def test_a_full_queue_refuses_further_requests(service, monkeypatch):
    stopped = Stopped(service, monkeypatch)
    with served(make_app(service, queue=3)) as port:
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(post(port, BODY))) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert stopped.entered.acquire(timeout=30)
        deadline = time.monotonic() + 30
        while "amp_requests_running 4.0" not in get(port, "/metrics"):  # with this request
            assert time.monotonic() < deadline
            time.sleep(0.02)
        status, body, headers = post(port, BODY)
        assert status == 503 and headers["Retry-After"] == "1"
        assert body["error"]["message"] == "3 requests are waiting; try again later"
        assert json.loads(get(port, "/health"))["status"] == "ok"
        stopped.release.set()
        for thread in threads:
            thread.join()
        assert [status for status, _, _ in answers] == [200] * 3
        assert len(stopped.threads) == 1  # all in the thread of the model
        assert post(port, BODY)[0] == 200


def get(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    return connection.getresponse().read().decode()


def test_a_request_that_takes_too_long(service, monkeypatch):
    stopped = Stopped(service, monkeypatch)
    with served(make_app(service, seconds=0.3)) as port:
        for _ in range(2):  # the second one is dropped before it begins
            status, body, _ = post(port, BODY)
            assert status == 504
            assert body["error"]["message"] == "no answer within 0.3 s; try again later, or send less"
        stopped.release.set()
        time.sleep(0.2)
        assert post(port, BODY)[0] == 200 and stopped.entered._value == 2


def received(sock):
    """Everything until the server closes the connection."""
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts)


def test_slow_clients(service, monkeypatch):
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.5)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.5)
    with served(make_app(service)) as port:
        address = ("127.0.0.1", port)
        with socket.create_connection(address, 20) as sock:  # nothing at all
            assert received(sock) == b""
        with socket.create_connection(address, 20) as sock:  # a header that never ends
            sock.sendall(b"POST /v1/rerank HTTP/1.1\r\nHost: localhost\r\n")
            begin = time.monotonic()
            with pytest.raises(OSError):
                while time.monotonic() < begin + 10:
                    sock.sendall(b"X-A: b\r\n")
                    time.sleep(0.1)
        with socket.create_connection(address, 20) as sock:  # a body that never ends
            sock.sendall(b"POST /v1/rerank HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
            reply = received(sock)
            assert reply.startswith(b"HTTP/1.1 408 ") and b"the body has not arrived within 0.5 s" in reply
        with socket.create_connection(address, 20) as sock:  # a client that goes away
            sock.sendall(b"POST /v1/rerank HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
        with socket.create_connection(address, 20) as sock:  # no HTTP
            sock.sendall(b"\x16\x03\x01\x02\0\r\n\r\n")
            assert received(sock).startswith(b"HTTP/1.1 400 ")
        assert post(port, BODY)[0] == 200


def test_a_client_that_does_not_read(service, monkeypatch):
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.5)
    monkeypatch.setattr(guard, "ANSWER_SECONDS", 0.5)
    large = service.index.root / "photo 01.png"
    before, stamp = large.read_bytes(), large.stat()
    number = service.index.names.index("photo 01.png")
    monkeypatch.setattr(service.index, "check_there", lambda number: None)
    lost, connection_lost = [], server.Protocol.connection_lost

    def losing(protocol, error):
        lost.append(protocol.client)
        connection_lost(protocol, error)

    monkeypatch.setattr(server.Protocol, "connection_lost", losing)
    try:
        large.write_bytes(bytes(64 << 20))
        with served(make_app(service)) as port, socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", port))
            sock.sendall(f"GET /v1/photos/{number} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            deadline = time.monotonic() + 30
            while 'path="/v1/photos/{number}",status="200"} 1.0' not in get(port, "/metrics"):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            while sock.getsockname() not in lost:  # although the client has not read what was sent
                assert time.monotonic() < deadline
                time.sleep(0.1)
    finally:
        large.write_bytes(before)
        os.utime(large, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def test_many_large_bodies_at_the_same_time(service, monkeypatch):
    monkeypatch.setattr(guard, "BODIES", 1)
    with served(make_app(service, body=100_000)) as port:
        header = b"POST /v1/rerank HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90000\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), 20) as first:
            first.sendall(header + bytes(80_000))
            time.sleep(0.3)
            with socket.create_connection(("127.0.0.1", port), 20) as second:
                second.sendall(header + bytes(80_000))
                reply = received(second)
                assert reply.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1" in reply.lower()
                assert b"too many large requests at the same time" in reply
        deadline = time.monotonic() + 20
        while (status := post(port, BODY)[0]) != 200 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert status == 200  # the bytes of both are free again


def test_the_guard_leaves_other_protocols_to_the_application():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    from amp.serve.limits import Limits

    asyncio.run(guard.Guard(app, Limits(), None)({"type": "lifespan"}, None, None))
    assert seen == ["lifespan"]


# -- images of other hosts ------------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by the path of a request."""

    def do_GET(self):
        port = self.server.server_address[1]
        targets = {
            "/same": "/image.png",
            "/other": f"http://localhost:{port}/image.png",
            "/loop": "/loop",
            "/metadata": "http://169.254.169.254/latest/meta-data/",
            "/file": "file:///etc/passwd",
        }
        if self.path in targets:
            self.send_response(302)
            self.send_header("Location", targets[self.path])
            self.end_headers()
        elif self.path == "/image.png":
            buffer = io.BytesIO()
            draw(3).save(buffer, "png")
            self.answer(buffer.getvalue())
        elif self.path == "/page":
            self.answer(b"<html>" * 100)
        elif self.path == "/large":
            self.answer(bytes(200_000))
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(bytes(65536))
            except OSError:
                pass
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(100):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.1)
            except OSError:
                pass
        else:
            self.send_error(404)

    def answer(self, content):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def web():
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{found.server_address[1]}"
    found.shutdown()


def test_images_of_an_allowed_host_are_ranked(service, web):
    with TestClient(make_app(service, allowed=[web])) as client:
        documents = [f"http://{web}/image.png", {"image_url": {"url": f"http://{web}/same"}}, data_uri(draw(3))]
        documents += [f"http://{web}/page", "http://example.org/a.png", f"http://{web}/metadata"]
        found = client.post("/v1/rerank", json={"query": QUERY, "documents": documents}).json()
        scores = {x["index"]: x["relevance_score"] for x in found["results"]}
        assert scores.keys() == {0, 1, 2} and len({round(x, 5) for x in scores.values()}) == 1
        reasons = {x["index"]: x["reason"] for x in found["skipped"]}
        assert "600 bytes, not an image" in reasons[3]
        assert reasons[4] == "example.org may not be contacted, expected a host of --allow_hosts"
        assert reasons[5] == "169.254.169.254 may not be contacted, expected a host of --allow_hosts"


def fails(url, hosts, said, **options):
    with pytest.raises(FetchError, match=said):
        fetch(url, hosts, options.pop("limit", 100_000), **options)


def test_what_a_server_may_not_answer(web):
    here = {web}
    assert fetch(f"http://{web}/image.png", here, 100_000).startswith(b"\x89PNG")
    both = {web, web.replace("127.0.0.1", "localhost")}
    fails(f"http://{web}/other", both, rf"^{web} redirects to another host, localhost:\d+$")
    fails(f"http://{web}/other", here, "localhost:.* may not be contacted")
    fails(f"http://{web}/file", here, "is not a URL with http or https")
    fails(f"http://{web}/loop", here, "redirects more than 3 times")
    fails(f"http://{web}/nothing", here, "answered with status 404, expected 200")
    fails(f"http://{web}/large", here, "more than 100,000 bytes, expected at most 100,000")
    fails(f"http://{web}/endless", here, "more than 100,000 bytes")
    begin = time.monotonic()
    fails(f"http://{web}/slow", here, "took too long", seconds=0.7)
    assert time.monotonic() < begin + 5
    fails(f"https://{web}/image.png", here, "can't be read")  # no TLS there
    fails("http://127.0.0.1:1/", {"127.0.0.1:1"}, "127.0.0.1:1 can't be read .*refused")


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "::1", "fe80::1%eth0", "fd00::1",
                "::ffff:127.0.0.1", "2002:7f00:1::", "0.0.0.0", "100.64.0.1"]  # noqa: S104
)  # fmt: skip
def test_names_that_lead_into_the_local_network(address):
    def resolve(name, port, **_):
        return [(None, None, None, "", ("93.184.215.14", port)), (None, None, None, "", (address, port))]

    fails("http://photos.example/a.png", {"photos.example"}, "expected public addresses", resolve=resolve)


def test_the_checked_address_is_the_one_that_is_contacted(monkeypatch):
    """A name server that answers differently the second time (DNS rebinding) is not asked again."""
    asked, contacted = [], []

    def resolve(name, port, **_):
        asked.append((name, port))
        return [(None, None, None, "", ("93.184.215.14", port))]

    def connect(address, timeout):
        contacted.append(address)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(fetching.socket, "create_connection", connect)
    fails("https://photos.example/a.png", {"photos.example"}, "Connection refused", resolve=resolve)
    assert asked == [("photos.example", 443)] and contacted == [("93.184.215.14", 443)]


@pytest.mark.parametrize(
    "url",
    ["ftp://a.example/x", "http://", "http://user:password@a.example/x", "http://a.example:99999/x", "http://[::1/x",
     "http://a.example/\n", "file:///etc/passwd", "http://a b/"],
)  # fmt: skip
def test_urls_that_are_none(url):
    with pytest.raises(FetchError, match="is not a URL with http or https and without a password"):
        host_of(url)


def test_hosts_are_named_alike():
    assert host_of("HTTP://Photos.Example:80/a") == host_of("https://photos.example:443") == "photos.example"
    assert host_of("http://photos.example:443/") == "photos.example:443" and host_of("http://[::1]:90/") == "[::1]:90"
    assert all(map(is_host, ("photos.example", "10.0.0.5:9000", "[::1]", "a.example:80")))
    assert not any(map(is_host, ("http://a.example", "a.example/x", "", "A.example", "*")))
