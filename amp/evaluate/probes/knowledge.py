"""Probes that replace the captions' knowledge: by another image's, by none, by another caption's of the same image."""

import numpy as np
import torch

from amp.data.split_captions import SplitCaptions
from amp.errors import AmpError
from amp.retrieval.split_search import SplitSearch


def shuffled(search: SplitSearch, model, preprocess, seed: int) -> None:
    """Each caption gets the knowledge of a caption of another image."""
    _take(search, other_images(search.captions.image, seed))


def blank(search: SplitSearch, model, preprocess, seed: int) -> None:
    """No caption has knowledge."""
    assert search.knowledge is not None
    search.knowledge = search.knowledge.blank()


def sibling(search: SplitSearch, model, preprocess, seed: int) -> None:
    """Each caption gets the knowledge of another caption of its image."""
    _take(search, siblings(search.captions.image))


def _take(search: SplitSearch, source: torch.Tensor) -> None:
    assert search.knowledge is not None
    search.knowledge = search.knowledge[source]


def can_shuffle(captions: SplitCaptions) -> None:
    """Raises AmpError where captions can't all get the knowledge of another image."""
    other_images(captions.image)


def other_images(owner: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """For each caption a caption of another image, each taken once, int64 (C,).

    Captions in a random order of images are shifted by the size of the largest image, which always leaves the image.

    Args:
        owner: Image of each caption, int64 (C,).
        seed: Random seed of the order.

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
    """For each caption the next one of its image, the first after the last, int64 (C,); itself where it is the only
    one."""
    order = owner.argsort(stable=True)
    sizes = torch.bincount(owner)
    sizes = sizes[sizes > 0]
    starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    length = torch.repeat_interleave(sizes, sizes)
    turned = starts + (torch.arange(len(owner)) - starts + 1) % length
    source = torch.empty_like(order)
    source[order] = order[turned]
    return source
