"""The probe that replaces every re-ranked image by a uniformly grey one.

The pre-selection still uses the photo, so compare the result with the row "chance".
"""

import numpy as np
import torch
from PIL import Image

from amp.data.frozen_features import FrozenFeatures
from amp.retrieval.first_stage import FirstStage
from amp.retrieval.split_search import SplitSearch

GREY = (128, 128, 128)


def grey(search: SplitSearch, model, preprocess, seed: int) -> None:
    """Replaces every re-ranked image by a uniformly grey one."""
    search.frozen = grey_features(search.frozen, model, preprocess)
    # Identical images have equal scores, and ties keep the order of the candidates. The first stage's order would
    # reveal its ranking.
    search.first = {direction: in_random_order(first, seed) for direction, first in search.first.items()}


def in_random_order(first: FirstStage, seed: int) -> FirstStage:
    """Shuffles the candidates of each query, so that ties do not keep the first stage's order."""
    order = torch.rand(first.candidates.shape, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return FirstStage(first.candidates.gather(1, order), first.scores.gather(1, order), first.ranks)


def grey_features(frozen: FrozenFeatures, model, preprocess) -> FrozenFeatures:
    """Returns stored features in which every image has the early tokens of one grey image."""
    height, width = model.backbone.visual.image_size
    image = preprocess(Image.new("RGB", (width, height), GREY))[None].to(model.logit_scale.device)
    with torch.no_grad():
        early = model(image).early.float().cpu().numpy()
    return FrozenFeatures(np.broadcast_to(early, (len(frozen.base), *early.shape[1:])), frozen.base)
