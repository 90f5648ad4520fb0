"""Command lines that read the configuration of a training run beside settings of their own."""

from typing import TypeVar

from amp.command import CommandLine
from amp.train.config import TrainConfig

Settings = TypeVar("Settings")


def command_line(prog: str, description: str, settings: type) -> CommandLine:
    """A parser of the dataclass `settings` and, but for `out`, of `TrainConfig`, from a YAML file and options."""
    parser = CommandLine(
        prog=prog,
        usage=f"{prog} [--config FILE] [--KEY VALUE ...]",  # the keys would bury an error's line
        description=description.split("\n")[0],
    )
    parser.add_argument("--config", action="config", help="YAML file of the training run; the command line wins")
    parser.add_class_arguments(settings, as_group=False)
    parser.add_class_arguments(TrainConfig, as_group=False, skip={"out"})
    return parser


def read_command_line(
    parser: CommandLine, arguments: list[str] | None, settings: type[Settings]
) -> tuple[Settings, TrainConfig]:
    """What `command_line` parses, as the two dataclasses.

    Raises:
        AmpError: A value that its class refuses.
    """
    found = parser.instantiate(parser.parse_args(arguments))
    own = settings(**{key: found[key] for key in settings.__dataclass_fields__})
    return own, TrainConfig(**{key: found[key] for key in TrainConfig.__dataclass_fields__ if key != "out"})
