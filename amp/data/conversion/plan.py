"""Plans the content of each shard, and finds out which shards already exist as planned."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from amp.data.captions.base import CaptionedImage, Skip
from amp.data.conversion.selection import Sample
from amp.data.images.file import Check, Resize
from amp.data.shards.index import SideFile, index_of
from amp.data.shards.manifest import ShardInfo
from amp.data.shards.record import RECORD_SCHEMA
from amp.json_text import parse_json

WRITER_VERSION = 2
"""Part of every shard's plan. Raise it when the bytes written for the same input change."""


PLANS = ".plan"
"""Folder of the sidecars, next to the shards."""


def sidecar_of(shard: Path) -> Path:
    """Path of the small file that records the plan a shard was written from."""
    return shard.parent / PLANS / f"{shard.name}.json"


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """Path of a shard, and everything that determines its bytes.

    Attributes:
        path: The tar file.
        source: Folder that the images' paths are relative to; or the tar file whose members they are.
        samples: Keys and images in the order of the tar.
        resize: How images are resized; None stores them unchanged.
        hash: Hash of everything that determines the bytes.
        check: How damaged images are found.
        from_tar: Whether `source` is a tar file.
    """

    path: Path
    source: Path
    samples: tuple[tuple[str, CaptionedImage], ...]
    resize: Resize | None
    hash: str
    check: Check
    from_tar: bool = False

    @property
    def sidecar(self) -> Path:
        return sidecar_of(self.path)

    def exists(self) -> bool:
        """Whether something was written at the place of the plan."""
        return self.path.exists()

    def name_of(self, image: CaptionedImage) -> str:
        """Name of an image for the user; in a tar file, TAR/MEMBER."""
        return f"{self.source.name}/{image.path}" if self.from_tar else image.path

    def info(self, sidecar: dict[str, Any]) -> ShardInfo:
        """The manifest's entry of the finished shard."""
        counts = {key: sidecar[key] for key in ("samples", "captions", "bytes", "sha256")}
        return ShardInfo(path=self.path, **counts, index=SideFile(**sidecar["index"]) if "index" in sidecar else None)

    def noted(self) -> dict[str, Any] | None:
        """The sidecar, if the shard was last written from this plan; else None."""
        try:
            sidecar = parse_json(self.sidecar.read_text(encoding="utf-8"))
            return sidecar if sidecar["plan"] == self.hash else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def finished(self) -> dict[str, Any] | None:
        """The sidecar if the shard exists as planned; None if it has to be written."""
        sidecar = self.noted()
        try:
            whole = sidecar and (sidecar["samples"] == 0 or self._has_sizes(sidecar))
            strict = self.check == "structure" or (sidecar and sidecar.get("check", "decode") == "decode")
            return sidecar if whole and strict else None
        except (OSError, KeyError, TypeError):
            return None

    def _has_sizes(self, sidecar: dict[str, Any]) -> bool:
        """Whether the tar file and its index (which older releases didn't write) have the sizes in the sidecar."""
        index = sidecar.get("index")
        return self.path.stat().st_size == sidecar["bytes"] and (
            index is None or index_of(self.path).stat().st_size == index["bytes"]
        )

    def must_be_written(self) -> bool:
        """Whether the shard is missing, or lacks images that may be readable now."""
        sidecar = self.finished()
        return sidecar is None or sidecar["retry"]

    def unreadable(self) -> list[Skip]:
        """The images that couldn't be read when the shard was last written from this plan."""
        sidecar = self.noted()
        return [Skip(**entry) for entry in sidecar["skipped"]] if sidecar else []


def assign_keys(images: list[CaptionedImage], paths: list[str] | None = None) -> list[tuple[str, CaptionedImage]]:
    """Assigns each image a key: the stem of its file name, with `_` for all but ASCII letters, digits, `_` and `-`.

    If several files would share a key (`cats/1.jpg`, `dogs/1.jpg`), part of the path's hash is appended to each of
    these keys. Keys depend only on the captions file, not on which of its images are converted.

    Args:
        images: The images.
        paths: Distinct paths of the images, if their own are not distinct.
    """
    paths = paths or [image.path for image in images]
    stems = [re.sub(r"[^A-Za-z0-9_-]", "_", PurePosixPath(image.path).stem) for image in images]
    counts = Counter(stems)
    keys = [
        stem if counts[stem] == 1 else f"{stem}-{_digest(path)[:8]}" for stem, path in zip(stems, paths, strict=True)
    ]
    # A file's name may equal another file's key with its short hash. It can't equal a key with the whole hash.
    counts = Counter(keys)
    return [
        (key if counts[key] == 1 else f"{key}-{_digest(path)}", image)
        for key, path, image in zip(keys, paths, images, strict=True)
    ]


def in_stored_order(keyed: list[tuple[str, CaptionedImage]], seed: int, split: str) -> list[tuple[str, CaptionedImage]]:
    """The images of a split in random order. They are sorted by hash, so the order needs no random generator, and other
    images don't affect the relative order of two."""
    members = [(key, image) for key, image in keyed if image.split == split]
    return sorted(members, key=lambda member: _digest(f"{seed}/{split}/{member[0]}"))


def plan_split(
    out: Path,
    images_root: Path,
    split: str,
    samples: list[Sample],
    samples_per_shard: int,
    resize: Resize | None,
    check: Check,
) -> list[ShardPlan]:
    """Plans the shards of a split."""
    plans = []
    for number, start in enumerate(range(0, len(samples), samples_per_shard)):
        chosen = samples[start : start + samples_per_shard]
        path = out / f"{split}-{number:06d}.tar"
        members = tuple((sample.key, sample.image) for sample in chosen)
        digest = plan_hash(members, [sample.state for sample in chosen], resize)
        plans.append(ShardPlan(path, images_root, members, resize, digest, check))
    return plans


def plan_hash(
    samples: Sequence[tuple[str, CaptionedImage]], states: Sequence[tuple[int, ...]], resize: Resize | None
) -> str:
    """Hash of everything that determines the bytes of a shard.

    Args:
        samples: Keys and images in the order of the tar.
        states: What changes with the content of each image's file.
        resize: How images are resized.
    """
    digest = hashlib.sha256()
    head = [WRITER_VERSION, RECORD_SCHEMA, asdict(resize) if resize else None]
    digest.update(json.dumps(head).encode())
    for (key, image), state in zip(samples, states, strict=True):
        captions = [(caption.id, caption.text, caption.knowledge) for caption in image.captions]
        line = json.dumps([key, image.path, image.id, image.split, state, captions])
        digest.update(line.encode("ascii"))
    return digest.hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
