"""What each training stage optimises (paper, sec. 3.4): all new parameters first, then only the interaction."""

import torch.nn as nn

from amp.model.clip import ActionAwareCLIP


def trainable_names(model: ActionAwareCLIP, stage: int) -> set[str]:
    """Names of the parameters a stage trains; CLIP itself is frozen in both.

    Stage 1 trains every new parameter and the temperature. Stage 2 trains the interaction alone; the texts' enrichment
    stays as stage 1 left it. The control without knowledge has no interaction, so there its visual prompts go on
    (ours), to give both the same number of steps. Nor has `cat`, where the prompts are concatenated: there stage 2
    trains the adapter, all that lies between the prompts and the tokens (ours). With `readout` it is the readout, in
    the control too.
    """
    # Without its empty ones: with `num_prompts` 0 the visual prompts take no part in the loss, and DDP would wait.
    names = {name for name, p in model.named_parameters() if not name.startswith("backbone.") and p.numel()}
    if stage == 2:
        part = "visual_prompts."
        if model.has_readout:
            part = "readout."
        elif model.knowledge_aware:
            part = "interaction." if model.config.interaction == "aim" else "adapter."
        names = {name for name in names if name.startswith(part)}
    return names


def set_trainable(model: ActionAwareCLIP, stage: int) -> list[nn.Parameter]:
    """Sets `requires_grad` for a stage and returns what it optimises; call before an engine wraps the model."""
    names = trainable_names(model, stage)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
