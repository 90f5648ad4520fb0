"""Leak probes: the same search with one input spoilt, to show what a model reads (docs/evaluation.md, "Probes").

An image conditioned on a caption's knowledge has seen part of the answer. A model that reads the photo falls to chance
on grey images; one that reads the knowledge falls with shuffled knowledge; one that does neither ignores both.
"""

import copy
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from amp.data.frozen_features import FrozenFeatures
from amp.errors import AmpError
from amp.knowledge.tensors import KnowledgeBatch
from amp.retrieval.first_stage import FirstStage
from amp.retrieval.split_search import SplitSearch

Probe = Literal["shuffled", "blank", "sibling", "grey"]
GREY = (128, 128, 128)


def probe(retrieval: SplitSearch, name: Probe, model, preprocess, seed: int = 0) -> SplitSearch:
    """The same queries, candidates and captions with one input replaced.

    Args:
        retrieval: Of the split; left as it is.
        name: ``shuffled``: each caption gets the knowledge of a caption of another image. ``blank``: no caption has
            knowledge. ``sibling``: each caption gets the knowledge of another caption of its image. ``grey``: every
            image that is re-ranked is a constant grey one; the pre-selection still saw the photo, so the figure to
            compare with is the row "chance".
        model: `ActionAwareCLIP`, which encodes the grey image.
        preprocess: The validation transform.
        seed: Of the shuffle.
    """
    spoilt, knowledge = copy.copy(retrieval), retrieval.knowledge
    assert knowledge is not None, "the base model alone reads none and can't be probed"
    owner = retrieval.captions.image
    if name == "shuffled":
        spoilt.knowledge = knowledge[shuffled(owner, seed)]
    elif name == "sibling":
        spoilt.knowledge = knowledge[siblings(owner)]
    elif name == "blank":
        spoilt.knowledge = knowledge.blank()
    elif name == "grey":
        spoilt.frozen = grey(retrieval.frozen, model, preprocess)
        # One image a thousand times ties all its scores, and ties keep the order of the candidates: the first stage's.
        spoilt.first = {direction: in_random_order(first, seed) for direction, first in retrieval.first.items()}
    else:
        raise AmpError(f"probe is {name!r}, expected shuffled, blank, sibling or grey")
    return spoilt


def in_random_order(first: FirstStage, seed: int) -> FirstStage:
    """The same candidates of each query in a random order, so that ties tell nothing."""
    order = torch.rand(first.candidates.shape, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return FirstStage(first.candidates.gather(1, order), first.scores.gather(1, order), first.ranks)


def shuffled(owner: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """For each caption a caption of another image, each taken once, int64 (C,).

    Captions in a random order of images are shifted by the size of the largest image, which always leaves the image.

    Args:
        owner: Image of each caption, int64 (C,).
        seed: Of the order.

    Raises:
        AmpError: One image has more than half of the captions, so that no such order exists.
    """
    most = int(torch.bincount(owner).max())
    if 2 * most > len(owner):
        raise AmpError(
            f"one image has {most} of {len(owner)} captions, expected half at most: its captions can't all get the "
            "knowledge of another image. Leave the probe 'shuffled' out"
        )
    generator = np.random.default_rng(seed)
    place = torch.from_numpy(generator.permutation(int(owner.max()) + 1))
    within = torch.from_numpy(generator.permutation(len(owner)))
    order = within[place[owner[within]].argsort(stable=True)]
    source = torch.empty_like(order)
    source[order] = order.roll(-most)
    return source


def siblings(owner: torch.Tensor) -> torch.Tensor:
    """For each caption the next one of its image, the first after the last, int64 (C,); itself where it is alone."""
    order = owner.argsort(stable=True)
    sizes = torch.bincount(owner)
    sizes = sizes[sizes > 0]
    starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    length = torch.repeat_interleave(sizes, sizes)
    turned = starts + (torch.arange(len(owner)) - starts + 1) % length
    source = torch.empty_like(order)
    source[order] = order[turned]
    return source


def grey(frozen: FrozenFeatures, model, preprocess) -> FrozenFeatures:
    """Stored features with one grey image's early tokens in place of every image's."""
    height, width = model.backbone.visual.image_size
    image = preprocess(Image.new("RGB", (width, height), GREY))[None].to(model.logit_scale.device)
    with torch.no_grad():
        early = model(image).early.float().cpu().numpy()
    return FrozenFeatures(np.broadcast_to(early, (len(frozen.base), *early.shape[1:])), frozen.base)


def enriched_text(text: torch.Tensor, knowledge: KnowledgeBatch) -> torch.Tensor:
    """Caption features plus the mean of their states' features, (C, d), unit length.

    The text-only control: whatever knowledge gives through the text tower alone, without any action-aware image.
    Captions without states stay as they are.
    """
    mask = knowledge.mask.to(text.device).unsqueeze(-1)
    states = F.normalize(knowledge.states.to(text.device).float(), dim=-1) * mask
    mean = states.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    return F.normalize(F.normalize(text.float(), dim=-1) + mean, dim=-1)
