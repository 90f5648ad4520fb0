"""Writes the index and the records of one tar file of another tool, which stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from amp.data.conversion.folder import note_of
from amp.data.conversion.plan import ShardPlan
from amp.data.conversion.write import CheckedPhotos, cannot_write
from amp.data.shards.index import SideFile, Span, index_bytes, index_of, records_of, side_file
from amp.data.shards.manifest import ShardInfo
from amp.data.shards.record import record_bytes
from amp.files import whole_file


@dataclass(frozen=True, slots=True)
class IndexPlan(ShardPlan):
    """Plan of the index and the records of a tar file, which is both `path` and `source`.

    Attributes:
        photos: Where the photos of `samples` are in the tar file.
        side: Folder of the index and the records.
        split: Split of the samples.
    """

    photos: tuple[Span, ...] = ()
    side: Path = Path()
    split: str = ""

    @property
    def indexed_path(self) -> Path:
        """Path next to which the index and the records are."""
        return self.side / self.path.name

    @property
    def sidecar(self) -> Path:
        return note_of(self.indexed_path)

    def exists(self) -> bool:
        return index_of(self.indexed_path).exists()

    def info(self, sidecar: dict[str, Any]) -> ShardInfo:
        return ShardInfo(
            path=self.path,
            samples=sidecar["samples"],
            captions=sidecar["captions"],
            bytes=sidecar["tar"]["bytes"],
            sha256=sidecar["tar"]["sha256"],
            index=SideFile(**sidecar["index"]),
            records=SideFile(**sidecar["records"]),
            side=self.side if self.side != self.path.parent else None,
        )

    def _has_sizes(self, sidecar: dict[str, Any]) -> bool:
        sizes = {self.path: "tar", index_of(self.indexed_path): "index", records_of(self.indexed_path): "records"}
        return all(path.stat().st_size == sidecar[key]["bytes"] for path, key in sizes.items())


def index_tar(plan: IndexPlan, progress: Callable[[], None] = lambda: None, accept_gaps: bool = True) -> None:
    """Checks the photos of a tar file, and writes its index, its records and its sidecar.

    Args:
        plan, progress, accept_gaps: See `amp.data.conversion.write.write_shard`.

    Raises:
        AmpError: A file can't be written.
    """
    place = {image.path: span for (_, image), span in zip(plan.samples, plan.photos, strict=True)}
    photos = CheckedPhotos(plan, progress)
    spans: list[tuple[Span, Span]] = []
    records = bytearray()
    for key, image, _, _ in photos:
        record = record_bytes(key, image)
        spans.append((place[image.path], (len(records), len(record))))
        records += record + b"\n"
    contents = {index_of(plan.indexed_path): index_bytes(spans), records_of(plan.indexed_path): bytes(records)}
    try:
        # Remove the old sidecar first, so that a sidecar never describes other files.
        plan.sidecar.unlink(missing_ok=True)
        for path, content in contents.items():
            if not spans:
                path.unlink(missing_ok=True)
            elif accept_gaps or not photos.retry:
                with whole_file(path, sync=True) as file:
                    file.write(content)
        index, written = (asdict(side_file(content)) for content in contents.values())
        photos.write_sidecar({"split": plan.split, "index": index, "records": written})
    except OSError as error:
        raise cannot_write(plan.indexed_path, error) from None
