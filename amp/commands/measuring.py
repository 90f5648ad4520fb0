"""Command lines of the commands that measure. Options come from a dataclass, and may come from training configurations.

A configuration file is optional, since adapters record what they were trained on. From the configuration of a training
run these commands read the keys that they have too, and ignore the other training keys.
"""

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from amp.command_line import CommandLine
from amp.errors import AmpError
from amp.train.command import ConfigFile

Settings = TypeVar("Settings")


def command_line(description: str, settings: type, usage: str = "") -> CommandLine:
    """Makes a parser that reads the dataclass `settings` from options and YAML files.

    Args:
        description: Description of the command. Only its first line is shown.
        settings: Dataclass of the settings.
        usage: Options to show in the usage line.
    """
    parser = CommandLine(
        usage=f"%(prog)s {usage} [--KEY VALUE ...]",  # listing all keys would hide the error message
        description=description.split("\n")[0],
    )
    parser.translate = partial(of_training_file, settings)
    parser.add_argument(
        "--config", action=ConfigFile, help="YAML file of this command or of training; options take precedence"
    )
    parser.add_class_arguments(settings, as_group=False)
    return parser


def read_command_line(parser: CommandLine, arguments: list[str] | None, settings: type[Settings]) -> Settings:
    """Parses a command line with a parser made by `command_line`.

    Raises:
        AmpError: The settings class refuses a value, or `out` and its default have different suffixes.
    """
    found = parser.instantiate(parser.parse_args(arguments))
    own = settings(**{key: value for key, value in found.items() if key != "config"})
    out, ending = Path(own.out), _ending(settings)  # type: ignore[attr-defined]
    if out.suffix != ending:
        raise AmpError(f"out is {str(out)!r}, expected a {ending} file; add --out FILE{ending}")
    return own


def of_training_file(settings: type, content: dict[str, Any]) -> dict[str, Any]:
    """Selects the keys of a configuration file that the dataclass `settings` has.

    Keys below `data` move to the top level. Keys that only training has are removed, including `out` if it is a
    training folder. Keys that neither has are kept, so that the parser refuses them.
    """
    from amp.train.config import DataSettings, TrainConfig  # not at the top: --help would wait for torch

    known = {field.name for field in fields(settings)}
    of_data = {field.name for field in fields(DataSettings)}
    of_training = {field.name for field in fields(TrainConfig)} - {"out"}
    data = content.get("data") or {}
    if not isinstance(data, dict):
        raise TypeError(f"data is {data!r}, expected its settings below it, one KEY: VALUE per line")
    kept = {key: value for key, value in data.items() if key in known or key not in of_data}
    kept |= {key: value for key, value in content.items() if key in known or key not in of_training}
    if Path(str(kept.get("out"))).suffix != _ending(settings):
        kept.pop("out", None)
    return kept


def _ending(settings: type) -> str:
    return Path(str(next(field.default for field in fields(settings) if field.name == "out"))).suffix
