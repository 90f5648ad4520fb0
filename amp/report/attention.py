"""Where a model looks in a photo because of one triplet or its state, as one map per triplet."""

import torch

from amp.knowledge.tensors import Captions, KnowledgeBatch
from amp.model.clip import ActionAwareCLIP


@torch.no_grad()
def attention_maps(model: ActionAwareCLIP, early: torch.Tensor, knowledge: KnowledgeBatch) -> dict[str, torch.Tensor]:
    """Attention of each triplet of one caption to the patches of an image, each triplet by itself.

    Args:
        model: In eval mode.
        early: Tokens of one image before the first prompted block, (1, F + M, d_v).
        knowledge: Knowledge of one caption.

    Returns:
        ``triplet`` and ``state``, each (K', h, w) for the K' triplets that exist, with maps that sum to one; without a
        kind that the model doesn't read, and empty for interactions without attention.
    """
    if not knowledge.mask.any():
        return {}
    triplets = model.encode_triplets(knowledge)
    maps = model.interaction.attention(model.tower, early, Captions(knowledge), triplets)
    return {name: x.unflatten(1, model.backbone.grid_size) for name, x in maps.items()}
