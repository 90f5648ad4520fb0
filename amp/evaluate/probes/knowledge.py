"""Probes that replace the knowledge of captions: by that of another image, by none, or by that of a sibling caption."""

import numpy as np
import torch

from amp.data.split_captions import SplitCaptions
from amp.errors import AmpError
from amp.retrieval.split_search import SplitSearch


def shuffled(search: SplitSearch, model, preprocess, seed: int) -> None:
    """Gives each caption the knowledge of a caption of another image."""
    _take(search, other_images(search.captions.image, seed))


def blank(search: SplitSearch, model, preprocess, seed: int) -> None:
    """Removes the knowledge of all captions."""
    assert search.knowledge is not None
    search.knowledge = search.knowledge.blank()


def sibling(search: SplitSearch, model, preprocess, seed: int) -> None:
    """Gives each caption the knowledge of another caption of the same image."""
    _take(search, siblings(search.captions.image))


def _take(search: SplitSearch, source: torch.Tensor) -> None:
    assert search.knowledge is not None
    search.knowledge = search.knowledge[source]


def can_shuffle(captions: SplitCaptions) -> None:
    """Raises `AmpError` if not all captions can get the knowledge of another image."""
    other_images(captions.image)


def other_images(owner: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Assigns a caption of another image to each caption, using each caption once.

    The captions are grouped by image, in a random order of images, and shifted by the size of the largest group. This
    always leads to another image.

    Args:
        owner: Image of each caption, int64 (C,).
        seed: Random seed of the order.

    Returns:
        Index of the assigned caption, int64 (C,).

    Raises:
        AmpError: One image has more than half of the captions, so no such assignment exists.
    """
    most = int(torch.bincount(owner).max())
    if 2 * most > len(owner):
        raise AmpError(
            f"one image has {most} of {len(owner)} captions, expected at most half, since its captions can't all get "
            "the knowledge of another image; leave out the probe 'shuffled'"
        )
    generator = np.random.default_rng(seed)
    place = torch.from_numpy(generator.permutation(int(owner.max()) + 1))
    within = torch.from_numpy(generator.permutation(len(owner)))
    order = within[place[owner[within]].argsort(stable=True)]
    source = torch.empty_like(order)
    source[order] = order.roll(-most)
    return source


def siblings(owner: torch.Tensor) -> torch.Tensor:
    """Index of the next caption of the same image, cyclically, int64 (C,); the caption itself if it has no sibling."""
    order = owner.argsort(stable=True)
    sizes = torch.bincount(owner)
    sizes = sizes[sizes > 0]
    starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    length = torch.repeat_interleave(sizes, sizes)
    turned = starts + (torch.arange(len(owner)) - starts + 1) % length
    source = torch.empty_like(order)
    source[order] = order[turned]
    return source
