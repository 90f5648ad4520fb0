"""The option `--config`: a YAML file of a training run, or the name of a recipe."""

from pathlib import Path

from jsonargparse import ActionConfigFile

RECIPES = Path(__file__).parents[1] / "recipes"


class ConfigFile(ActionConfigFile):
    """`--config FILE`, or the name of a recipe that is installed with the package, such as `photos`."""

    def __call__(self, parser, cfg, values, option_string=None):
        recipe = RECIPES / f"{values}.yaml"
        installed = values.isidentifier() and not Path(values).is_file() and recipe.is_file()
        if not installed and not Path(values).exists():
            recipes = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
            parser.error(f"config is {values!r}, expected a YAML file or a recipe ({recipes}); there is no such file")
        super().__call__(parser, cfg, str(recipe) if installed else values, option_string)
