"""The text-only control: what knowledge gives through the frozen text tower, without any action-aware image."""

import torch
import torch.nn.functional as F

from amp.knowledge.tensors import KnowledgeBatch


def enriched_text(text: torch.Tensor, knowledge: KnowledgeBatch) -> torch.Tensor:
    """Caption features plus the mean of their states' features, (C, d), unit length.

    Captions without states stay as they are.
    """
    mask = knowledge.mask.to(text.device).unsqueeze(-1)
    states = F.normalize(knowledge.states.to(text.device).float(), dim=-1) * mask
    mean = states.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    return F.normalize(F.normalize(text.float(), dim=-1) + mean, dim=-1)
