"""Runs CLIP_benchmark (https://github.com/LAION-AI/CLIP_benchmark) with our adapters, as its model type `amp`.

    amp clip_benchmark eval --model_type amp --model ADAPTER --pretrained adapter --dataset cifar10

CLIP_benchmark encodes images and texts separately. Image features that depend on a caption's knowledge belong to a pair
of image and caption, so CLIP_benchmark can only evaluate an adapter without knowledge: it shows what the adapter costs
or gains on other data. To evaluate retrieval with knowledge, use amp evaluate. CLIP_benchmark reads images itself and
ignores their EXIF orientation.
"""

import torch
import torch.nn as nn

from amp.errors import AmpError
from amp.knowledge.schema import Knowledge
from amp.model.clip import ActionAwareCLIP
from amp.model.pretrained import from_pretrained


class WithoutKnowledge(nn.Module):
    """Uses an action-aware model without knowledge, as two independent towers.

    Args:
        model: Model returned by `amp.from_pretrained`.
        base: Whether to return the base model's own features, bit for bit, instead of the adapter's.
    """

    def __init__(self, model: ActionAwareCLIP, base: bool = False):
        super().__init__()
        self.model, self.base = model, base

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Encodes images (B, 3, H, W) to features (B, d), with visual prompts but without knowledge."""
        if self.base:
            return self.model.encode_image(images)
        return self.model.image_features(images)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Encodes tokens (B, context_length) to features (B, d). Text enrichment, if any, gets empty knowledge."""
        if self.base or self.model.text_enrichment is None:
            return self.model.encode_text(tokens)
        return self.model.encode_text(tokens, knowledge=[Knowledge()] * tokens.shape[0])


def load_amp(
    model_name: str, pretrained: str = "adapter", cache_dir: str | None = None, device: str | torch.device = "cpu"
):
    """Loads a model of type `amp` for CLIP_benchmark.

    Args:
        model_name: Adapter, as for `amp.from_pretrained`: a file, a folder, or `hf-hub:ORG/REPO`.
        pretrained: `adapter`, or `base` for the features of the base model.
        cache_dir: Folder for downloaded adapters.
        device: Device of the model.

    Returns:
        Model, image transform and tokenizer.

    Raises:
        AmpError: `pretrained` is unknown, or `from_pretrained` rejects the adapter.
    """
    if pretrained not in ("adapter", "base"):
        raise AmpError(f"pretrained is {pretrained!r}, expected 'adapter' or 'base'")
    model, _, preprocess = from_pretrained(model_name, device=device, cache_dir=cache_dir)
    return WithoutKnowledge(model, base=pretrained == "base"), preprocess, model.tokenizer


def register() -> None:
    """Registers the model type `amp` with CLIP_benchmark's loader."""
    from clip_benchmark import models

    if "amp" not in models.TYPE2FUNC:
        models.TYPE2FUNC["amp"] = load_amp
        models.MODEL_TYPES.append("amp")
