"""Caption features adapted, and enriched by their knowledge (ours): the text side of action knowledge."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class TextEnrichment(nn.Module):
    """T' = T + U T + mean_k(W D_k), or with triplets T + U T + sum_k a_k (W D_k + V p_k), a = softmax_k(w D_k + v p_k).

    T and D_k are the frozen text tower's features of the caption and its states at unit length, p_k the triplet
    prompts. The paper (sec. 3.5) scores "enhanced text features" without a formula; these are ours. U reads no
    knowledge and is all that the control has. The weights a learn which of a caption's triplets tell images apart: the
    plain mean drowns one action in its attributes (docs/ablations.md). All maps start at zero, so that training starts
    from the base CLIP, and with the mean.

    Args:
        width: Of the joint embedding, d.
        states: Whether there is W.
        triplet_width: Channels of the triplet prompts, d_t; None leaves V, v and w out.
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
        """Args:
            text: Caption features (C, d).
            states: State features (C, K, d); not read where there is no W.
            triplets: Triplet prompts (C, K, d_t); not read where there is no V.
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
        # A caption without knowledge has only weights of zero, not NaN.
        weights = logits.masked_fill(~mask, torch.finfo(torch.float32).min).softmax(dim=1) * mask
        return enriched + (weights.unsqueeze(-1) * values).sum(dim=1)
