"""Caption features enriched by their states (ours): the text side of action knowledge."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class TextEnrichment(nn.Module):
    """T' = T / |T| + W mean_k(D_k / |D_k|), with D_k the states' features from the frozen text tower.

    Ours: the paper scores against the plain caption feature. W starts at zero, so that training starts from the base
    CLIP, and captions without knowledge keep their feature.

    Args:
        width: Of the joint embedding, d.
    """

    def __init__(self, width: int):
        super().__init__()
        self.project = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.project.weight)

    def forward(self, text: torch.Tensor, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Args:
            text: Caption features (C, d).
            states: State features (C, K, d).
            mask: Which states exist, bool (C, K).

        Returns:
            Enriched features, fp32 (C, d), not normalised.
        """
        present = mask.unsqueeze(-1).float()
        mean = (F.normalize(states.float(), dim=-1) * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)
        return F.normalize(text.float(), dim=-1) + self.project(mean.to(self.project.weight.dtype)).float()
