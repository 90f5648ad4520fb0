"""Conversion of adapter files of version 1 to the settings and weight names of version 2."""

import math
from typing import Any

import torch

from amp.errors import AmpError
from amp.knowledge.text import SLOT_TOKENS
from amp.model.config import PromptConfig

# Defaults of version 1, for files that were written before a setting existed.
_DEFAULTS: dict[str, Any] = {
    "knowledge": "both",
    "interaction": "aim",
    "condition_images": True,
    "interaction_layer": 0,
    "readout_blocks": 0,
    "num_prompts": 4,
    "max_triplets": 6,
    "slot_tokens": 5,
    "triplet_layers": 2,
    "triplet_heads": 8,
    "bottleneck": 16,
    "lam": 0.7,
    "residual": True,
    "text_enrichment": False,
    "text_triplets": False,
    "image_projection": False,
}
_OPTIONS: dict[str, dict[str, str]] = {
    "aim": {"bottleneck": "bottleneck", "lam": "lam", "residual": "residual"},
    "cat": {"bottleneck": "bottleneck"},
    "readout": {"blocks": "readout_blocks"},
    "learned_query": {"blocks": "readout_blocks"},
    "visual_prompts": {},
}
_NAMES = {
    "readout.": "interaction.readout.",
    "interaction.": "interaction.aim.",
    "adapter.": "interaction.adapter.",
    "state_projection.": "interaction.state_projection.",
    "null_state": "interaction.null_state",
}


def convert(
    settings: dict[str, Any], weights: dict[str, torch.Tensor]
) -> tuple[PromptConfig, dict[str, torch.Tensor], bool]:
    """Converts settings and weights to version 2. The third value tells whether maps that are zero are missing.

    Version 1 could add the maps of `PromptConfig.enrich` one by one. Maps that a file lacks are zero, so the scores are
    the same.

    Raises:
        AmpError: A setting is unknown, or a size of the triplet encoder is not available in version 2.
    """
    if unknown := sorted(set(settings) - set(_DEFAULTS)):
        raise AmpError(f"prompt settings {unknown} are unknown")
    old = _DEFAULTS | settings
    _refuse_other_sizes(old, weights)
    interaction = old["interaction"]
    if not old["condition_images"]:
        interaction = "learned_query" if interaction == "readout" else "visual_prompts"
    first, prompted = old["interaction_layer"], len(weights["visual_prompts.prompts"])
    maps = [old["text_enrichment"], old["text_enrichment"] and old["text_triplets"], old["image_projection"]]
    config = PromptConfig(
        knowledge=old["knowledge"],
        interaction=interaction,
        interaction_options={key: old[name] for key, name in _OPTIONS[interaction].items()},
        depth=first / (first + prompted),
        num_prompts=old["num_prompts"],
        max_triplets=old["max_triplets"],
        enrich=any(maps),
    )
    renamed = {}
    for name, value in weights.items():
        prefix = next((prefix for prefix in _NAMES if name.startswith(prefix)), "")
        renamed[_NAMES.get(prefix, "") + name.removeprefix(prefix)] = value
    states = "text_enrichment.states.weight"
    if states in renamed and config.reads_triplets and not old["text_triplets"]:
        # The last row gives the logit of a state's weight, which is zero for equal weights.
        renamed[states] = torch.cat([renamed[states], torch.zeros_like(renamed[states][:1])])
    return config, renamed, config.enrich and not all(maps)


def _refuse_other_sizes(old: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    null = weights.get("triplet_encoder.null")
    heads = old["triplet_heads"] if null is None else math.gcd(len(null), 8)
    for key, value in {"slot_tokens": SLOT_TOKENS, "triplet_layers": 2, "triplet_heads": heads}.items():
        if old[key] != value:
            raise AmpError(
                f"prompt setting {key} is {old[key]}, expected {value}: other values are no longer "
                "supported. Load the file with open-clip-amp 0.1.0"
            )
