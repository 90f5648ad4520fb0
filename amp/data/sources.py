"""Sources of a training set: folders of shards, local or remote, each with a weight."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from amp.data.remote.location import Location, is_url, public_url
from amp.errors import AmpError

Sources = str | Path | Location | Sequence[str]
"""One folder of shards, or several; each a path or URL, with `@WEIGHT` after it if the weight isn't 1."""

_WEIGHT = re.compile(r"(?P<folder>.+)@(?P<weight>[0-9.]+)", re.DOTALL)
_BRACES = re.compile(r"(?P<head>.*?)\{(?P<names>[^{}]*,[^{}]*)\}(?P<tail>.*)", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """A folder of shards and its weight.

    Attributes:
        folder: The folder.
        weight: How often an epoch contains each sample: 3 is three times, 1/2 is half of the samples.
    """

    folder: Path | Location
    weight: Fraction = Fraction(1)


def sources_of(given: Sources) -> list[Source]:
    """Parses sources: `data/coco`, `data/mine@3`, `s3://bucket/{coco,flickr30k}`.

    A local folder that exists is taken as it is, even if its name looks like one of these.

    Raises:
        AmpError: There is none, or a weight isn't a number above 0.
    """
    if isinstance(given, (Path, Location)):
        return [Source(given)]
    texts = [given] if isinstance(given, str) else list(given)
    if not texts or not all(texts):
        raise AmpError("no folder of shards is given; add --data.shards DIR")
    return [source for text in texts for source in _parsed(text)]


def _parsed(text: str) -> list[Source]:
    if not is_url(text) and Path(text).exists():
        return [Source(Path(text))]
    if braces := _BRACES.fullmatch(text):
        return [
            source
            for name in braces["names"].split(",")
            for source in _parsed(f"{braces['head']}{name}{braces['tail']}")
        ]
    weight = Fraction(1)
    if weighted := _WEIGHT.fullmatch(text):
        text = weighted["folder"]
        try:
            weight = Fraction(weighted["weight"]).limit_denominator(10_000)
        except ValueError:
            weight = Fraction(0)
        if not 0 < weight <= 1000:
            raise AmpError(
                f"data.shards: the weight of {public_url(text)} is {weighted['weight']}; expected a number above 0 and "
                "at most 1000; write FOLDER@3 or FOLDER@0.5"
            )
    return [Source(Location.parse(text) if is_url(text) else Path(text), weight)]


def public_sources(given: str | list[str]) -> str | list[str]:
    """Sources without passwords and query strings, for records."""
    if isinstance(given, list):
        return [str(public_sources(text)) for text in given]
    if not is_url(given):
        return given
    weighted = _WEIGHT.fullmatch(given)
    return public_url(given) if weighted is None else f"{public_url(weighted['folder'])}@{weighted['weight']}"
