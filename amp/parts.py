"""Division of work among the tasks of a job array."""

import re

from amp.errors import AmpError


def part_of(text: str) -> tuple[int, int]:
    """Parses `I/N` to (index, parts), with index from 0 to N-1.

    Raises:
        AmpError: The text has another form.
    """
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    index, parts = map(int, match.groups()) if match else (0, 0)
    if index >= parts:
        raise AmpError(
            f"part is {text!r}; expected I/N with I from 0 to N-1, such as 0/16 to 15/16; number the tasks of a "
            "job array from 0 without gaps (--array=0-15)"
        )
    return index, parts
