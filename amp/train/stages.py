"""Parameters trained in each stage (paper, sec. 3.4): first all new ones, then only the interaction."""

import torch.nn as nn

from amp.model.clip import ActionAwareCLIP


def trainable_names(model: ActionAwareCLIP, stage: int) -> set[str]:
    """Names of the parameters that a stage trains; CLIP itself is frozen in both.

    Stage 1 trains every new parameter and the temperature. Stage 2 trains the part that the interaction names
    (`Interaction.stage2`); the text enrichment stays as stage 1 left it.
    """
    # Empty parameters are skipped: with `num_prompts` 0 the visual prompts are unused, and DDP would wait for them.
    names = {name for name, p in model.named_parameters() if not name.startswith("backbone.") and p.numel()}
    return names if stage == 1 else {name for name in names if name.startswith(model.interaction.stage2)}


def set_trainable(model: ActionAwareCLIP, stage: int) -> list[nn.Parameter]:
    """Sets `requires_grad` for a stage and returns its parameters. Call this before an engine wraps the model."""
    names = trainable_names(model, stage)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
