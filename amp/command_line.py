"""Command-line parsing with short error messages that never show secrets."""

import json
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader

from amp.errors import WRONG_INPUT, AmpError, complain, shorten, typed_command

_load = get_loader("yaml")


def load_settings(text: str) -> Any:
    """Loads YAML with jsonargparse's safe loader, but refuses the key `class_path`.

    With this key a file could choose a class, which no setting takes. To report that, jsonargparse would first import
    the class's module and so run its code.

    Raises:
        yaml.YAMLError: The text is not YAML, or contains the key `class_path`.
    """
    value = _load(text)
    parts, seen = [value], set()
    while parts:
        part = parts.pop()
        if id(part) in seen:  # a YAML alias, which may refer to its own container
            continue
        seen.add(id(part))
        if isinstance(part, dict):
            if "class_path" in part:
                raise yaml.YAMLError(f"key 'class_path' is {part['class_path']!r}; expected settings without classes")
            parts += part.values()
        elif isinstance(part, list):
            parts += part
    return value


set_loader("yaml", load_settings, (yaml.YAMLError,))


class CommandLine(ArgumentParser):
    """`jsonargparse.ArgumentParser` for untrusted values. It takes the same arguments.

    `prog` is the command as it was typed, and `usage` refers to it by `%(prog)s`. YAML is read by `load_settings`.
    Options can't be abbreviated: `--openai.api_key KEY` would be taken for `--openai.api_key_variable`, and the key
    would be shown as the name of a variable. An option that holds a list takes several words, or one YAML list.

    Attributes:
        translate: Called with the content of each configuration file. Returns the settings to parse.
    """

    translate: Callable[[dict], dict] | None = None
    _file = None  # the configuration file being read, which error messages name

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **{"prog": typed_command(), "allow_abbrev": False, **options})

    def parse_args(self, args=None, *arguments, **options):
        words = list(sys.argv[1:] if args is None else args)
        if "--config=" in words or ("--config", "") in pairwise(words):
            self.error("config is empty, expected a file; add --config FILE")
        try:
            found = super().parse_args(self._with_lists(words), *arguments, **options)
        except (RecursionError, TypeError, ValueError) as error:  # deeply nested lists, or a huge number
            self.error(f"a value can't be read ({type(error).__name__}: {error})")
        if found.get("out") == "":  # --out "$UNSET"; an empty path would mean the current folder
            self.error("out is empty, expected a path; add --out PATH")
        return found

    def _with_lists(self, words: list[str]) -> list[str]:
        """Joins the words of each list option: `--adapters A B` as `--adapters ["A", "B"]`."""
        lists = {
            option
            for action in self._actions
            for option in action.option_strings
            if _holds_list(getattr(action, "_typehint", None))
        }
        joined: list[str] = []
        while words:
            word, *words = words
            option, equals, value = word.partition("=")
            joined.append(option if option in lists else word)
            if option not in lists:
                continue
            values = [value] if equals else []
            while words and not words[0].startswith("--"):
                values.append(words.pop(0))
            whole = len(values) == 1 and (values[0].startswith("[") or values[0] in ("null", ""))
            joined += values if whole or not values else [json.dumps(values)]
        return joined

    def parse_path(self, cfg_path, *arguments, **options):
        self._file = cfg_path
        with suppress(yaml.YAMLError):  # reported below, with its line number
            content = load_settings(Path(cfg_path).read_text("utf-8"))
            if not isinstance(content, dict):
                self.error(f"holds {shorten(content)}, expected settings, one KEY: VALUE per line")
            for key in (self.groups or {}).keys() & content:
                if not isinstance(content[key], dict):
                    self.error(f"{key} is {shorten(content[key])}, expected nested settings, one KEY: VALUE per line")
            if self.translate is not None:
                settings = self.parse_string(yaml.safe_dump(self.translate(content)), *arguments, **options)
                self._file = None
                return settings
        settings = super().parse_path(cfg_path, *arguments, **options)
        self._file = None
        return settings

    def _print_message(self, message, file=None):
        (file or sys.stderr).write(message)  # argparse hides write errors, such as a full disk

    def error(self, message, ex=None):
        if not self.exit_on_error:
            super().error(message, ex)
        if self._file is not None:
            message = f"{self._file}: {message}"
        if wrong := re.match(r"unrecognized arguments: (--[\w.-]+)", str(message), re.IGNORECASE):
            known = [option for action in self._actions for option in action.option_strings]
            close = get_close_matches(wrong[1], known, n=1)
            message = f"{message}{f'; did you mean {close[0]}?' if close else ''}"
        self.print_usage(sys.stderr)
        print(f"tip: {self.prog} --help lists the options", file=sys.stderr)
        complain("error: " + " ".join(line.strip() for line in str(message).split("\n")))
        self.exit(WRONG_INPUT)


def _holds_list(kind: Any) -> bool:
    """Whether a type is a list, or a union that includes a list."""
    return any(get_origin(part) is list for part in (kind, *get_args(kind)))


def check_given(settings: Any, *keys: str) -> None:
    """Refuses empty paths, which would mean the current folder.

    Raises:
        AmpError: A path is empty. The message names the first such key.
    """
    for key in keys:
        if not getattr(settings, key):
            raise AmpError(f"{key} is empty, expected a path; add --{key} PATH")
