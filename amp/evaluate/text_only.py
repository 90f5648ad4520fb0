"""The text-only control: measures what knowledge contributes through the frozen text tower only."""

import torch
import torch.nn.functional as F

from amp.knowledge.tensors import KnowledgeBatch


def enriched_text(text: torch.Tensor, knowledge: KnowledgeBatch) -> torch.Tensor:
    """Returns caption features plus the mean of their states' features, (C, d), with unit length.

    The features of captions without states are only normalized.
    """
    mask = knowledge.mask.to(text.device).unsqueeze(-1)
    states = F.normalize(knowledge.states.to(text.device).float(), dim=-1) * mask
    mean = states.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    return F.normalize(F.normalize(text.float(), dim=-1) + mean, dim=-1)
