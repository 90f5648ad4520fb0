"""Reads the headers and the captions of one tar file of another tool, without its photos."""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from amp.data.foreign.captions import CaptionChoice, parse_sample
from amp.data.images.formats import unreadable_reason
from amp.data.shards.headers import tar_members
from amp.data.shards.index import Span
from amp.data.shards.reader import IMAGE_EXTENSIONS
from amp.errors import AmpError, shorten
from amp.json_text import is_unicode

RETAR = "correct the tar file, or leave it out"
PICKLES = ("pickle", "pkl", "pyd", "pth", "pt")
_META = re.compile(r"__[^/]*__($|/)")  # webdataset passes over such members
_MEMBER = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)", re.DOTALL)  # webdataset's rule: the key ends at the first dot


@dataclass(slots=True)
class ForeignSample:
    """A sample of a tar file.

    Attributes:
        name: Name of its photo in the tar file; of another member if there is no photo.
        id: Its key, or img2dataset's.
        photo: Where the photo is in the tar file.
        texts: Its captions; "" for empty ones.
        problem: Kind and reason of a `Skip` if the sample can't be used.
    """

    name: str
    id: str
    photo: Span = (0, 0)
    texts: list[str] = field(default_factory=list)
    problem: tuple[str, str] | None = None


def scan_tar(path: Path, choice: CaptionChoice, unread: Counter[str]) -> list[ForeignSample]:
    """The samples of a tar file, in order.

    Args:
        path: The tar file.
        choice: Where captions are.
        unread: Counts the members that aren't read, by extension.

    Raises:
        AmpError: The tar file can't be read, is compressed, damaged or empty, or contains a link, a pickle, a repeated
            key or two photos of one sample.
    """
    members: dict[str, dict[str, tarfile.TarInfo]] = {}
    last_key = ""
    try:
        # Non-blocking, because opening a named pipe would hang.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            for member in tar_members(file, path, RETAR, folders=True):
                found = _MEMBER.fullmatch(member.name)
                if found is None or _META.match(member.name):
                    unread["names without an extension"] += 1
                    continue
                key, extension = str(PurePosixPath(found[1])), found[2].lower()
                where = f"{path}: member {shorten(member.name)}"
                if extension.rpartition(".")[2] in PICKLES:
                    raise AmpError(
                        f"{where} is a pickle, which could run code; expected photos, .txt and .json (pickles are "
                        f"never read); {RETAR}"
                    )
                slot = "photo" if extension in IMAGE_EXTENSIONS else extension
                sample = members.setdefault(key, {})
                if slot in sample or (sample and key != last_key):
                    what = "has two photos" if slot == "photo" and key == last_key else "occurs twice"
                    raise AmpError(f"{where}: key {shorten(key)} {what}; expected each key once; {RETAR}")
                sample[slot] = member
                last_key = key
            return [_sample(file.fileno(), path, key, sample, choice, unread) for key, sample in members.items()]
    except OSError as error:
        raise AmpError(f"{path}: can't be read ({error.strerror}); expected a tar file; {RETAR}") from None


def _sample(
    file: int,
    path: Path,
    key: str,
    members: dict[str, tarfile.TarInfo],
    choice: CaptionChoice,
    unread: Counter[str],
) -> ForeignSample:
    unread.update(f".{slot}" for slot in members if slot not in ("photo", "txt", "json"))
    photo = members.get("photo")
    first = photo or next(iter(members.values()))
    sample = ForeignSample(str(PurePosixPath(first.name)), key)
    if photo is None:
        reasons = (unreadable_reason(f".{slot}") for slot in members)
        reason = next(filter(None, reasons), None)
        sample.problem = ("unreadable_image", reason) if reason else ("missing_image", "no photo in the tar file")
    else:
        sample.photo = (photo.offset_data, photo.size)
    try:
        record = parse_sample(_content(file, members["json"], path)) if "json" in members else None
        txt = _content(file, members["txt"], path) if "txt" in members else None
        sample.texts = choice.texts(txt, record)
    except AmpError as error:
        if not isinstance(error, _Truncated):
            sample.problem = sample.problem or ("image_without_caption", str(error))
            return sample
        raise
    if record is not None:
        _take_from_img2dataset(sample, record)
    return sample


def _take_from_img2dataset(sample: ForeignSample, record: dict[str, Any]) -> None:
    """Takes img2dataset's key, and its word that the download failed."""
    key, status = record.get("key"), record.get("status")
    if not isinstance(key, str) or not key or not is_unicode(key):
        return
    sample.id = key
    if isinstance(status, str) and status != "success":
        reason = f"img2dataset's 'status' is {shorten(status)}; expected 'success'"
        sample.problem = ("missing_image", reason)


class _Truncated(AmpError):
    pass


def _content(file: int, member: tarfile.TarInfo, path: Path) -> bytes:
    content = os.pread(file, member.size, member.offset_data)
    if len(content) != member.size:
        raise _Truncated(
            f"{path}: {shorten(member.name)}: {len(content)} bytes; expected {member.size}; the file was truncated "
            f"while in use; {RETAR}"
        )
    return content
