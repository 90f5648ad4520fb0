"""Allowed names of splits, and other spellings of train, val and test."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from amp.errors import AmpError, shorten

# Spellings of the three usual splits, in lower case. Any other name is kept.
_STORED_AS = {
    "training": "train",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "development": "val",
    "testing": "test",
} | {name: name for name in ("train", "val", "test")}


def normal_split(value: Any, where: str, known: Iterable[str] = ()) -> str:
    """The name under which a split is stored: "train", "val" or "test" for their other spellings.

    Args:
        value: Name of the split.
        where: Start of error messages.
        known: Names that are kept as they are, such as those of existing shards.

    Raises:
        AmpError: The name contains other characters than ASCII letters, digits, `_` and `-`. It is part of the shards'
            file names.
    """
    if not isinstance(value, str) or not value.isascii() or not value.replace("_", "a").replace("-", "a").isalnum():
        raise AmpError(
            f"{where}: 'split' is {shorten(value)}; expected a name of letters, digits, '_' and '-', such as 'train'; "
            "rename it"
        )
    return value if value in known else _STORED_AS.get(value.lower(), value)


class SplitNames:
    """Maps the split names of one captions file to the names under which they are stored.

    Args:
        default: Split of images without a split.
        keep_restval: Whether to keep Karpathy's `restval` as a separate split instead of adding it to train.

    Raises:
        AmpError: See `normal_split`.
    """

    def __init__(self, default: str = "train", keep_restval: bool = False) -> None:
        self.default, self.keep_restval = normal_split(default, "default_split"), keep_restval
        self._stored: dict[str, str] = {}

    def normal(self, value: Any, where: str) -> str:
        """Like `normal_split`, but refuses to merge two names into one split.

        Raises:
            AmpError: See `normal_split`; or two names are stored as one, such as "val" and "dev".
        """
        name = value.strip() if isinstance(value, str) and value.strip().lower() in _STORED_AS else value
        if isinstance(name, str) and name in self._stored:
            return self._stored[name]
        stored = normal_split(name, where)
        for other, other_stored in self._stored.items():
            if other_stored == stored and other.lower() != name.lower():
                raise AmpError(
                    f"{where}: 'split' is {name!r}, but {other!r} was used above; both would be stored as {stored!r}; "
                    "expected one name per split; rename one of them"
                )
        self._stored[name] = stored
        return stored

    def notes(self, path: Path) -> list[str]:
        """A note for the user if splits are stored under other names."""
        renamed = [f"{name!r} as {stored!r}" for name, stored in self._stored.items() if name != stored]
        return [f"{path}: splits stored: {', '.join(renamed)}"] if renamed else []
