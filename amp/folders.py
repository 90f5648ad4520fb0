"""Folders of computed files that appear complete or not at all."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from amp.errors import AmpError


@contextmanager
def build_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `folder` when the block ends, or removed if it fails.

    If another process creates `folder` first, its folder stays and this one is discarded: equal names mean equal
    content.

    Raises:
        AmpError: The folder can't be created, or a file in it can't be written because the disk is full.
    """
    temporary = folder.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise AmpError(f"{folder}: can't be created ({error.strerror}); give a folder that you may write to") from None
    try:
        yield temporary
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():
                raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or "requested and" in str(error):  # numpy keeps no errno
            reason = error.strerror or f"no space left: {error}"
            raise AmpError(f"{folder}: can't be written ({reason}); make room and try again") from None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
