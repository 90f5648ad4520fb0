"""Work that several processes share: each item is made once, by whichever process gets to it first."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from amp.errors import AmpError
from amp.locks import claimed

POLL_SECONDS = 0.2


def make_missing(
    names: Sequence[str],
    folder: Path,
    make: Callable[[str], None],
    first: float = 0.0,
    progress: Callable[[int], None] = lambda missing: None,
) -> None:
    """Makes the missing files or folders in `folder`, together with all processes that call this with the same names.

    The processes may be ranks of one run, tasks of a job array, or different runs. They exchange nothing: an item that
    another process is making is locked by it, and free again if that process dies. The function returns when all items
    exist, so no process waits in a collective operation, which would time out.

    Args:
        names: Names of the items in `folder`.
        folder: Folder of the items, shared by the processes; created if it is missing.
        make: Makes one item, which must appear as a whole (`build_folder`, `whole_file`).
        first: Where in `names` this process starts, as a fraction, so that processes rarely want the same item.
        progress: Called with the number of items that are still missing: at the start, after each item, and while this
            process waits for others.

    Raises:
        AmpError: The folder can't be written.
    """
    missing = _missing(names, folder)
    start = int(first * len(missing))
    missing = missing[start:] + missing[:start]
    progress(len(missing))
    while missing:
        made, left = False, len(missing)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in missing:
                if (folder / name).exists():  # made by another process; cheaper than its lock
                    left -= 1
                    continue
                with claimed(folder / f".{name}.lock") as mine:
                    if mine and not (folder / name).exists():
                        make(name)
                        made, left = True, left - 1
                        progress(left)
        except OSError as error:
            raise AmpError(
                f"{folder}: can't be written ({error.strerror}); give a cache folder that you may write to"
            ) from None
        missing = _missing(missing, folder)
        progress(len(missing))
        if missing and not made:
            time.sleep(POLL_SECONDS)


def _missing(names: Sequence[str], folder: Path) -> list[str]:
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return [name for name in names if name not in present]
