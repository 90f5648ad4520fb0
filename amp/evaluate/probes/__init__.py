"""Leak probes: the same search with one input corrupted, to show what a model uses (docs/evaluation.md, "Probes").

An image feature conditioned on a caption's knowledge contains part of the answer. A model that uses the photo drops to
chance on grey images. A model that uses the knowledge drops with shuffled knowledge. A model that does not change
ignores the corrupted input.

To add a probe, write a function and add it to `PROBES`, or call `register_probe` from any module (docs/extending.md).
"""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

from amp.data.split_captions import SplitCaptions
from amp.errors import AmpError
from amp.evaluate.probes.grey import grey
from amp.evaluate.probes.knowledge import blank, can_shuffle, shuffled, sibling
from amp.plugins import load_plugins
from amp.retrieval.split_search import SplitSearch

Spoil = Callable[[SplitSearch, object, Callable, int], None]
Check = Callable[[SplitCaptions], None]


class Probe(NamedTuple):
    """One way to corrupt an input.

    Attributes:
        spoil: Called as spoil(search, model, preprocess, seed). It replaces one input of `search`, a copy made for the
            probe, and should leave queries, candidates and frozen caption features unchanged.
        check: Called with the split's captions before a model is loaded. It raises `AmpError` if the probe can't be
            applied to them.
    """

    spoil: Spoil
    check: Check | None = None


PROBES: dict[str, Probe] = {
    "shuffled": Probe(shuffled, can_shuffle),
    "blank": Probe(blank),
    "sibling": Probe(sibling),
    "grey": Probe(grey),
}


def register_probe(name: str, spoil: Spoil, check: Check | None = None) -> None:
    """Registers a probe for `amp evaluate --probes`.

    Args:
        name: Name of the probe in the option and in the rows of the table.
        spoil, check: As for `Probe`.
    """
    PROBES[name] = Probe(spoil, check)


def check_probes(names: Sequence[str], captions: SplitCaptions | None = None) -> None:
    """Checks the names of probes and, if `captions` are given, that the probes can be applied to them.

    Raises:
        AmpError: A probe is unknown or can't be applied. The message is about the first such probe.
    """
    load_plugins()
    for name in names:
        if name not in PROBES:
            raise AmpError(
                f"probes contains {name!r}, expected some of {', '.join(PROBES)}; to use a probe of another package, "
                "name its module in AMP_PLUGINS"
            )
        check = PROBES[name].check
        if captions is not None and check is not None:
            check(captions)


def probe(retrieval: SplitSearch, name: str, model, preprocess, seed: int = 0) -> SplitSearch:
    """Returns a copy of a search with one input corrupted.

    Args:
        retrieval: Search of the split. It is not modified.
        name: Name of a registered probe.
        model: `ActionAwareCLIP` that will re-rank.
        preprocess: Validation transform.
        seed: Random seed of the probe.
    """
    check_probes([name])
    assert retrieval.knowledge is not None, "the base model uses no knowledge and can't be probed"
    corrupted = copy.copy(retrieval)
    PROBES[name].spoil(corrupted, model, preprocess, seed)
    return corrupted
