"""The record of how a folder of knowledge was generated, so that one file never mixes the output of two models."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from amp.errors import AmpError, shorten
from amp.files import write_json
from amp.generation.ladder import Ladder
from amp.generation.makers import Makers
from amp.json_text import parse_json

SETTINGS_NAME = "settings.json"


class Settings:
    """The `settings.json` of a folder.

    Loading a model only to read its description takes minutes, so the stored description is trusted until the first
    reply is needed.

    Args:
        path: Path of the file. `check_ladder` writes it if it does not exist.
        options: Command-line options that determine the model's replies.
        makers: Loads the engine and the rules.

    Attributes:
        described: Descriptions of the engine and the rules.

    Raises:
        AmpError: The folder was made with other options, or the file can't be read.
    """

    def __init__(self, path: Path, options: dict[str, Any], makers: Makers) -> None:
        self._path, self._options = path, options
        self._makers, self._checked = makers, False
        self._stored = self._read()
        if self._stored is not None:
            self._same("options", self._stored["options"], options)
            self.described = self._stored["made_with"]
        else:
            self.described = makers.describe()

    @property
    def makers(self) -> Makers:
        """The engine and the rules, after a check that the folder was made with the same ones."""
        if not self._checked and self._stored is not None:
            self._same("made_with", self._stored["made_with"], self._makers.describe())
        self._checked = True
        return self._makers

    def check_ladder(self, ladder: Ladder) -> None:
        """Raises `AmpError` if prompts or retries differ from those of the folder. Writes the file of a new folder."""
        described = ladder.describe()
        if self._stored is not None:
            self._same("ladder", self._stored["ladder"], described)
            return
        content = {"options": self._options, "made_with": self.described, "ladder": described}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            own = self._path.with_name(
                f".{uuid.uuid4().hex}.json"
            )  # several parts may start at once; all write the same content
            write_json(own, content)
            os.replace(own, self._path)
        except OSError as error:
            raise AmpError(
                f"{self._path}: can't be written ({error.strerror}); expected a writable folder; check --out"
            ) from None

    def _read(self) -> dict[str, Any] | None:
        try:
            content = parse_json(self._path.read_text(encoding="utf-8"))
            return {key: content[key] for key in ("options", "made_with", "ladder")}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AmpError(
                f"{self._path}: can't be read ({shorten(str(error))}); expected the settings of an earlier run; delete "
                "the file to start over (the cached replies are kept)"
            ) from None

    def _same(self, key: str, stored: Any, asked: Any) -> None:
        difference = _difference(stored, json.loads(json.dumps(asked)))
        if difference is not None:
            where, was, now = difference
            raise AmpError(
                f"{self._path}: '{key}{where}' was {shorten(was)} and is now {shorten(now)}; expected the settings "
                "that the folder was made with; restore the old setting, or choose another --out"
            )


def _difference(stored: Any, asked: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """Returns (path of keys, stored value, new value) of the first difference."""
    if isinstance(stored, dict) and isinstance(asked, dict):
        for key in dict.fromkeys((*stored, *asked)):
            found = _difference(stored.get(key), asked.get(key), f"{where}.{key}")
            if found is not None:
                return found
        return None
    return None if stored == asked else (where, stored, asked)
