"""Replies on disk: append-only JSONL files, one per part, that stay valid if a process is killed while writing."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from amp.errors import AmpError
from amp.files import open_log
from amp.json_text import parse_json
from amp.locks import try_lock

_SYNC_SECONDS = 5.0


class CacheError(AmpError):
    """The folder of replies can't be read or written."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The stored part of a completion.

    Attributes:
        text: The reply of the model, unchanged.
        refused: Whether the request failed and would fail again; the text is empty.
    """

    text: str
    refused: bool = False


def key_of(**content: Any) -> str:
    """The key of a reply: SHA-256, cut to 32 hexadecimal digits, of everything that determines the reply."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class Replies:
    """Replies by key, kept in memory. If a key is stored twice, the first reply is used."""

    def __init__(self) -> None:
        self._replies: dict[str, Reply] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str) -> Reply | None:
        return self._replies.get(key)

    def put(self, key: str, reply: Reply, **notes: Any) -> None:
        """Stores a reply. `notes` are for people who read the file of `ReplyCache`."""
        self._replies.setdefault(key, reply)

    def close(self) -> None:
        """Does nothing. A `ReplyCache` closes its file."""


class ReplyCache(Replies):
    """All replies of a folder. New replies are appended to the file of one part.

    Each part writes its own file and reads only complete lines of the others, so parts need no lock between them. An
    incomplete last line is dropped when its part starts again. If a key occurs twice, the first reply is used.

    Args:
        folder: Folder of the replies; created if it does not exist.
        part: Name of the file to append to, without suffix; None only reads.

    Attributes:
        damaged: Number of lines that are not valid replies. They are ignored and their replies requested again.

    Raises:
        CacheError: The folder can't be read or written, or another process writes the same part.
    """

    def __init__(self, folder: Path, part: str | None) -> None:
        super().__init__()
        self.damaged = 0
        self._file = -1  # no file is open
        self._path = folder / f"{part}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if part is not None:
                self._file = open_log(self._path, os.O_APPEND)
                self._take()
                self._drop_torn_line()
            for path in sorted(folder.glob("*.jsonl")):
                self._read(path)
        except OSError as error:
            self.close()
            raise CacheError(
                f"{folder}: can't be used ({error.strerror}); expected a writable folder for replies; fix it, or "
                "choose another with --cache"
            ) from None
        except BaseException:
            self.close()
            raise
        self._synced = time.monotonic()

    def put(self, key: str, reply: Reply, **notes: Any) -> None:
        """Stores a reply. It then survives a crash of this process, and a few seconds later a crash of the machine.

        Args:
            key: Key of the reply, from `key_of`.
            reply: The reply to store.
            notes: Further fields of the line, for people who read the file.

        Raises:
            CacheError: The file can't be written, for example on a full disk. Earlier replies are kept.
        """
        if key in self._replies:
            return
        record = {"key": key, **notes, "reply": reply.text}
        if reply.refused:
            record["refused"] = True
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        try:
            while line:  # a nearly full disk accepts only part of the line; the next write raises
                line = line[os.write(self._file, line) :]
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._file)
                self._synced = time.monotonic()
        except OSError as error:
            raise CacheError(
                f"{self._path}: can't be written ({error.strerror}); make room or fix the folder, then run the same "
                "command again; earlier replies are kept"
            ) from None
        self._replies[key] = reply

    def close(self) -> None:
        """Flushes the file to disk and closes it. A second call does nothing."""
        file, self._file = self._file, -1
        if file >= 0:
            os.fsync(file)
            os.close(file)

    def _take(self) -> None:
        if not try_lock(self._file):
            raise CacheError(
                f"{self._path}: another process is writing this part; expected one process per part; wait for it, or "
                "give each process its own --part"
            )

    def _drop_torn_line(self) -> None:
        size = os.fstat(self._file).st_size
        end = size
        while end > 0:
            start = max(0, end - 65536)
            os.lseek(self._file, start, os.SEEK_SET)
            newline = os.read(self._file, end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            os.ftruncate(self._file, end)

    def _read(self, path: Path) -> None:
        with open(path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break  # another part is still writing this line, or was killed
                try:
                    record = parse_json(line)
                    key, text, refused = record["key"], record["reply"], record.get("refused", False)
                    valid = isinstance(key, str) and isinstance(text, str) and isinstance(refused, bool)
                except (ValueError, KeyError, TypeError):
                    valid = False
                if valid:
                    self._replies.setdefault(key, Reply(text, refused))
                else:
                    self.damaged += 1
