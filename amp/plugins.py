"""Plugins: modules outside this package that register something (a captions format, an engine) when imported."""

import os
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from amp.errors import AmpError

GROUP = "open_clip_amp.plugins"
VARIABLE = "AMP_PLUGINS"


@cache
def load_plugins() -> None:
    """Imports every plugin once. Call this before looking up a name in a registry.

    Plugins are the entry points of the group `open_clip_amp.plugins` of installed packages, and the modules named in
    the environment variable `AMP_PLUGINS`, separated by commas.

    Raises:
        AmpError: A plugin can't be imported.
    """
    modules = {point.module: f"entry point {point.name!r} of {GROUP}" for point in entry_points(group=GROUP)}
    modules |= {name.strip(): VARIABLE for name in os.environ.get(VARIABLE, "").split(",") if name.strip()}
    for module, where in modules.items():
        try:
            import_module(module)
        except ImportError as error:
            raise AmpError(
                f"{where}: module {module!r} can't be imported ({error}); expected an importable module; install it, "
                "or add its folder to PYTHONPATH"
            ) from None
