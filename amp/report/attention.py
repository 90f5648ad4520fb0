"""Attention maps over an image, one for each triplet and one for each state, and the part of the image they cover."""

from collections.abc import Callable
from dataclasses import replace

import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms import Compose

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


def model_view(preprocess_cfg: dict, size: int) -> Callable[[Image.Image], Image.Image]:
    """Returns the model's crop of a photo, which attention maps cover, at a higher resolution.

    Args:
        preprocess_cfg: How photos are resized, as open_clip stores it (`visual.preprocess_cfg`).
        size: Width and height of the result in pixels.
    """
    cfg = replace(PreprocessCfg(**preprocess_cfg), size=size)
    return Compose(image_transform_v2(cfg, is_train=False).transforms[:-2])
