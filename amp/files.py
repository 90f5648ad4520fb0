"""Output files that appear whole or not at all, and never through a link that somebody else has planted."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def whole_file(path: str | os.PathLike, sync: bool = False) -> Iterator[BinaryIO]:
    """Yields a new file that takes the name `path` when the block ends, and is removed when it fails.

    A link at `path` is replaced, what it points at stays as it was. The temporary name can't be guessed and must not
    exist, so no link at it is followed. Who may read the file is decided by the umask.

    Args:
        path: Of the file; its folder must be there.
        sync: Force the content to the disk before it gets its name: no name without its content after a power cut.

    Raises:
        OSError: The folder can't be written, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb", opener=_no_link) as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk doesn't say which file it was
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes JSON as a `whole_file`, forced to the disk.

    Raises:
        OSError: As `whole_file`.
    """
    text = json.dumps(content, indent=1, ensure_ascii=False)
    with whole_file(path, sync=True) as file:
        # A command line may hold bytes that are no text; JSON has an escape for each.
        file.write(f"{text}\n".encode("utf-8", "backslashreplace"))


def open_log(path: str | os.PathLike, flags: int = os.O_TRUNC) -> int:
    """Descriptor of a file that is written over time, made if absent; `flags` says whether anew or at its end.

    Raises:
        OSError: It can't be written, or is a link: what that points at must not be changed.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o666)


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
