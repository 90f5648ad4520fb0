"""Replaces the knowledge in existing shards. The bytes of the images do not change.

If the command is killed, running it again finishes the work. Each shard is replaced as a whole, after its sidecar has
been written. A folder without a manifest isn't finished.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from amp.data.captions.base import CaptionedImage
from amp.data.captions.knowledge_file import attach_knowledge, cut_note
from amp.data.conversion.folder import lock_folder
from amp.data.conversion.plan import sidecar_of
from amp.data.conversion.sources import knowledge_files, load_provenance, source_file
from amp.data.shards.captions import load_shard_captions
from amp.data.shards.index import SideFile, Span, index_bytes, index_of, side_file
from amp.data.shards.manifest import MANIFEST_NAME, ShardInfo, ShardManifest
from amp.data.shards.record import record_bytes
from amp.data.shards.tar import HashedFile, add_member, end_archive
from amp.errors import AmpError, public_command
from amp.files import sha256_of, write_atomically, write_json
from amp.json_text import parse_json
from amp.terminal import PlainConsole

_BEFORE = "manifest-before.json"  # the manifest as it was before an unfinished rewrite


@dataclass(frozen=True, slots=True)
class _Job:
    """A shard to rewrite: its current state, its target path, and its captions with the new knowledge."""

    source: ShardInfo
    target: Path
    images: list[CaptionedImage]
    knowledge: str  # SHA-256 of the knowledge file

    @property
    def in_place(self) -> bool:
        return self.target == self.source.path

    @property
    def sidecar(self) -> Path:
        return sidecar_of(self.target)


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
    with lock_folder(target):
        manifest = _manifest(root, target)
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
            write_json(target / ".plan" / _BEFORE, manifest.to_dict())
        (target / MANIFEST_NAME).unlink(missing_ok=True)
        sidecars = []
        with console.progress("rewriting shards", "shards") as report:
            for job in jobs:
                sidecars.append(_rewrite(job))
                report(len(sidecars), len(jobs))
        rewritten = _new_manifest(manifest, jobs, sidecars, target)
        before = manifest.provenance.get("knowledge") or {}
        earlier = manifest.provenance.get("previous_knowledge", [])
        rewritten.provenance = {
            **manifest.provenance,
            "knowledge": {
                **provenance,
                "records": found.records,
                "captions_with_knowledge": found.attached,
                "records_without_caption": found.unused,
                "command": public_command(command) if command is not None else None,
            },
            "previous_knowledge": earlier if before.get("sha256") == provenance["sha256"] else [*earlier, before],
        }
        rewritten.save()
        (target / ".plan" / _BEFORE).unlink(missing_ok=True)
    return rewritten


def _manifest(root: Path, target: Path) -> ShardManifest:
    """The manifest of the shards, even if an earlier rewrite in place was interrupted."""
    kept = root / ".plan" / _BEFORE
    if target != root or not kept.exists() or (root / MANIFEST_NAME).exists():
        return ShardManifest.load(root)
    # The kept manifest is in .plan, but its shards are one folder up.
    with_name = root / ".plan" / MANIFEST_NAME
    shutil.copyfile(kept, with_name)
    try:
        manifest = ShardManifest.load(with_name)
    finally:
        with_name.unlink()
    manifest.root = root
    manifest.splits = {
        split: [ShardInfo(root / i.name, i.samples, i.captions, i.bytes, i.sha256) for i in infos]
        for split, infos in manifest.splits.items()
    }
    return manifest


def _plan(manifest: ShardManifest, target: Path, knowledge: str, progress: Callable[[int, int], None]) -> list[_Job]:
    """One job per shard. Checks each shard's hash against the manifest, or against an unfinished rewrite."""
    jobs = []
    infos = [info for infos in manifest.splits.values() for info in infos]
    for info in infos:
        job = _Job(info, target / info.name, [], knowledge)
        digest = sha256_of(info.local) if info.local.exists() else "missing"
        sidecar = _sidecar(job) if job.in_place else None
        if digest != info.sha256 and (sidecar is None or digest not in (sidecar["sha256"], sidecar["replaces"])):
            raise AmpError(
                f"{info.path}: sha256 is {digest}; expected {info.sha256} (from the manifest); the shard was changed "
                "or is damaged; make the shards again with amp make_shards"
            )
        jobs.append(job)
        progress(len(jobs), len(infos))
    # Shards that are already rewritten have another size than the manifest lists, and its check would reject them.
    current = ShardManifest(manifest.root, {"all": [_as_it_is(info) for info in infos]})
    captions = load_shard_captions(current)
    return [_Job(job.source, job.target, captions[job.source.name], knowledge) for job in jobs]


def _as_it_is(info: ShardInfo) -> ShardInfo:
    return ShardInfo(info.local, info.samples, info.captions, info.local.stat().st_size, "")


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
    needed = max(job.source.bytes for job in jobs)
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
    done, present = _sidecar(job), sha256_of(job.target) if job.target.exists() else ""
    if (
        done is not None
        and (done["knowledge"], done["sha256"]) == (job.knowledge, present)
        and (job.in_place or done["replaces"] == job.source.sha256)
    ):
        return done
    suffix = f".{uuid.uuid4().hex}.tmp"
    temporary = job.target.with_name(job.target.name + suffix)
    temporary_sidecar = job.sidecar.with_name(job.sidecar.name + suffix)
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
        sidecar = {
            # An empty plan makes amp make_shards write this shard again.
            "plan": "",
            "knowledge": job.knowledge,
            "replaces": present if job.in_place else job.source.sha256,
            "samples": job.source.samples,
            "captions": job.source.captions,
            "captions_without_knowledge": sum(c.knowledge is None for image in job.images for c in image.captions),
            "bytes": hashed.size,
            "sha256": hashed.sha256.hexdigest(),
            "index": asdict(side_file(index)),
        }
        # The sidecar comes first: after an interruption it tells which content the shard may have.
        write_json(temporary_sidecar, sidecar)
        os.replace(temporary_sidecar, job.sidecar)
        write_atomically(index_of(job.target), index)
        os.replace(temporary, job.target)
    except OSError as error:
        raise AmpError(
            f"{job.target}: can't be written ({error.strerror or error}); make room or fix the folder, then run "
            "the same command again; rewritten shards are kept"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
        temporary_sidecar.unlink(missing_ok=True)
    return sidecar


def _new_manifest(old: ShardManifest, jobs: list[_Job], sidecars: list[dict[str, Any]], target: Path) -> ShardManifest:
    noted = {job.source.name: sidecar for job, sidecar in zip(jobs, sidecars, strict=True)}
    return ShardManifest(
        root=target,
        splits={
            split: [
                ShardInfo(
                    target / i.name,
                    i.samples,
                    i.captions,
                    noted[i.name]["bytes"],
                    noted[i.name]["sha256"],
                    SideFile(**noted[i.name]["index"]),
                )
                for i in infos
            ]
            for split, infos in old.splits.items()
        },
        captions_without_knowledge={
            split: sum(noted[info.name]["captions_without_knowledge"] for info in infos)
            for split, infos in old.splits.items()
        },
        skipped=old.skipped,
        excluded=old.excluded,
        created_by=old.created_by,
    )
