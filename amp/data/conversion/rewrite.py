"""Replaces the knowledge in existing shards. The bytes of the images do not change.

The tar file of a shard is written anew. Of an indexed tar file of another tool, only the records and the index are.

If the command is killed, running it again finishes the work. Each shard is replaced as a whole, after its sidecar has
been written. A folder without a manifest isn't finished.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from amp.data.captions.base import CaptionedImage
from amp.data.captions.knowledge_file import attach_knowledge, cut_note
from amp.data.conversion.folder import INDEXES, clear_indexes, lock_folder, note_of
from amp.data.conversion.plan import PLANS, sidecar_of
from amp.data.conversion.sources import knowledge_files, load_provenance, source_file
from amp.data.shards.captions import captions_of, read_captions, read_records
from amp.data.shards.index import REINDEX, SideFile, Span, index_bytes, index_of, parse_index, records_of, side_file
from amp.data.shards.manifest import MANIFEST_NAME, ShardInfo, ShardManifest
from amp.data.shards.reader import ShardReader
from amp.data.shards.record import record_bytes
from amp.data.shards.tar import HashedFile, add_member, end_archive
from amp.errors import AmpError, public_command
from amp.files import sha256_of, whole_file, write_atomically, write_json
from amp.json_text import parse_json
from amp.terminal import PlainConsole

_BEFORE = "manifest-before.json"  # the manifest as it was before an unfinished rewrite


@dataclass(frozen=True, slots=True)
class _Job:
    """A shard to rewrite: its current state, its target path, and its captions with the new knowledge.

    The target is the tar file; for indexed tar files, a path next to which the index and the records are.
    """

    source: ShardInfo
    target: Path
    images: list[CaptionedImage]
    knowledge: str  # SHA-256 of the knowledge file

    @property
    def in_place(self) -> bool:
        return self.target == self.source.indexed_path

    @property
    def indexed(self) -> bool:
        return self.source.records is not None

    @property
    def sidecar(self) -> Path:
        return note_of(self.target) if self.indexed else sidecar_of(self.target)

    @property
    def old_texts(self) -> Path:
        """The file that contains the captions and the old knowledge."""
        return records_of(self.source.indexed_path) if self.indexed else self.source.local

    @property
    def new_texts(self) -> Path:
        return records_of(self.target) if self.indexed else self.target


def rewrite_knowledge(
    shards: str,
    knowledge: str,
    knowledge_provenance: str | None = None,
    out: str | None = None,
    max_missing: float = 0.0,
    command: list[str] | None = None,
    console: PlainConsole | None = None,
) -> ShardManifest:
    """Replaces the knowledge in existing shards.

    Args:
        shards: Folder of shards with manifest.json.
        knowledge: JSONL file of action knowledge with one caption per line (sentid, or image and caption; triplets;
            states), or the folder that amp generate_knowledge wrote.
        knowledge_provenance: JSON file that describes how the knowledge was made; copied into the manifest. Default:
            the file in the folder, if knowledge is a folder.
        out: Folder for the new shards. Default: the shards are replaced in place.
        max_missing: Maximum fraction of captions without a record in the knowledge file; these captions lose their old
            knowledge.
        command: Command line, recorded in the manifest.
        console: Console for progress output; stderr by default.

    Returns:
        The new manifest.

    Raises:
        AmpError: An input can't be used. Nothing has been changed then.
    """
    console = console or PlainConsole(stderr=True)
    if not 0 <= max_missing <= 1:
        raise AmpError(f"max_missing is {max_missing}; expected a fraction from 0 to 1")
    root = Path(shards)
    target = Path(out) if out is not None else root
    if out is not None and target.resolve() == root.resolve():
        raise AmpError(
            f"--out {out} is the folder of the shards; omit --out to replace them in place, or choose another folder"
        )
    knowledge, knowledge_provenance = knowledge_files(knowledge, knowledge_provenance)
    provenance = {**source_file(knowledge), "provenance": load_provenance(knowledge_provenance)}
    if not root.is_dir():
        raise AmpError(f"{root}: no such folder; expected a folder of shards; check --shards")
    notes = _notes(root)
    with lock_folder(target, notes=notes):
        manifest = _manifest(root, target, notes)
        if notes == INDEXES:
            clear_indexes(target, [])
        with console.progress("checking shards", "shards") as report:
            jobs = _plan(manifest, target, provenance["sha256"], report)
        with console.progress("reading captions and knowledge"):
            images = [image for job in jobs for image in job.images]
            found = attach_knowledge(images, knowledge)
        _check_missing(images, max_missing, knowledge)
        cut = cut_note(images, found)
        if cut:
            console.print(cut, soft_wrap=True)
        _check_room(jobs, target)
        if target == root:
            write_json(target / notes / _BEFORE, manifest.to_dict())
        (target / MANIFEST_NAME).unlink(missing_ok=True)
        sidecars = []
        with console.progress("rewriting shards", "shards") as report:
            for job in jobs:
                sidecars.append(_rewrite(job))
                report(len(sidecars), len(jobs))
        rewritten = _new_manifest(manifest, jobs, sidecars, target)
        entry = {
            **provenance,
            "records": found.records,
            "captions_with_knowledge": found.attached,
            "records_without_caption": found.unused,
            "command": public_command(command) if command is not None else None,
        }
        rewritten.provenance = _new_provenance(manifest.provenance, entry)
        rewritten.save()
        (target / notes / _BEFORE).unlink(missing_ok=True)
    return rewritten


def _new_provenance(old: dict[str, Any], knowledge: dict[str, Any]) -> dict[str, Any]:
    """The provenance with the new knowledge, of each split too, and a list of the old."""
    splits = old.get("splits", {})
    previous = list(old.get("previous_knowledge", []))
    for place in (old, *splits.values()):
        before = place.get("knowledge") or {}
        if before.get("sha256") != knowledge["sha256"] and (place is old or before not in previous):
            previous.append(before)
    new = {**old, "knowledge": knowledge, "previous_knowledge": previous}
    if splits:
        new["splits"] = {split: {**entry, "knowledge": knowledge} for split, entry in splits.items()}
    return new


def _notes(root: Path) -> str:
    """Name of the folder of the sidecars, by what the shards are."""
    if not (root / MANIFEST_NAME).exists():
        return INDEXES if (root / INDEXES).is_dir() else PLANS
    infos = [info for infos in ShardManifest.load(root).splits.values() for info in infos]
    return INDEXES if any(info.records is not None for info in infos) else PLANS


def _manifest(root: Path, target: Path, notes: str) -> ShardManifest:
    """The manifest of the shards, even if an earlier rewrite in place was interrupted."""
    kept = root / notes / _BEFORE
    if target != root or not kept.exists() or (root / MANIFEST_NAME).exists():
        return ShardManifest.load(root)
    # The kept manifest is in the folder of the sidecars, but its shards are one folder up.
    with_name = root / notes / MANIFEST_NAME
    shutil.copyfile(kept, with_name)
    try:
        manifest = ShardManifest.load(with_name)
    finally:
        with_name.unlink()
    manifest.root = root
    manifest.splits = {
        split: [replace(i, path=root / i.name) if i.side is None else replace(i, side=root) for i in infos]
        for split, infos in manifest.splits.items()
    }
    return manifest


def _plan(manifest: ShardManifest, target: Path, knowledge: str, progress: Callable[[int, int], None]) -> list[_Job]:
    """One job per shard. Checks each shard's hash against the manifest, or against an unfinished rewrite."""
    jobs = []
    infos = [info for infos in manifest.splits.values() for info in infos]
    for info in infos:
        job = _Job(info, target / info.name, [], knowledge)
        path = job.old_texts
        digest = sha256_of(path) if path.exists() else "missing"
        sidecar = _sidecar(job) if job.in_place else None
        if digest != info.texts and (sidecar is None or digest not in (sidecar["sha256"], sidecar["replaces"])):
            raise AmpError(
                f"{path}: sha256 is {digest}; expected {info.texts} (from the manifest); the shard was changed or is "
                "damaged; make the shards again with amp make_shards, or their index with amp index_shards"
            )
        # The manifest's index of a shard may be older than the shard, if a rewrite was interrupted.
        images = captions_of(read_records(path), path) if job.indexed else read_captions(ShardReader(path))
        jobs.append(replace(job, images=images))
        progress(len(jobs), len(infos))
    return jobs


def _check_missing(images: list[CaptionedImage], allowed: float, knowledge: str) -> None:
    captions = [caption for image in images for caption in image.captions]
    missing = [caption for caption in captions if caption.knowledge is None]
    if len(missing) > allowed * len(captions):
        raise AmpError(
            f"{knowledge}: no record for {len(missing):,} of {len(captions):,} captions of the shards, first: "
            f"{missing[0].text!r}; expected one per caption; generate knowledge for these shards (amp "
            "generate_knowledge --captions FOLDER), or allow the gaps with --max_missing; nothing was changed"
        )


def _check_room(jobs: list[_Job], target: Path) -> None:
    """Raises AmpError early if the disk is full. A disk that fills up later does no damage, but wastes time."""
    needed = max((job.source.records or job.source).bytes for job in jobs)
    free = shutil.disk_usage(target).free
    if free < needed:
        raise AmpError(
            f"{target}: {free:,} bytes are free; expected at least {needed:,}, the size of a shard; make room; "
            "nothing was changed"
        )


def _sidecar(job: _Job) -> dict[str, Any] | None:
    """The sidecar of an earlier rewrite of this shard; None if there is none."""
    try:
        sidecar = parse_json(job.sidecar.read_text(encoding="utf-8"))
        return sidecar if {"knowledge", "sha256", "replaces", "index"} <= sidecar.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _rewrite(job: _Job) -> dict[str, Any]:
    """Writes one shard unless it is already rewritten; returns its sidecar."""
    done, present = _sidecar(job), sha256_of(job.new_texts) if job.new_texts.exists() else ""
    if (
        done is not None
        and (done["knowledge"], done["sha256"]) == (job.knowledge, present)
        and (job.in_place or done["replaces"] == job.source.texts)
        and (not job.indexed or _hash_of(index_of(job.target)) == done["index"]["sha256"])
    ):
        return done
    sidecar = {
        # An empty plan makes amp make_shards and amp index_shards write this shard again.
        "plan": "",
        "split": job.images[0].split,
        "knowledge": job.knowledge,
        "replaces": present if job.in_place else job.source.texts,
        "samples": job.source.samples,
        "captions": job.source.captions,
        "captions_without_knowledge": sum(c.knowledge is None for image in job.images for c in image.captions),
    }
    try:
        return _rewrite_records(job, sidecar) if job.indexed else _rewrite_tar(job, sidecar)
    except OSError as error:
        raise AmpError(
            f"{job.new_texts}: can't be written ({error.strerror or error}); make room or fix the folder, then run "
            "the same command again; rewritten shards are kept"
        ) from None


def _rewrite_records(job: _Job, sidecar: dict[str, Any]) -> dict[str, Any]:
    """Writes the records and the index of an indexed tar file. Only the index knows where the photos are."""
    photos, old_index = _photo_spans(job)
    lines = bytearray()
    spans: list[tuple[Span, Span]] = []
    old = read_records(job.old_texts)
    for photo, record, image in zip(photos, old, job.images, strict=True):
        content = record_bytes(record["key"], image)
        spans.append((photo, (len(lines), len(content))))
        lines += content + b"\n"
    index, records = index_bytes(spans), bytes(lines)
    sidecar |= asdict(side_file(records)) | {"index": asdict(side_file(index)), "replaces_index": old_index}
    # The sidecar comes first: after an interruption it tells which content the two files may have.
    write_json(job.sidecar, sidecar)
    for path, content in ((index_of(job.target), index), (records_of(job.target), records)):
        with whole_file(path, sync=True) as file:
            file.write(content)
    return sidecar


def _photo_spans(job: _Job) -> tuple[list[Span], str]:
    """Where the photos are, from the current index, and the hash of that index.

    The photos are at the same places in the index before and after an interrupted rewrite.
    """
    path = index_of(job.source.indexed_path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AmpError(f"{path}: can't be read ({error.strerror}); {REINDEX}") from None
    found, expected = side_file(content), job.source.index
    assert expected is not None, "the manifest's reader requires an index with records"
    noted = (_sidecar(job) or {}) if job.in_place else {}
    if found.sha256 in (noted.get("replaces_index"), noted.get("index", {}).get("sha256")):
        expected = found
    spans = parse_index(content, path, expected, job.source.samples, (job.source.bytes, sys.maxsize))
    return [(offset, size) for offset, size in spans[:, 0].tolist()], found.sha256


def _hash_of(path: Path) -> str:
    return sha256_of(path) if path.exists() else ""


def _rewrite_tar(job: _Job, sidecar: dict[str, Any]) -> dict[str, Any]:
    temporary = job.target.with_name(f"{job.target.name}.{uuid.uuid4().hex}.tmp")
    by_key = iter(job.images)
    spans: tuple[list[Span], list[Span]] = [], []  # of the photos, of the records
    try:
        with tarfile.open(job.source.local, "r:") as old, open(temporary, "wb") as file:
            hashed = HashedFile(file)
            for member in old:
                inner = old.extractfile(member)
                assert inner is not None, "a checked shard holds only files"
                content = inner.read()
                if member.name.endswith(".json"):
                    content = record_bytes(parse_json(content)["key"], next(by_key))
                spans[member.name.endswith(".json")].append(add_member(hashed, member.name, content))
            end_archive(hashed)
            file.flush()
            os.fsync(file.fileno())
        index = index_bytes(list(zip(*spans, strict=True)))
        sidecar |= {
            "bytes": hashed.size,
            "sha256": hashed.sha256.hexdigest(),
            "index": asdict(side_file(index)),
        }
        # The sidecar comes first: after an interruption it tells which content the shard may have.
        write_json(job.sidecar, sidecar)
        write_atomically(index_of(job.target), index)
        os.replace(temporary, job.target)
    finally:
        temporary.unlink(missing_ok=True)
    return sidecar


def _new_manifest(old: ShardManifest, jobs: list[_Job], sidecars: list[dict[str, Any]], target: Path) -> ShardManifest:
    noted = {job.source.name: sidecar for job, sidecar in zip(jobs, sidecars, strict=True)}
    return ShardManifest(
        root=target,
        splits={
            split: [_new_info(info, noted[info.name], target) for info in infos] for split, infos in old.splits.items()
        },
        captions_without_knowledge={
            split: sum(noted[info.name]["captions_without_knowledge"] for info in infos)
            for split, infos in old.splits.items()
        },
        skipped=old.skipped,
        excluded=old.excluded,
        created_by=old.created_by,
    )


def _new_info(old: ShardInfo, noted: dict[str, Any], target: Path) -> ShardInfo:
    texts, index = SideFile(noted["bytes"], noted["sha256"]), SideFile(**noted["index"])
    if old.records is None:
        return replace(old, path=target / old.name, bytes=texts.bytes, sha256=texts.sha256, index=index)
    if target == old.indexed_path.parent:
        return replace(old, index=index, records=texts)
    return replace(old, path=old.local.resolve(), index=index, records=texts, side=target)
