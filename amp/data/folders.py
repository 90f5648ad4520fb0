"""Folders of computed files that appear complete or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from amp.errors import AmpError


@contextmanager
def build_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder that takes the name of `folder` when the block ends, and is removed when it fails.

    Where another process was faster, its folder stays and this one is dropped: equal names hold equal content.

    Raises:
        AmpError: The folder can't be made.
    """
    temporary = folder.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise AmpError(f"{folder}: can't be made ({error.strerror}), expected a folder that you may write to") from None
    try:
        yield temporary
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
