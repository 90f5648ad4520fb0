"""Attention maps over an image, one for each triplet and one for each state."""

import torch

from amp.knowledge.tensors import Captions, KnowledgeBatch
from amp.model.clip import ActionAwareCLIP


@torch.no_grad()
def attention_maps(model: ActionAwareCLIP, early: torch.Tensor, knowledge: KnowledgeBatch) -> dict[str, torch.Tensor]:
    """Computes the attention of each triplet of one caption to the patches of an image, independent of the others.

    Args:
        model: Model in eval mode.
        early: Tokens of one image before the first prompted block, (1, F + M, d_v).
        knowledge: Knowledge of one caption.

    Returns:
        Maps `triplet` and `state`, each (K', h, w) for the K' triplets that exist; each map sums to one. Without
        `triplet` or `state` if the model doesn't read it, and empty for interactions without attention.
    """
    if not knowledge.mask.any():
        return {}
    triplets = model.encode_triplets(knowledge)
    maps = model.interaction.attention(model.tower, early, Captions(knowledge), triplets)
    return {name: x.unflatten(1, model.backbone.grid_size) for name, x in maps.items()}
