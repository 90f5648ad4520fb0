"""What a folder of generated knowledge is made with, so that two models never mix in one file."""

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
    """``settings.json`` of a folder.

    Loading a model to learn its description takes minutes, so the description in a folder is trusted until the
    first reply is needed.

    Args:
        path: Path of the file; `check_ladder` writes it if there is none.
        options: Options of the command line that decide what the model says.
        makers: Makers of engine and rules.

    Attributes:
        described: How the engine and the rules describe themselves.

    Raises:
        AmpError: The folder was made with other options, or its file can't be read.
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
        """Engine and rules, checked to be those that the folder was made with."""
        if not self._checked and self._stored is not None:
            self._same("made_with", self._stored["made_with"], self._makers.describe())
        self._checked = True
        return self._makers

    def check_ladder(self, ladder: Ladder) -> None:
        """Refuses other prompts or retries than the folder was made with; writes the file of a new folder."""
        described = ladder.describe()
        if self._stored is not None:
            self._same("ladder", self._stored["ladder"], described)
            return
        content = {"options": self._options, "made_with": self.described, "ladder": described}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            own = self._path.with_name(f".{uuid.uuid4().hex}.json")  # parts that start at once write the same
            write_json(own, content)
            os.replace(own, self._path)
        except OSError as error:
            raise AmpError(
                f"{self._path}: can't be written ({error.strerror}); expected a folder for the knowledge; check --out"
            ) from None

    def _read(self) -> dict[str, Any] | None:
        try:
            content = parse_json(self._path.read_text(encoding="utf-8"))
            return {key: content[key] for key in ("options", "made_with", "ladder")}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AmpError(
                f"{self._path}: can't be read ({shorten(str(error))}); expected the settings of an earlier run; remove "
                "it to begin anew (the replies in the cache stay)"
            ) from None

    def _same(self, key: str, stored: Any, asked: Any) -> None:
        difference = _difference(stored, json.loads(json.dumps(asked)))
        if difference is not None:
            where, was, now = difference
            raise AmpError(
                f"{self._path}: '{key}{where}' was {shorten(was)}, now {shorten(now)}; expected the same settings in "
                "one folder, so that its knowledge has one origin; give the old setting, or another --out"
            )


def _difference(stored: Any, asked: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """(path of keys, stored, asked) of the first difference."""
    if isinstance(stored, dict) and isinstance(asked, dict):
        for key in dict.fromkeys((*stored, *asked)):
            found = _difference(stored.get(key), asked.get(key), f"{where}.{key}")
            if found is not None:
                return found
        return None
    return None if stored == asked else (where, stored, asked)
