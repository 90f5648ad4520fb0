"""Interactions, which combine images with the knowledge of captions.

To add one, add a file and a line in `INTERACTIONS`, or call `register_interaction` from anywhere (docs/extending.md).
"""

import inspect
from importlib import import_module

from amp.errors import AmpError
from amp.model.config import PromptConfig
from amp.model.interactions.base import Interaction, Prompts, Unconditioned
from amp.plugins import load_plugins

__all__ = [
    "INTERACTIONS",
    "Interaction",
    "Prompts",
    "Unconditioned",
    "interaction_class",
    "make_interaction",
    "register_interaction",
]

# By name: the class, or "module:class", which is imported when it is used.
INTERACTIONS: dict[str, type[Interaction] | str] = {
    "readout": "amp.model.interactions.readout:Readout",
    "aim": "amp.model.interactions.aim:Aim",
    "cat": "amp.model.interactions.cat:Concatenation",
    "visual_prompts": "amp.model.interactions.controls:VisualPromptsOnly",
    "learned_query": "amp.model.interactions.controls:LearnedQuery",
}


def register_interaction(name: str, interaction: type[Interaction]) -> None:
    """Registers an interaction for `PromptConfig.interaction`.

    Args:
        name: Name of the interaction in configurations and adapter files.
        interaction: Class of the interaction.

    Raises:
        AmpError: The name is taken.
    """
    if INTERACTIONS.setdefault(name, interaction) is not interaction:
        raise AmpError(f"interaction {name!r} is already registered; choose another name")


def interaction_class(config: PromptConfig) -> type[Interaction]:
    """The class that a configuration selects or, without knowledge, the control of that class.

    Raises:
        AmpError: The name is unknown, the class doesn't have an option, or the settings leave knowledge unused.
    """
    found = _look_up(config.interaction)
    known = _options_of(found)
    if unknown := sorted(set(config.interaction_options) - set(known)):
        raise AmpError(
            f"prompt.interaction_options holds {', '.join(unknown)}, expected options of the interaction "
            f"{config.interaction!r}: {', '.join(known) or 'it has none'}"
        )
    if config.knowledge == "none":
        found = found if found.control is None else _look_up(found.control)
        if not (config.num_prompts or config.enrich or found.trains):
            raise AmpError(
                "prompt setting knowledge is 'none', num_prompts is 0 and enrich is false, which leaves nothing to "
                "train; give at least 1 visual prompt"
            )
    elif config.knowledge == "caption" and not found.reads_caption:
        raise AmpError(
            f"prompt setting knowledge is 'caption' and interaction is {config.interaction!r}, expected one that reads "
            "the caption's own feature (reads_caption), as 'readout'"
        )
    elif found.conditioned and config.knowledge != "caption" and not any(_kinds(found, config)):
        raise AmpError(
            f"prompt setting knowledge is {config.knowledge!r} and interaction is {config.interaction!r}, which "
            "doesn't read that, expected knowledge 'both' or another kind"
        )
    elif not (found.conditioned or config.enrich):
        raise AmpError(
            f"prompt setting knowledge is {config.knowledge!r}, interaction is {config.interaction!r} and enrich is "
            "false, expected enrich true: otherwise no knowledge is used at all"
        )
    return found


def make_interaction(config: PromptConfig, backbone) -> Interaction:
    """Builds the interaction of a configuration for a frozen CLIP (`amp.model.towers.base.Backbone`).

    Raises:
        AmpError: See `interaction_class`, or the tower lacks what the interaction needs.
    """
    found = interaction_class(config)
    options = {key: value for key, value in config.interaction_options.items() if key in _options_of(found)}
    return found(backbone, *_kinds(found, config), **options)


def _kinds(interaction: type[Interaction], config: PromptConfig) -> tuple[bool, bool]:
    """Whether an interaction reads triplets, and states, under a configuration."""
    return config.reads_triplets and interaction.reads_triplets, config.reads_states and interaction.reads_states


def _look_up(name: str) -> type[Interaction]:
    load_plugins()
    if name not in INTERACTIONS:
        raise AmpError(
            f"prompt setting interaction is {name!r}, expected one of {', '.join(INTERACTIONS)}; for an "
            "interaction of another package, add its module to AMP_PLUGINS"
        )
    found = INTERACTIONS[name]
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        found = getattr(import_module(module), attribute)
    return found


def _options_of(interaction: type[Interaction]) -> list[str]:
    """Names of an interaction's options: the arguments after those that all interactions take."""
    return list(inspect.signature(interaction).parameters)[3:]
