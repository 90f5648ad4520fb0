"""Caption features adapted, and enriched by their states (ours): the text side of action knowledge."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class TextEnrichment(nn.Module):
    """T' = T / |T| + U T / |T| + W mean_k(D_k / |D_k|), with D_k the states' features from the frozen text tower.

    The paper (sec. 3.5) scores "enhanced text features" without a formula; this one is ours. U reads no knowledge
    and is all that the control has. U and W start at zero, so that training starts from the base CLIP.

    Args:
        width: Of the joint embedding, d.
        states: Whether there is W.
    """

    def __init__(self, width: int, states: bool = True):
        super().__init__()
        self.adapt = nn.Linear(width, width, bias=False)
        self.project = nn.Linear(width, width, bias=False) if states else None
        for layer in (self.adapt, self.project):
            if layer is not None:
                nn.init.zeros_(layer.weight)

    def forward(self, text: torch.Tensor, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Args:
            text: Caption features (C, d).
            states: State features (C, K, d); not read where there is no W.
            mask: Which states exist, bool (C, K).

        Returns:
            Enriched features, fp32 (C, d), not normalised.
        """
        text = F.normalize(text.float(), dim=-1)
        enriched = text + self.adapt(text.to(self.adapt.weight.dtype)).float()
        if self.project is None:
            return enriched
        present = mask.unsqueeze(-1).float()
        mean = (F.normalize(states.float(), dim=-1) * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)
        return enriched + self.project(mean.to(self.project.weight.dtype)).float()
