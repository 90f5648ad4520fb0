"""Caption features, adapted and enriched by their knowledge (our choice)."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class TextEnrichment(nn.Module):
    """T' = T + U T + mean_k(W D_k), or with triplets T + U T + sum_k a_k (W D_k + V p_k), a = softmax_k(w D_k + v p_k).

    T and D_k are the frozen text tower's features of the caption and its states at unit length, p_k the triplet
    prompts. The paper (sec. 3.5) scores "enhanced text features" without giving a formula; these are our choice. U
    reads no knowledge and is the only map of the control. The weights a learn which of a caption's triplets distinguish
    images: in a plain mean, attributes outweigh a single action (docs/ablations.md). All maps start at zero, so
    training starts from the base CLIP and with the mean.

    Args:
        width: Width of the joint embedding, d.
        states: Whether W exists.
        triplet_width: Channels of the triplet prompts, d_t; None leaves out V, v and w.
    """

    def __init__(self, width: int, states: bool = True, triplet_width: int | None = None):
        super().__init__()
        self.adapt = nn.Linear(width, width, bias=False)
        outputs = width + 1 if triplet_width else width  # the last channel is the logit of a_k
        self.states = nn.Linear(width, outputs, bias=False) if states else None
        self.triplets = nn.Linear(triplet_width, outputs, bias=False) if triplet_width else None
        for layer in (self.adapt, self.states, self.triplets):
            if layer is not None:
                nn.init.zeros_(layer.weight)

    def forward(
        self, text: torch.Tensor, states: torch.Tensor, triplets: torch.Tensor | None, mask: torch.Tensor
    ) -> torch.Tensor:
        """Enriches the features of C captions.

        Args:
            text: Caption features (C, d).
            states: State features (C, K, d); not read without W.
            triplets: Triplet prompts (C, K, d_t); not read without V.
            mask: Which of the K exist, bool (C, K).

        Returns:
            Enriched features, fp32 (C, d), not normalised.
        """
        text = F.normalize(text.float(), dim=-1)
        enriched = text + self.adapt(text.to(self.adapt.weight.dtype)).float()
        parts = []
        if self.states is not None:
            parts.append(self.states(F.normalize(states.float(), dim=-1).to(self.states.weight.dtype)))
        if self.triplets is not None:
            parts.append(self.triplets(triplets))
        if not parts:
            return enriched
        values = sum(parts).float()
        logits = values.new_zeros(mask.shape)
        if self.triplets is not None:
            values, logits = values[..., :-1], values[..., -1]
        # A caption without knowledge has weights of zero, not NaN.
        weights = logits.masked_fill(~mask, torch.finfo(torch.float32).min).softmax(dim=1) * mask
        return enriched + (weights.unsqueeze(-1) * values).sum(dim=1)
