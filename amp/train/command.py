"""Command lines that read the configuration of a training run beside settings of their own."""

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from jsonargparse import ActionConfigFile

from amp.command_line import CommandLine
from amp.errors import AmpError
from amp.train.config import TrainConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")
RECIPES = Path(__file__).parents[1] / "recipes"


class ConfigFile(ActionConfigFile):
    """``--config FILE``, or the name of a recipe that is installed with the package, such as ``photos``."""

    def __call__(self, parser, cfg, values, option_string=None):
        recipe = RECIPES / f"{values}.yaml"
        installed = values.isidentifier() and not Path(values).is_file() and recipe.is_file()
        super().__call__(parser, cfg, str(recipe) if installed else values, option_string)


def command_line(description: str, settings: type) -> CommandLine:
    """A parser of the dataclass `settings` and, but for `out`, of `TrainConfig`, from a YAML file and options."""
    parser = CommandLine(
        usage="%(prog)s [--config FILE] [--KEY VALUE ...]",  # the keys would bury an error's line
        description=description.split("\n")[0],
    )
    parser.add_argument("--config", action=ConfigFile, help="YAML file of the training run; the command line wins")
    parser.add_class_arguments(settings, as_group=False)
    parser.add_class_arguments(TrainConfig, as_group=False, skip={"out"})
    return parser


def read_command_line(
    parser: CommandLine, arguments: list[str] | None, settings: type[Settings]
) -> tuple[Settings, TrainConfig]:
    """What `command_line` parses, as the two dataclasses.

    Raises:
        AmpError: A value that its class refuses, or an `out` with another ending than the default's.
    """
    found = parser.instantiate(parser.parse_args(arguments))
    own = settings(**{key: found[key] for key in settings.__dataclass_fields__})
    ending = Path(str(settings.__dataclass_fields__["out"].default)).suffix
    if Path(found["out"]).suffix != ending:
        raise AmpError(
            f"out is {str(found['out'])!r}, expected a {ending} file; a training configuration names its folder there, "
            f"so add --out FILE{ending}"
        )
    return own, TrainConfig(**{key: found[key] for key in TrainConfig.__dataclass_fields__ if key != "out"})
