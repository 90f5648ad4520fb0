"""Results of the checks of a plan: each finding is ok, a note, a warning or an error."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal, NamedTuple

from amp.errors import AmpError

Level = Literal["ok", "note", "warning", "error"]


class Finding(NamedTuple):
    """One result of a check. A `note` is something that could not be checked.

    Attributes:
        level: Severity.
        text: The finding and what to do about it.
        check: Name of the check.
    """

    level: Level
    text: str
    check: str = ""


ok, note, warning, error = (partial(Finding, level) for level in ("ok", "note", "warning", "error"))


class Findings(list[Finding]):
    """All findings of a plan, in order."""

    @contextmanager
    def about(self, check: str) -> Iterator[None]:
        """Turns an AmpError raised inside into an error of this check."""
        try:
            yield
        except AmpError as problem:
            self.append(Finding("error", str(problem), check))

    def add(self, check: str, said: Iterable[Finding]) -> bool:
        """Adds the findings of a check under its name. Returns whether none of them is an error."""
        before = self.number("error")
        with self.about(check):
            self.extend(finding._replace(check=check) for finding in said)
        return self.number("error") == before

    def number(self, level: Level) -> int:
        """Number of findings of a level."""
        return sum(finding.level == level for finding in self)


def in_bytes(size: float) -> str:
    """Formats a size in GB (10^9 bytes) or MB (10^6 bytes) with three digits."""
    number, unit = (size / 1e9, "GB") if size >= 1e9 else (size / 1e6, "MB")
    return f"{number:,.{2 if number < 10 else 1 if number < 100 else 0}f} {unit}"


def counted(number: int, word: str) -> str:
    """Formats a count, such as "1 process" and "1,024 processes"."""
    plural = "es" if word.endswith("s") else "s"
    return f"{number:,} {word}{'' if number == 1 else plural}"
