"""Command lines: wrong ones are refused in one short error, and no secret of theirs is shown."""

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader

from amp.errors import WRONG_INPUT, AmpError, complain, shorten, typed_command

_load = get_loader("yaml")


def load_settings(text: str) -> Any:
    """YAML by jsonargparse's own safe loader, without the key by which a file would choose a class.

    No setting of ours takes one; but to say so, jsonargparse would import the module first, and run what it holds.

    Raises:
        yaml.YAMLError: Not YAML, or with a key ``class_path``.
    """
    value = _load(text)
    parts, seen = [value], set()
    while parts:
        part = parts.pop()
        if id(part) in seen:  # an alias, which may stand for what it lies in
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
    """`jsonargparse.ArgumentParser` for values that may be hostile; takes the same arguments.

    Its name is the command as it was typed; ``%(prog)s`` stands for it in `usage`. YAML is read by `load_settings`.
    Options are written out: ``--openai.api_key KEY`` would be a short form of ``--openai.api_key_variable``, and the
    key be taken for a name and shown. An option that holds a list takes several words, or one list in YAML.

    Attributes:
        translate: Called with the content of each configuration file; returns the settings of it that are read.
    """

    translate: Callable[[dict], dict] | None = None
    _file = None  # the configuration that is being read, which an error names

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **{"prog": typed_command(), "allow_abbrev": False, **options})

    def parse_args(self, args=None, *arguments, **options):
        words = list(sys.argv[1:] if args is None else args)
        if "--config=" in words or ("--config", "") in pairwise(words):
            self.error("config is empty, expected a file; add --config FILE")
        try:
            found = super().parse_args(self._with_lists(words), *arguments, **options)
        except (RecursionError, TypeError, ValueError) as error:  # lists in lists; a number of thousands of digits
            self.error(f"a value can't be read ({type(error).__name__}: {error})")
        if found.get("out") == "":  # --out "$FOLDER" without such a variable; as a path it is the current folder
            self.error("out is empty, expected a path; add --out PATH")
        return found

    def _with_lists(self, words: list[str]) -> list[str]:
        """The words with those of each list joined: ``--adapters A B`` as ``--adapters ["A", "B"]``."""
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
        with suppress(yaml.YAMLError):  # said below, with its line
            content = load_settings(Path(cfg_path).read_text("utf-8"))
            if not isinstance(content, dict):
                self.error(f"holds {shorten(content)}, expected settings, one KEY: VALUE a line")
            for key in (self.groups or {}).keys() & content:
                if not isinstance(content[key], dict):
                    self.error(
                        f"{key} is {shorten(content[key])}, expected its settings below it, one KEY: VALUE a line"
                    )
            if self.translate is not None:
                settings = self.parse_string(yaml.safe_dump(self.translate(content)), *arguments, **options)
                self._file = None
                return settings
        settings = super().parse_path(cfg_path, *arguments, **options)
        self._file = None
        return settings

    def _print_message(self, message, file=None):
        (file or sys.stderr).write(message)  # argparse hides that a disk is full

    def error(self, message, ex=None):
        if not self.exit_on_error:
            super().error(message, ex)
        if self._file is not None:
            message = f"{self._file}: {message}"
        self.print_usage(sys.stderr)
        print(f"tip: {self.prog} --help lists the options", file=sys.stderr)
        complain("error: " + " ".join(line.strip() for line in str(message).split("\n")))
        self.exit(WRONG_INPUT)


def _holds_list(kind: Any) -> bool:
    """Whether a type is a list, or a list among other types."""
    return any(get_origin(part) is list for part in (kind, *get_args(kind)))


def check_given(settings: Any, *keys: str) -> None:
    """Refuses a path that was not given: an empty one would be taken for the current folder.

    Raises:
        AmpError: Naming the first such key.
    """
    for key in keys:
        if not getattr(settings, key):
            raise AmpError(f"{key} is empty, expected a path; add --{key} PATH")
