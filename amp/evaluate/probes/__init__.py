"""Leak probes: the same search with one input spoilt, to show what a model reads (docs/evaluation.md, "Probes").

An image conditioned on a caption's knowledge has seen part of the answer. A model that reads the photo falls to chance
on grey images; one that reads the knowledge falls with shuffled knowledge; one that does neither ignores both.

A new probe is a function and a line of `PROBES`, or a call of `register_probe` from anywhere (docs/extending.md).
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
    """One way to spoil an input.

    Attributes:
        spoil: Called as spoil(search, model, preprocess, seed); replaces one input of `search`, which is a copy of its
            own. Queries, candidates and frozen caption features should stay.
        check: Called with the split's captions before a model is loaded; raises AmpError where they can't be spoilt.
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
    """Makes a probe known to ``amp evaluate --probes``.

    Args:
        name: What the option and the table's rows call it.
        spoil, check: As for `Probe`.
    """
    PROBES[name] = Probe(spoil, check)


def check_probes(names: Sequence[str], captions: SplitCaptions | None = None) -> None:
    """Refuses unknown names and, once the captions have been read, probes that these don't allow.

    Raises:
        AmpError: Naming the first such probe.
    """
    load_plugins()
    for name in names:
        if name not in PROBES:
            raise AmpError(
                f"probes holds {name!r}, expected some of {', '.join(PROBES)}; a probe of another package is found "
                "where AMP_PLUGINS names its module"
            )
        check = PROBES[name].check
        if captions is not None and check is not None:
            check(captions)


def probe(retrieval: SplitSearch, name: str, model, preprocess, seed: int = 0) -> SplitSearch:
    """The same queries, candidates and captions with one input replaced.

    Args:
        retrieval: Search of the split; left as it is.
        name: A name of the registry.
        model: `ActionAwareCLIP` that will re-rank.
        preprocess: The validation transform.
        seed: Random seed of what a probe draws.
    """
    check_probes([name])
    assert retrieval.knowledge is not None, "the base model alone reads none and can't be probed"
    spoilt = copy.copy(retrieval)
    PROBES[name].spoil(spoilt, model, preprocess, seed)
    return spoilt
