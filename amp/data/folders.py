"""Folders of computed files that appear complete or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def build_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder that takes the name of `folder` when the block ends, and is removed when it fails.

    Where another process was faster, its folder stays and this one is dropped: equal names hold equal content.
    """
    temporary = folder.with_name(f".tmp-{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
