"""Models and batches of the benchmarks. Weights that start at zero are random here, so that they have an effect."""

import numpy as np
import torch

from amp.data.stream import Batch
from amp.knowledge.schema import Knowledge
from amp.knowledge.tensors import KnowledgeBatch
from amp.knowledge.text import SLOT_TOKENS
from amp.model.clip import ActionAwareCLIP
from amp.model.config import PromptConfig
from amp.model.factory import create_model_and_transforms
from benchmarks.photos import drawn_knowledge
from benchmarks.settings import Settings

# Common settings of all rows: four visual prompts, and CLIP's own text features.
PLAIN = {"interaction": "aim", "num_prompts": 4, "enrich": False}
# `readout` without trained blocks of its own.
READ_LAST = {"interaction": "readout", "interaction_options": {"blocks": 0}}


def base_model(settings: Settings) -> ActionAwareCLIP:
    """Loads the base CLIP on the device."""
    torch.manual_seed(0)
    model, _, _ = create_model_and_transforms(settings.model, settings.pretrained, device=settings.device)
    return model


def build(base: ActionAwareCLIP, layer: int, **prompt) -> ActionAwareCLIP:
    """Builds an action-aware model on the same CLIP; prompts enter before block `layer`, by default with `aim`."""
    torch.manual_seed(0)
    config = PromptConfig(**{**PLAIN, "depth": layer / base.backbone.num_layers, **prompt})
    model = ActionAwareCLIP(base.backbone.clip, config, base.tokenizer).to(base.logit_scale.device)
    with torch.no_grad():
        for name, parameter in model.interaction.named_parameters():
            if name in ("readout.out.weight", "aim.gate"):
                parameter.normal_(std=0.1)
    return model


def drawn_captions(count: int, triplets: int) -> tuple[list[str], list[Knowledge]]:
    """Returns `count` random captions of ten words, each with `triplets` triplets and states."""
    random = np.random.default_rng(0)
    texts, items = zip(*(drawn_knowledge(random, triplets) for _ in range(count)), strict=True)
    return list(texts), list(items)


def random_batch(model: ActionAwareCLIP, size: int) -> Batch:
    """Returns a random batch of `size` different images with early tokens, as in a run with stored features."""
    torch.manual_seed(0)
    backbone, k, s = model.backbone, model.config.max_triplets, SLOT_TOKENS
    knowledge = KnowledgeBatch(
        torch.randint(1000, (size, k, 3, s)),
        torch.ones(size, k, 3, s, dtype=torch.bool),
        torch.randn(size, k, backbone.embed_dim),
        torch.ones(size, k, dtype=torch.bool),
    )
    early = torch.randn(size, backbone.num_tokens, backbone.vision_width)
    base, text = torch.randn(2, size, backbone.embed_dim)
    return Batch(early, base, text, knowledge, torch.arange(size)).to(model.logit_scale.device)
