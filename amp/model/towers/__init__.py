"""Frozen CLIP models by their image tower.

To add a tower, add a file and a line in `TOWERS`, or call `register_tower`.
"""

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
    """Registers a backbone for CLIP models whose image tower has the class `visual`.

    Args:
        visual: Class of `clip.visual`.
        backbone: `Backbone` class for such models.
    """
    TOWERS[visual] = backbone


def make_backbone(clip: nn.Module) -> Backbone:
    """The `Backbone` of any CLIP whose image tower is a plain transformer.

    Raises:
        AmpError: The image tower is not supported (ResNet, ConvNeXt, Swin, a hybrid), or the text tower is unknown.
    """
    load_plugins()
    visual = getattr(clip, "visual", None)
    for kind, backbone in TOWERS.items():
        if isinstance(visual, kind):
            return backbone(clip)
    raise unsupported_tower(type(visual).__name__ if visual is not None else f"missing in {type(clip).__name__}")
