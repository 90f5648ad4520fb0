"""Chooses and reads the captions of a sample in a tar file of another tool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from amp.data.captions.base import cell, is_empty
from amp.errors import AmpError, shorten
from amp.json_text import parse_json, seen_keys

JSON_KEYS = ("caption", "captions", "text", "texts", "raw_caption")
"""Keys of captions in a sample's `.json`, in order of preference, if it has no `.txt` and none are chosen."""


class CaptionChoice:
    """Reads the captions of samples, and counts where they were found.

    Args:
        keys: Keys of the `.json` that hold captions; None reads the `.txt`, or else the first of `JSON_KEYS`.

    Attributes:
        read: Number of samples by the place of their captions.
        keys_seen: All keys of the `.json` seen so far.
    """

    def __init__(self, keys: Sequence[str] | None) -> None:
        self.keys = tuple(keys) if keys is not None else None
        self.read: Counter[str] = Counter()
        self.keys_seen: set[str] = set()

    def add(self, other: CaptionChoice) -> None:
        """Adds the counts of another one."""
        self.read += other.read
        self.keys_seen |= other.keys_seen

    def texts(self, txt: bytes | None, record: dict[str, Any] | None) -> list[str]:
        """The captions of a sample in order, without surrounding white space; empty ones are "".

        Args:
            txt: Content of its `.txt`, if there is one.
            record: Content of its `.json`, if there is one.

        Raises:
            AmpError: A value isn't text. The message doesn't name the file.
        """
        self.keys_seen.update(record or {})
        if self.keys is not None:
            found = [key for key in self.keys if key in (record or {})]
        elif txt is not None:
            return self._of_txt(txt, record)
        else:
            found = [key for key in JSON_KEYS if not is_empty((record or {}).get(key))][:1]
        self.read.update(f"JSON key {key!r}" for key in found)
        return [text for key in found for text in _values((record or {})[key], key)]

    def _of_txt(self, txt: bytes, record: dict[str, Any] | None) -> list[str]:
        try:
            text = txt.decode("utf-8")
        except UnicodeDecodeError as error:
            raise AmpError(f"the .txt isn't UTF-8 ({error.reason} at byte {error.start})") from None
        if record is not None:  # img2dataset and open_clip, whose captions may contain line breaks
            self.read[".txt, one caption each"] += 1
            return [text.strip()]
        # CLIP_benchmark has no .json. It reads the lines with str.splitlines, which knows more line ends than "\n".
        self.read[".txt, one caption per line"] += 1
        return [line.strip() for line in text.splitlines()]

    def check_keys(self, where: str) -> None:
        """Checks that each chosen key occurs in some sample.

        Raises:
            AmpError: One doesn't.
        """
        for key in self.keys or ():
            if key not in self.keys_seen:
                raise AmpError(
                    f"{where}: no .json has the key {key!r} of --caption_keys; keys seen: "
                    f"{seen_keys(dict.fromkeys(sorted(self.keys_seen)))}; correct --caption_keys"
                )


def parse_sample(content: bytes) -> dict[str, Any]:
    """The object in a sample's `.json`.

    Raises:
        AmpError: It isn't JSON, or no object. The message doesn't name the file.
    """
    try:
        value = parse_json(content)
    except ValueError as error:
        raise AmpError(f"the .json isn't JSON ({error})") from None
    if not isinstance(value, dict):
        raise AmpError(f"the .json is {shorten(value)}; expected an object")
    return value


def _values(value: Any, key: str) -> list[str]:
    if isinstance(value, list):
        return [cell(item, f"'{key}'[{i}]") for i, item in enumerate(value)]
    return [cell(value, f"'{key}'")]
