"""A stand-in for the Hugging Face hub: the requests of `HfFileSystem` that read a dataset repository."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from support.http_server import QuietHandler, serving

REPOSITORY = "me/drawn"


class HubServer:
    """Serves the files of a folder as `datasets/me/drawn/shards` at revision `main`.

    As on the hub, tar files are LFS objects, whose address redirects to another server, and other files are answered
    directly. Everything else is missing.

    Attributes:
        requests: "METHOD /path RANGE" of each request.
        sent: Number of bytes of files that were sent.
        refused: Answer every request with 403, as for a gated repository.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.requests, self.sent, self.refused, self.url = folder, [], 0, False, ""

    @contextmanager
    def serve(self) -> Iterator["HubServer"]:
        """Serves on a free port while the block runs."""
        hub = self

        class Handler(QuietHandler):
            def do_GET(self):
                span = self.headers.get("Range", "")
                hub.requests.append(f"GET {self.path} {span}".rstrip())
                path = unquote(urlsplit(self.path).path)
                if hub.refused:
                    self.error(403, "GatedRepo")
                elif path in (f"/api/datasets/{REPOSITORY}", f"/api/datasets/{REPOSITORY}/revision/main"):
                    self.json({"id": REPOSITORY, "sha": "0" * 40, "private": False, "siblings": []})
                elif path == f"/api/datasets/{REPOSITORY}/tree/main/shards":
                    self.json([hub.entry(file) for file in sorted(hub.folder.iterdir()) if file.is_file()])
                elif path.startswith(f"/datasets/{REPOSITORY}/resolve/main/shards/"):
                    self.file(path.rpartition("/")[2], span)
                elif path.startswith("/objects/"):
                    self.content(hub.folder / path.rpartition("/")[2], span)
                else:
                    self.error(404, "RepoNotFound" if REPOSITORY not in path else "EntryNotFound")

            def do_POST(self):
                form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                hub.requests.append(f"POST {self.path} {' '.join(form['paths'])}")
                if hub.refused:
                    return self.error(403, "GatedRepo")
                assert self.path == f"/api/datasets/{REPOSITORY}/paths-info/main"
                files = [hub.folder / name.removeprefix("shards/") for name in form["paths"]]
                self.json([hub.entry(file) for file in files if file.is_file()])

            def file(self, name: str, span: str) -> None:
                path = hub.folder / name
                if not path.is_file():
                    self.error(404, "EntryNotFound")
                elif path.suffix == ".tar":
                    self.reply(302, b"", Location=f"{hub.url}/objects/{name}")
                else:
                    self.content(path, span)

            def content(self, path: Path, span: str) -> None:
                content = path.read_bytes()
                found = re.fullmatch(r"bytes=(\d+)-(\d+)", span)
                low, high = (int(found[1]), min(int(found[2]), len(content) - 1)) if found else (0, len(content) - 1)
                part = content[low : high + 1]
                hub.sent += len(part)  # before the client can go on
                if found:
                    self.reply(206, part, **{"Content-Range": f"bytes {low}-{high}/{len(content)}"})
                else:
                    self.reply(200, part)

            def json(self, value) -> None:
                self.reply(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

            def error(self, status: int, code: str) -> None:
                self.reply(status, b"", **{"X-Error-Code": code})

            def reply(self, status: int, body: bytes, **headers) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        with serving(Handler) as self.url:
            yield self

    def entry(self, path: Path) -> dict:
        """What the hub says about a file."""
        content = path.read_bytes()
        entry = {"type": "file", "path": f"shards/{path.name}", "size": len(content)}
        digest = hashlib.sha256(content).hexdigest()
        if path.suffix == ".tar":
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 135}
        return {**entry, "oid": hashlib.sha1(digest.encode(), usedforsecurity=False).hexdigest()}
