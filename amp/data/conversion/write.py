"""Writes one shard, or all planned shards in several processes."""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from amp.cores import usable_cores
from amp.data.captions.base import CaptionedImage, Skip
from amp.data.conversion.plan import ShardPlan
from amp.data.conversion.processes import count_one, worker_pool
from amp.data.foreign.stream import PhotoStream
from amp.data.images.file import checked_image, read_image
from amp.data.images.formats import UnreadableImageError
from amp.data.images.names import find_file
from amp.data.shards.index import SideFile, Span, index_bytes, index_of, side_file
from amp.data.shards.record import record_bytes
from amp.data.shards.tar import HashedFile, add_member, end_archive
from amp.errors import AmpError
from amp.files import whole_file, write_json
from amp.terminal import PlainConsole


def write_shard(plan: ShardPlan, progress: Callable[[], None] = lambda: None, accept_gaps: bool = True) -> None:
    """Writes one shard and its sidecar.

    This does not use `webdataset.TarWriter`. Importing webdataset imports torch, which takes seconds and hundreds of
    megabytes per worker process. It also sorts members, which would put `KEY.json` before `KEY.png`.

    Args:
        plan: Plan of the shard.
        progress: Called once per image.
        accept_gaps: Whether to keep a shard that lacks images which the next run may be able to read. If False, only
            its sidecar is written, and the shard counts as missing.

    Raises:
        AmpError: The shard can't be written, for example because the disk is full.
    """
    # Unique across machines, because another job may be writing the same shard.
    suffix = f".{uuid.uuid4().hex}.tmp"
    temporary = plan.path.with_name(plan.path.name + suffix)
    spans: list[tuple[Span, Span]] = []
    photos = CheckedPhotos(plan, progress)
    try:
        with open(temporary, "wb") as file:
            hashed = HashedFile(file)
            for key, image, content, extension in photos:
                photo = add_member(hashed, f"{key}.{extension}", content)
                spans.append((photo, add_member(hashed, f"{key}.json", record_bytes(key, image))))
            end_archive(hashed)
            file.flush()
            os.fsync(file.fileno())
        # Remove the old sidecar first, so that a sidecar never describes a different tar file.
        plan.sidecar.unlink(missing_ok=True)
        index = index_bytes(spans)
        if not spans:
            plan.path.unlink(missing_ok=True)
            index_of(plan.path).unlink(missing_ok=True)
        elif accept_gaps or not photos.retry:
            with whole_file(index_of(plan.path), sync=True) as index_file:
                index_file.write(index)
            os.replace(temporary, plan.path)
        photos.write_sidecar(
            {
                "bytes": hashed.size,
                "sha256": hashed.sha256.hexdigest(),
                "index": asdict(side_file(index)),
            }
        )
    except OSError as error:
        raise cannot_write(plan.path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


class CheckedPhotos:
    """The photos of a plan that can be used, and counts of all of them.

    Args:
        plan: Plan of the shard.
        progress: Called once per image.

    Attributes:
        retry: Whether a photo that can't be read now may be readable in the next run.
    """

    def __init__(self, plan: ShardPlan, progress: Callable[[], None]) -> None:
        self._plan, self._progress = plan, progress
        self._skipped: list[Skip] = []
        self._samples = self._captions = self._without_knowledge = 0
        self._tar: SideFile | None = None
        self.retry = False

    def __iter__(self) -> Iterator[tuple[str, CaptionedImage, bytes, str]]:
        """Yields key, image, the bytes to store and their extension of each photo that can be used."""
        for (key, image), photo in zip(self._plan.samples, self._read(), strict=True):
            if isinstance(photo, UnreadableImageError):
                # Permissions or a disk can be fixed without changing the file's mtime, so the next run tries again.
                self.retry |= photo.may_pass
                name = self._plan.name_of(image)
                self._skipped.append(Skip("unreadable_image", name, str(photo), image.split, len(image.captions)))
            else:
                yield key, image, *photo
                self._samples += 1
                self._captions += len(image.captions)
                self._without_knowledge += sum(caption.knowledge is None for caption in image.captions)
            self._progress()

    def _read(self) -> Iterator[tuple[bytes, str] | UnreadableImageError]:
        plan = self._plan
        if not plan.from_tar:
            for _, image in plan.samples:
                yield _or_error(read_image, find_file(plan.source, image.path), plan.resize, plan.check)
            return
        stream = PhotoStream(plan.source, [image.path for _, image in plan.samples])
        for (_, image), content in zip(plan.samples, stream, strict=True):
            yield _or_error(checked_image, content, PurePosixPath(image.path).suffix, plan.resize, plan.check)
        self._tar = stream.file

    def write_sidecar(self, files: dict[str, Any]) -> None:
        """Writes the sidecar of the shard; `files` describes the files that were written."""
        write_json(
            self._plan.sidecar,
            {
                "plan": self._plan.hash,
                "samples": self._samples,
                "captions": self._captions,
                "captions_without_knowledge": self._without_knowledge,
                **files,
                **({"tar": {"file": self._plan.source.name, **asdict(self._tar)}} if self._tar else {}),
                "skipped": [asdict(skip) for skip in self._skipped],
                "retry": self.retry,
                "check": self._plan.check,
            },
        )


def _or_error(read: Callable[..., tuple[bytes, str]], *arguments: Any) -> tuple[bytes, str] | UnreadableImageError:
    try:
        return read(*arguments)
    except UnreadableImageError as error:
        return error


def cannot_write(path: Path, error: OSError) -> AmpError:
    """The error for a file that can't be written, for example because the disk is full."""
    return AmpError(
        f"{path}: can't be written ({error.strerror or error}); make room or fix the folder, then run the same command "
        "again; finished shards are kept"
    )


Write = Callable[[Any, Callable[[], None], bool], None]
"""`write_shard`, or a function that writes another kind of plan."""


def write_all(
    plans: Sequence[ShardPlan], write: Write, workers: int | None, console: PlainConsole, accept_gaps: bool
) -> None:
    """Writes shards in several processes and shows how many images are done.

    Args:
        plans: Plans of the shards.
        write: What writes one of them; a function of a module.
        workers: Number of processes; None for one per usable CPU.
        console: Console for progress output.
        accept_gaps: See `write_shard`.

    Raises:
        AmpError: A shard can't be written, or a process was killed.
    """
    if not plans:
        return
    workers = min(workers or usable_cores(), len(plans))
    total = sum(len(plan.samples) for plan in plans)
    with console.progress(f"writing {len(plans)} shards", "images", keep=True) as report:
        if workers == 1:
            done = itertools.count(1)
            for plan in plans:
                write(plan, lambda: report(next(done), total), accept_gaps)
            return
        with worker_pool(workers, console, "the shards that are being written") as (pool, counted):
            pending = {pool.submit(_write_in_worker, write, plan, accept_gaps) for plan in plans}
            while pending:
                finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                report(counted(), total)
                for future in finished:
                    future.result()


def _write_in_worker(write: Write, plan: ShardPlan, accept_gaps: bool) -> None:
    write(plan, count_one, accept_gaps)
