"""Options of the commands that measure: a dataclass of their own, and files that were written for training.

Adapters record what they were trained on, so no file is needed. One of a training run or data set is still taken: the
keys that the command has are read, the others of training have no effect.
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
    """A parser of the dataclass `settings`, from options and YAML files.

    Args:
        description: Of the command; its first line is shown.
        settings: What is read.
        usage: Options in the usage line.
    """
    parser = CommandLine(
        usage=f"%(prog)s {usage} [--KEY VALUE ...]",  # the keys would bury an error's line
        description=description.split("\n")[0],
    )
    parser.translate = partial(of_training_file, settings)
    parser.add_argument("--config", action=ConfigFile, help="YAML file, of this command or of training; options win")
    parser.add_class_arguments(settings, as_group=False)
    return parser


def read_command_line(parser: CommandLine, arguments: list[str] | None, settings: type[Settings]) -> Settings:
    """What `command_line` parses.

    Raises:
        AmpError: A value that its class refuses, or an `out` with another ending than the default's.
    """
    found = parser.instantiate(parser.parse_args(arguments))
    own = settings(**{key: value for key, value in found.items() if key != "config"})
    out, ending = Path(own.out), _ending(settings)  # type: ignore[attr-defined]
    if out.suffix != ending:
        raise AmpError(f"out is {str(out)!r}, expected a {ending} file; add --out FILE{ending}")
    return own


def of_training_file(settings: type, content: dict[str, Any]) -> dict[str, Any]:
    """The keys of a configuration file that the dataclass `settings` has.

    Keys below `data` are this command's own without that word. Keys that only training has are left out, as is the
    folder that training calls `out`; keys that neither has stay, to be refused.
    """
    from amp.train.config import DataSettings, TrainConfig  # not for --help, which would wait for torch

    known = {field.name for field in fields(settings)}
    of_data = {field.name for field in fields(DataSettings)}
    of_training = {field.name for field in fields(TrainConfig)} - {"out"}
    data = content.get("data") or {}
    if not isinstance(data, dict):
        raise TypeError(f"data is {data!r}, expected its settings below it, one KEY: VALUE a line")
    kept = {key: value for key, value in data.items() if key in known or key not in of_data}
    kept |= {key: value for key, value in content.items() if key in known or key not in of_training}
    if Path(str(kept.get("out"))).suffix != _ending(settings):
        kept.pop("out", None)
    return kept


def _ending(settings: type) -> str:
    return Path(str(next(field.default for field in fields(settings) if field.name == "out"))).suffix
