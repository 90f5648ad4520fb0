"""Work that a job array divides among its tasks."""

import re

from amp.errors import AmpError


def part_of(text: str) -> tuple[int, int]:
    """(index, parts) of ``I/N``, index from 0 to N-1.

    Raises:
        AmpError: Anything else.
    """
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    index, parts = map(int, match.groups()) if match else (0, 0)
    if index >= parts:
        raise AmpError(
            f"part is {text!r}; expected I/N with I from 0 to N-1, as 0/16 to 15/16; a job array must count its tasks "
            "from 0 without gaps (--array=0-15)"
        )
    return index, parts
