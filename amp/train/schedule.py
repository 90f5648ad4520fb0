"""Learning rate and parameter groups."""

import math

import torch


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up over `warmup` steps, then a cosine to zero at `steps`; `step` counts from 0."""
    warmup = min(warmup, max(1, steps // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def adamw(model: torch.nn.Module, lr: float, weight_decay: float, prompt_lr_factor: float = 1.0) -> torch.optim.AdamW:
    """AdamW over the parameters that require gradients. Only matrices decay, not norms, biases, gates and prompts.

    Visual prompts and the temperature learn at `prompt_lr_factor` times the rate of the matrices, at which they would
    hardly move. Each group stores its peak rate as `peak`.
    """
    decay: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    prompts: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            fast = name.startswith("visual_prompts.") or name == "logit_scale"
            (prompts if fast else decay if parameter.ndim == 2 else plain).append(parameter)
    groups = [
        {"params": decay, "weight_decay": weight_decay, "peak": lr},
        {"params": plain, "weight_decay": 0.0, "peak": lr},
        {"params": prompts, "weight_decay": 0.0, "peak": prompt_lr_factor * lr},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.98), eps=1e-6)
