"""Frozen CLIP models by their image tower. A new tower is a file and a line of `TOWERS`, or `register_tower`."""

import torch.nn as nn
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer

from amp.model.towers.base import Backbone, unsupported_tower
from amp.model.towers.open_clip_vit import OpenClipBackbone
from amp.model.towers.timm import TimmBackbone
from amp.plugins import load_plugins

# By the class of `clip.visual`.
TOWERS: dict[type[nn.Module], type[Backbone]] = {VisionTransformer: OpenClipBackbone, TimmModel: TimmBackbone}


def register_tower(visual: type[nn.Module], backbone: type[Backbone]) -> None:
    """Makes CLIP models known whose image tower has the class `visual`.

    Args:
        visual: Class of `clip.visual`.
        backbone: What stands for such a model.
    """
    TOWERS[visual] = backbone


def make_backbone(clip: nn.Module) -> Backbone:
    """The `Backbone` of any CLIP whose image tower is a plain transformer.

    Raises:
        AmpError: Another image tower (ResNet, ConvNeXt, Swin, a hybrid), or an unknown text tower.
    """
    load_plugins()
    visual = getattr(clip, "visual", None)
    for kind, backbone in TOWERS.items():
        if isinstance(visual, kind):
            return backbone(clip)
    raise unsupported_tower(type(visual).__name__ if visual is not None else f"missing in {type(clip).__name__}")
