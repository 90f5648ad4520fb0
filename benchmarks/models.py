"""Models and batches that the benchmarks share; weights that start at zero are drawn, or differences would hide."""

from dataclasses import replace

import numpy as np
import torch

from amp.data.stream import Batch
from amp.knowledge.schema import Knowledge
from amp.knowledge.tensors import KnowledgeBatch
from amp.model.clip import ActionAwareCLIP
from amp.model.config import PromptConfig
from amp.model.factory import create_model_and_transforms
from benchmarks.photos import drawn_knowledge
from benchmarks.settings import Settings


def base_model(settings: Settings) -> ActionAwareCLIP:
    """The base CLIP on the device, with the smallest prompts."""
    torch.manual_seed(0)
    model, _, _ = create_model_and_transforms(settings.model, settings.pretrained, device=settings.device)
    return model


def build(base: ActionAwareCLIP, layer: int, **prompt) -> ActionAwareCLIP:
    """An action-aware model on the same CLIP whose prompts enter before block `layer`."""
    torch.manual_seed(0)
    config = replace(PromptConfig(), interaction_layer=layer, **prompt)
    model = ActionAwareCLIP(base.backbone.clip, config, base.tokenizer).to(base.logit_scale.device)
    with torch.no_grad():
        if model.has_readout:
            model.readout.out.weight.normal_(std=0.1)
        elif hasattr(model, "interaction"):
            model.interaction.gate.normal_(std=0.1)
    return model


def drawn_captions(count: int, triplets: int) -> tuple[list[str], list[Knowledge]]:
    """Captions of ten words with as many triplets and states as the model reads."""
    random = np.random.default_rng(0)
    texts, items = zip(*(drawn_knowledge(random, triplets) for _ in range(count)), strict=True)
    return list(texts), list(items)


def random_batch(model: ActionAwareCLIP, size: int) -> Batch:
    """Early tokens, captions and full knowledge of `size` different images, as a run with stored features has them."""
    torch.manual_seed(0)
    backbone, k, s = model.backbone, model.config.max_triplets, model.config.slot_tokens
    knowledge = KnowledgeBatch(
        torch.randint(1000, (size, k, 3, s)),
        torch.ones(size, k, 3, s, dtype=torch.bool),
        torch.randn(size, k, backbone.embed_dim),
        torch.ones(size, k, dtype=torch.bool),
    )
    early = torch.randn(size, backbone.num_tokens, backbone.vision_width)
    base, text = torch.randn(2, size, backbone.embed_dim)
    return Batch(early, base, text, knowledge, torch.arange(size)).to(model.logit_scale.device)
