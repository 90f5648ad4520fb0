"""Atomic writes, and names that output files may not have."""

import os

import pytest

from amp.errors import AmpError
from amp.files import check_writable, refuse_device, whole_file


def test_a_device_is_never_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # stands for /dev/null
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(OSError, match="Not a regular file"), whole_file(tmp_path / name) as file:
            file.write(b"x")
        with pytest.raises(AmpError, match=rf"{name}: can't be written \(Not a regular file\)"):
            check_writable(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]
    with pytest.raises(OSError, match="Not a regular file"):
        refuse_device("/dev/stdout")  # a regular file if standard output is redirected to one
