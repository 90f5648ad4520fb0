"""Replies on disk: append-only JSONL files, one per part, that survive a kill at any byte."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amp.errors import AmpError
from amp.files import open_log
from amp.json_text import parse_json
from amp.locks import try_lock

_SYNC_SECONDS = 5.0


class CacheError(AmpError):
    """The folder of replies can't be read or written."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The part of a completion that is kept.

    Attributes:
        text: The reply of the model, unchanged.
        refused: Whether there is no text and the same request would fail again.
    """

    text: str
    refused: bool = False


def key_of(**content: Any) -> str:
    """The name of a reply: sha256, cut to 32 hexadecimal digits, of everything that decides it."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class ReplyCache:
    """All replies of a folder. New ones are appended to the file of one part.

    Parts need no lock for each other, since each writes its own file and reads only whole lines of the others. A line
    that a kill cut in two is dropped when its part starts again. The first reply of a key stays.

    Args:
        folder: Folder of the replies; made if absent.
        part: Name of the file to append to, None to read only.

    Attributes:
        damaged: Lines that were no reply and don't count; their requests are asked again.

    Raises:
        CacheError: Unreadable or unwritable; another process writes the same part.
    """

    def __init__(self, folder: Path, part: str | None) -> None:
        self._replies: dict[str, Reply] = {}
        self.damaged = 0
        self._file = -1  # none is open
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
                f"{folder}: can't be used ({error.strerror}); expected a folder to keep replies in; fix it, or name "
                "another with --cache"
            ) from None
        except BaseException:
            self.close()
            raise
        self._synced = time.monotonic()

    def __enter__(self) -> ReplyCache:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str) -> Reply | None:
        return self._replies.get(key)

    def put(self, key: str, reply: Reply, **notes: Any) -> None:
        """Keeps a reply. From here on it survives the end of this process, and some seconds later that of the machine.

        Args:
            key: Name of the reply, from `key_of`.
            reply: The reply to keep.
            notes: Further keys for a reader of the file.

        Raises:
            CacheError: The file can't be written, as on a full disk; what was put before stays.
        """
        if key in self._replies:
            return
        record = {"key": key, **notes, "reply": reply.text}
        if reply.refused:
            record["refused"] = True
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        try:
            while line:  # a full disk takes a part of it; the rest raises
                line = line[os.write(self._file, line) :]
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._file)
                self._synced = time.monotonic()
        except OSError as error:
            raise CacheError(
                f"{self._path}: can't be written ({error.strerror}); make room or fix the folder, and run the same "
                "command again: the replies in it are kept"
            ) from None
        self._replies[key] = reply

    def close(self) -> None:
        """Makes everything durable; a second call does nothing."""
        file, self._file = self._file, -1
        if file >= 0:
            os.fsync(file)
            os.close(file)

    def _take(self) -> None:
        if not try_lock(self._file):
            raise CacheError(
                f"{self._path}: another process is writing this part; expected one process per part; wait for it, or "
                "give each its own --part"
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
                    break  # another part is writing it just now, or was killed
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
