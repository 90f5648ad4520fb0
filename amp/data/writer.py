"""Write shards: plan first, then fill what is missing, in parallel, the manifest last.

The plan is a pure function of the inputs, and each shard's plan has a hash: what goes in, in which order, size and
time of each image file, how resized. Beside the shards, ``.plan/`` keeps one small file a finished shard with that
hash, so a second run writes only shards that are missing, of the wrong size, or planned differently. Nothing appears
under its final name before it is complete.

A part of the plan can be written by itself, on another machine, while others write theirs. What a part puts in place
depends on the plan alone, so parts needn't wait for each other, and two at the same shard write the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import stat
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from amp.cores import usable_cores
from amp.data.decode import PHOTO_SUFFIXES, unreadable_reason
from amp.data.file_names import composed, find_file
from amp.data.image_file import Check, Resize, UnreadableImageError, read_image
from amp.data.shard_file import HashedFile, add_member, end_archive, record_bytes
from amp.data.shards import MANIFEST_NAME, RECORD_SCHEMA, ShardInfo, ShardManifest
from amp.data.sources import (
    SKIP_KINDS,
    CaptionedImage,
    Skip,
    attach_knowledge,
    cut_note,
    load_captions,
    load_image_list,
    normal_split,
)
from amp.errors import AmpError, public_command, too_many_skipped
from amp.files import sha256_of, write_json
from amp.json_text import parse_json
from amp.knowledge.schema import KNOWLEDGE_NAME, PROVENANCE_NAME
from amp.locks import locked_folder
from amp.parts import part_of
from amp.terminal import PlainConsole
from amp.version import __version__

# Part of every shard's plan: raise it when the bytes written for the same input change.
WRITER_VERSION = 2


class ShardWriteError(AmpError):
    """The shards can't be written as asked."""


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """Everything that decides a shard's bytes, and where they go."""

    path: Path
    images_root: Path
    samples: tuple[tuple[str, CaptionedImage], ...]  # (key, image) in the order of the tar
    resize: Resize | None
    hash: str
    check: Check

    @property
    def sidecar(self) -> Path:
        return self.path.parent / ".plan" / f"{self.path.name}.json"


def make_shards(
    captions: str,
    images: str,
    out: str,
    knowledge: str | None = None,
    knowledge_provenance: str | None = None,
    format: Literal["auto", "karpathy", "csv", "jsonl"] = "auto",
    default_split: str = "train",
    keep_restval: bool = False,
    splits: list[str] | None = None,
    limit: int | None = None,
    exclude_images: str | None = None,
    exclude_split: str = "train",
    samples_per_shard: int = 1000,
    resize: int | None = None,
    resize_mode: Literal["shortest", "squash"] = "shortest",
    resize_quality: int = 95,
    check: Check = "structure",
    max_skipped: float = 0.01,
    workers: int | None = None,
    seed: int = 0,
    part: str | None = None,
    command: list[str] | None = None,
    console: PlainConsole | None = None,
) -> ShardManifest | None:
    """Turn a captions file and a folder of photos into shards.

    Args:
        captions: captions file: a Karpathy JSON, or a CSV or JSONL with image, caption and, if wanted, split.
        images: folder that the image files' paths start from.
        out: folder for the shards and manifest.json; made if absent.
        knowledge: JSONL of action knowledge, one caption a line: sentid (or image and caption), triplets, states; or
            the folder that amp generate_knowledge wrote.
        knowledge_provenance: JSON that says how the knowledge was made; copied into the manifest. By default the
            folder's, where `knowledge` is one.
        format: format of the captions file; auto goes by its suffix.
        default_split: split of CSV and JSONL rows that name none.
        keep_restval: keep Karpathy's restval a split of its own instead of a part of train.
        splits: splits to convert; all that occur by default.
        limit: at most so many images a split, a seeded random choice of them.
        exclude_images: text file with one image file a line, to be left out of exclude_split, for instance the images
            that the base model was pre-trained on.
        exclude_split: the split that exclude_images applies to.
        samples_per_shard: images a shard.
        resize: store images resized to so many pixels, as JPEG; by default the files' bytes are stored untouched.
        resize_mode: shortest keeps the aspect ratio and never enlarges; squash makes them square.
        resize_quality: JPEG quality of resized images, 1 to 95.
        check: how an image is found to be whole: structure looks at the segments of a JPEG and the checksums of a PNG,
            and decodes what is in doubt and all other formats; decode decodes everything, at several times the cost,
            and finds damage inside a JPEG's scan too, which would stop a training run.
        max_skipped: largest fraction of images, or of captions, that may be skipped; above it no manifest is written.
        workers: processes; by default one a usable CPU.
        seed: of the order of samples, and of limit's choice.
        part: I/N, from 0/N to N-1/N: write every Nth shard, from number I on, and no manifest. Parts may run at once,
            in any order and again; then the command without it does what is missing and writes the manifest.
        command: the command line, for the manifest.
        console: where progress is shown; stderr by default.

    Returns:
        The manifest, as written to ``out``; None of a part.

    Raises:
        AmpError: input that can't be used; the message says which, where, and what to do.
    """
    console = console or PlainConsole(stderr=True)
    images_root, out_root = Path(images), Path(out)
    if knowledge is not None:
        knowledge, knowledge_provenance = knowledge_files(knowledge, knowledge_provenance)
    if not images_root.is_dir():
        raise ShardWriteError(f"{images_root}: no such folder; expected the folder of image files; check --images")
    _check_at_least("samples_per_shard", samples_per_shard, 1)
    _check_at_least("limit", limit, 1)
    _check_at_least("workers", workers, 1)
    if not 0 <= max_skipped <= 1:
        raise ShardWriteError(f"max_skipped is {max_skipped}; expected a fraction from 0 to 1")
    index, parts = part_of(part) if part is not None else (0, 1)
    share = slice(index, None, parts)
    resizing = Resize(resize, resize_mode, resize_quality) if resize is not None else None

    with console.progress("reading captions and knowledge"):
        provenance: dict[str, Any] = {"captions": source_file(captions)}
        report = None
        source = load_captions(captions, format, default_split, keep_restval)
        if knowledge is not None:
            report = attach_knowledge(source.images, knowledge)
            provenance["knowledge"] = {
                **source_file(knowledge),
                "records": report.records,
                "captions_with_knowledge": report.attached,
                "records_without_caption": report.unused,
                "provenance": load_provenance(knowledge_provenance),
            }
        elif knowledge_provenance is not None:
            raise ShardWriteError("knowledge_provenance is given without knowledge; give both, or neither")
        else:
            provenance["knowledge"] = None
        keyed = _assign_keys(source.images)
        chosen = _choose_splits(source.images, splits)
        excluded: dict[str, int] = {}
        if exclude_images is not None:
            names = set(load_image_list(exclude_images))
            exclude_split = normal_split(exclude_split, "--exclude_split", {image.split for image in source.images})
            before = len(keyed)
            keyed = _exclude(keyed, names, exclude_split, exclude_images)
            excluded = {exclude_split: before - len(keyed)} if exclude_split in chosen else {}
            provenance["exclude_images"] = {
                **source_file(exclude_images),
                "split": exclude_split,
                "names": len(names),
                "images": before - len(keyed),
            }
    cut = cut_note((image for image in source.images if image.split in chosen), report)
    for note in (*source.notes, *_split_notes(captions, source.images), *([cut] if cut else [])):
        console.print(note, soft_wrap=True)
    # Without --splits, also those of a split that is left without any image.
    skipped = [skip for skip in source.skipped if splits is None or skip.split in chosen]
    _check_skipped(skipped, [image for image in source.images if image.split in chosen], max_skipped, captions)

    with console.progress("looking for the image files"):
        plans: dict[str, list[ShardPlan]] = {}
        lost_files: list[Skip] = []
        for split in chosen:
            members = [(key, image) for key, image in keyed if image.split == split]
            members.sort(key=lambda member: _order(seed, split, member[0]))
            present, states, missing = _find_files(images_root, members, limit)
            lost_files += missing
            plans[split] = _plan_split(
                out_root, images_root, split, present, states, samples_per_shard, resizing, check
            )
    planned = [image for split_plans in plans.values() for plan in split_plans for _, image in plan.samples]
    _check_skipped(lost_files, planned, max_skipped, images)
    for split, split_plans in plans.items():
        if not split_plans:
            lost = [skip for skip in lost_files if skip.split == split]
            first = f"; {len(lost):,} can't be used, the first is {lost[0].file}: {lost[0].reason}" if lost else ""
            raise ShardWriteError(
                f"{captions}: no image is left in split {split!r} (excluded: {excluded.get(split, 0)}){first}; "
                "expected at least one; leave the split out with --splits, or check --images and --exclude_images"
            )

    every_plan = [plan for split_plans in plans.values() for plan in split_plans]
    mine = every_plan[share]
    with lock_folder(out_root, shared=part is not None):
        surplus = _surplus(out_root, every_plan)
        to_write = [plan for plan in mine if _to_write(plan)]
        others = sum(plan.path.exists() for plan in to_write) + (len(surplus) if part is None else 0)
        if others:
            console.print(f"{out_root}: shards there that differ from what these options give, replaced: {others}")
        if to_write or surplus:
            # From here on the old manifest would describe files that are about to change.
            (out_root / MANIFEST_NAME).unlink(missing_ok=True)
        if part is None:
            _clear_stale(out_root, surplus)
        done = len(mine) - len(to_write)
        if done:
            console.print(f"{done} of {len(mine)} shards are there already and stay")
        _write_all(to_write, workers, console, accept_gaps=part is None)

        unreadable = _unreadable(mine)
        lost_files += unreadable
        kept = _without(planned, unreadable)
        if part is not None:
            # Judged by the images of all parts, so that no part fails over what the whole may skip.
            _check_skipped(lost_files, kept, max_skipped, f"{images} (part {part})")
            whole = sum(not _to_write(plan) for plan in mine)
            console.print(
                f"part {part}: {whole} of its {len(mine)} shards are whole, {len(unreadable)} images unreadable; "
                "the same command without --part does what is missing and writes the manifest"
            )
            return None
        infos, without_knowledge = _collect(plans, images)
        _check_skipped(lost_files, kept, max_skipped, images)
        manifest = ShardManifest(
            root=out_root,
            splits=infos,
            captions_without_knowledge=without_knowledge,
            skipped=_by_kind(skipped + lost_files),
            excluded=excluded,
            provenance={
                **provenance,
                "resize": asdict(resizing) if resizing else None,
                "check": check,
                "seed": seed,
                "limit": limit,
                "command": public_command(command) if command is not None else None,
            },
            created_by=f"open-clip-amp {__version__}",
        )
        manifest.save()
    return manifest


def write_shard(plan: ShardPlan, progress: Callable[[], None] = lambda: None, accept_gaps: bool = True) -> None:
    """Write one shard and its sidecar, images checked as planned; ``progress`` is called once an image.

    Without ``accept_gaps`` a shard that lacks images which could be readable in the next run is not put in place: its
    sidecar alone tells of them, and it counts as missing.

    ``webdataset.TarWriter`` would do for the bytes (it takes an mtime), but importing webdataset brings torch, seconds
    and hundreds of megabytes a worker process, and it sorts members, which puts ``KEY.json`` before ``KEY.png``.

    Raises:
        ShardWriteError: the shard can't be written (a full disk, say).
    """
    # Unique over machines: another task may be at the same shard.
    suffix = f".{uuid.uuid4().hex}.tmp"
    temporary = plan.path.with_name(plan.path.name + suffix)
    temporary_sidecar = plan.sidecar.with_name(plan.sidecar.name + suffix)
    skipped: list[Skip] = []
    samples = captions = without_knowledge = 0
    retry = False
    try:
        with open(temporary, "wb") as file:
            hashed = HashedFile(file)
            for key, image in plan.samples:
                try:
                    content, extension = read_image(find_file(plan.images_root, image.path), plan.resize, plan.check)
                except UnreadableImageError as error:
                    # A file that can't be opened may be mended without a new mtime, so the next run tries again.
                    retry |= error.may_pass
                    reason = str(error)
                    skipped.append(Skip("unreadable_image", image.path, reason, image.split, len(image.captions)))
                else:
                    add_member(hashed, f"{key}.{extension}", content)
                    add_member(hashed, f"{key}.json", record_bytes(key, image))
                    samples += 1
                    captions += len(image.captions)
                    without_knowledge += sum(caption.knowledge is None for caption in image.captions)
                progress()
            end_archive(hashed)
            file.flush()
            os.fsync(file.fileno())
        # Without its sidecar a shard doesn't count, so there is no moment at which a sidecar describes another tar.
        plan.sidecar.unlink(missing_ok=True)
        if not samples:
            plan.path.unlink(missing_ok=True)
        elif accept_gaps or not retry:
            os.replace(temporary, plan.path)
        write_json(
            temporary_sidecar,
            {
                "plan": plan.hash,
                "samples": samples,
                "captions": captions,
                "captions_without_knowledge": without_knowledge,
                "bytes": hashed.size,
                "sha256": hashed.sha256.hexdigest(),
                "skipped": [asdict(skip) for skip in skipped],
                "retry": retry,
                "check": plan.check,
            },
        )
        os.replace(temporary_sidecar, plan.sidecar)
    except OSError as error:
        raise ShardWriteError(
            f"{plan.path}: can't be written ({error.strerror or error}); make room or mend the folder, and run the "
            "same command again: finished shards are kept"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
        temporary_sidecar.unlink(missing_ok=True)


def _assign_keys(images: list[CaptionedImage]) -> list[tuple[str, CaptionedImage]]:
    """A key an image: its file's stem with anything but ASCII letters, digits, ``_`` and ``-`` replaced by ``_``.

    Files that would share a key (``cats/1.jpg``, ``dogs/1.jpg``) all get a piece of their path's hash behind it. Keys
    depend on the captions file alone, not on what is chosen from it.
    """
    stems = [re.sub(r"[^A-Za-z0-9_-]", "_", PurePosixPath(image.path).stem) for image in images]
    counts = Counter(stems)
    keys = [
        stem if counts[stem] == 1 else f"{stem}-{_digest(image.path)[:8]}"
        for stem, image in zip(stems, images, strict=True)
    ]
    # A file may be called as another's key with its hash; all of the hash can't be met by a name.
    counts = Counter(keys)
    return [
        (key if counts[key] == 1 else f"{key}-{_digest(image.path)}", image)
        for key, image in zip(keys, images, strict=True)
    ]


def _order(seed: int, split: str, key: str) -> str:
    """The place of a sample: by hash, so that it depends on no generator's version and on no other sample."""
    return _digest(f"{seed}/{split}/{key}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _choose_splits(images: list[CaptionedImage], splits: list[str] | None) -> list[str]:
    """The splits to write, in the order of the captions file."""
    present = list(dict.fromkeys(image.split for image in images))
    chosen = {normal_split(split, "--splits", present): split for split in splits or present}
    for name, split in chosen.items():
        if name not in present:
            raise ShardWriteError(
                f"--splits names {split!r}, which no image is in; expected some of {', '.join(present)}; correct it"
            )
    return [split for split in present if split in chosen]


def _split_notes(captions: str, images: list[CaptionedImage]) -> list[str]:
    """What training would stumble over, where the captions file has no split of the usual name."""
    present = dict.fromkeys(image.split for image in images)
    if "train" in present:
        return []
    return [
        f"{captions}: no split 'train' in it; splits seen: {', '.join(present)}; that is enough for an evaluation; to "
        "train on one of them give --data.train_split NAME"
    ]


def _exclude(
    keyed: list[tuple[str, CaptionedImage]], names: set[str], split: str, list_file: str
) -> list[tuple[str, CaptionedImage]]:
    """Drop the named images from one split."""
    names = set(map(composed, names))
    kept = [
        (key, image)
        for key, image in keyed
        if image.split != split or names.isdisjoint((composed(image.path), composed(image.name)))
    ]
    if len(kept) == len(keyed):
        raise ShardWriteError(
            f"{list_file}: none of its {len(names)} names is an image of split {split!r}; expected file names as in "
            "the captions file; check the list and --exclude_split"
        )
    return kept


def _find_files(
    root: Path, members: list[tuple[str, CaptionedImage]], limit: int | None
) -> tuple[list[tuple[str, CaptionedImage]], list[tuple[int, int]], list[Skip]]:
    """The first ``limit`` members whose file is there, each file's size and mtime in ns, and those that aren't."""
    present: list[tuple[str, CaptionedImage]] = []
    states: list[tuple[int, int]] = []
    skipped: list[Skip] = []
    for key, image in members:
        if len(present) == limit:
            break
        suffix = PurePosixPath(image.path).suffix
        kind, reason = None, ""
        if suffix.lower() not in PHOTO_SUFFIXES:
            kind = "unreadable_image"
            reason = unreadable_reason(suffix) or f"suffix {suffix!r} isn't one of {', '.join(PHOTO_SUFFIXES)}"
        else:
            try:
                state = os.stat(find_file(root, image.path))
            except OSError as error:
                kind, reason = "missing_image", f"{error.strerror} in the images folder"
            else:
                if not stat.S_ISREG(state.st_mode):
                    kind, reason = "missing_image", "not a file"
        if kind:
            skipped.append(Skip(kind, image.path, reason, image.split, captions=len(image.captions)))
        else:
            present.append((key, image))
            states.append((state.st_size, state.st_mtime_ns))
    return present, states, skipped


def _plan_split(
    out: Path,
    images_root: Path,
    split: str,
    members: list[tuple[str, CaptionedImage]],
    states: list[tuple[int, int]],
    samples_per_shard: int,
    resize: Resize | None,
    check: Check,
) -> list[ShardPlan]:
    plans = []
    for number, start in enumerate(range(0, len(members), samples_per_shard)):
        samples = tuple(members[start : start + samples_per_shard])
        digest = hashlib.sha256()
        head = [WRITER_VERSION, RECORD_SCHEMA, asdict(resize) if resize else None]
        digest.update(json.dumps(head).encode())
        for (key, image), state in zip(samples, states[start : start + samples_per_shard], strict=True):
            captions = [(caption.id, caption.text, caption.knowledge) for caption in image.captions]
            line = json.dumps([key, image.path, image.id, image.split, state, captions])
            digest.update(line.encode("ascii"))
        path = out / f"{split}-{number:06d}.tar"
        plans.append(ShardPlan(path, images_root, samples, resize, digest.hexdigest(), check))
    return plans


def _sidecar(plan: ShardPlan) -> dict[str, Any] | None:
    """What was noted when the shard was last written as planned; None if it never was."""
    try:
        sidecar = parse_json(plan.sidecar.read_text(encoding="utf-8"))
        return sidecar if sidecar["plan"] == plan.hash else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _finished(plan: ShardPlan) -> dict[str, Any] | None:
    """The sidecar of a shard that is there as planned; None where it has to be written."""
    sidecar = _sidecar(plan)
    try:
        whole = sidecar and (sidecar["samples"] == 0 or plan.path.stat().st_size == sidecar["bytes"])
        strict = plan.check == "structure" or (sidecar and sidecar.get("check", "decode") == "decode")
        return sidecar if whole and strict else None
    except (OSError, KeyError):
        return None


def _unreadable(plans: list[ShardPlan]) -> list[Skip]:
    """The unreadable images that the sidecars tell of."""
    sidecars = [_sidecar(plan) for plan in plans]
    return [Skip(**entry) for sidecar in sidecars if sidecar for entry in sidecar["skipped"]]


def _without(images: list[CaptionedImage], skipped: list[Skip]) -> list[CaptionedImage]:
    gone = {skip.file for skip in skipped}
    return [image for image in images if image.path not in gone]


def _collect(plans: dict[str, list[ShardPlan]], images: str) -> tuple[dict[str, list[ShardInfo]], dict[str, int]]:
    """What the sidecars say: the shards of each split, and its captions without knowledge."""
    infos: dict[str, list[ShardInfo]] = {split: [] for split in plans}
    without_knowledge = dict.fromkeys(plans, 0)
    for split, split_plans in plans.items():
        for plan in split_plans:
            sidecar = _finished(plan)
            if sidecar is None:
                raise ShardWriteError(f"{plan.path}: changed while shards were written; run the same command again")
            without_knowledge[split] += sidecar["captions_without_knowledge"]
            if sidecar["samples"]:
                counts = {key: sidecar[key] for key in ("samples", "captions", "bytes", "sha256")}
                infos[split].append(ShardInfo(path=plan.path, **counts))
        if not infos[split]:
            raise ShardWriteError(f"{images}: no image of split {split!r} can be read; expected at least one")
    return infos, without_knowledge


def _to_write(plan: ShardPlan) -> bool:
    """Whether a shard is missing, or lacks images that could be readable by now."""
    sidecar = _finished(plan)
    return sidecar is None or sidecar["retry"]


@contextmanager
def lock_folder(out: Path, shared: bool = False) -> Iterator[None]:
    """Make the folder and keep other runs out of it (shared: but for other parts); the lock dies with the process."""
    plan_folder = out / ".plan"
    try:
        # In this order, since another part may be making both: its .plan comes first.
        if any(out.glob("*.tar")) and not plan_folder.is_dir():
            raise ShardWriteError(
                f"{out}: holds tar files that this tool didn't make; expected a new or empty folder, or one of its "
                "own; choose another --out"
            )
        plan_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(out, error) from None
    busy = "another run is writing shards here; wait for it to end, or choose another --out"
    with ExitStack() as stack:
        try:
            stack.enter_context(locked_folder(plan_folder, busy, shared))
        except OSError as error:
            raise _cannot_write(out, error) from None
        yield


def _cannot_write(out: Path, error: OSError) -> ShardWriteError:
    return ShardWriteError(f"{out}: can't be made or written ({error.strerror}); choose another --out")


def _surplus(out: Path, plans: list[ShardPlan]) -> list[str]:
    """Names of an earlier run's shards that the plan replaces.

    Raises:
        ShardWriteError: shards of a split that isn't planned.
    """
    planned = {plan.path.name for plan in plans}
    splits = {name.rsplit("-", 1)[0] for name in planned}
    surplus = [name for name in (path.stem for path in (out / ".plan").glob("*.tar.json")) if name not in planned]
    for name in surplus:
        split = name.rsplit("-", 1)[0]
        if split not in splits:
            raise ShardWriteError(
                f"{out}: holds shards of split {split!r} ({name}), which isn't among {', '.join(sorted(splits))}; "
                "convert all splits in one run, or choose another --out"
            )
    return surplus


def _clear_stale(out: Path, surplus: list[str]) -> None:
    """Remove what earlier runs left: surplus shards and temporary files."""
    for name in surplus:
        (out / name).unlink(missing_ok=True)
        (out / ".plan" / f"{name}.json").unlink(missing_ok=True)
    for folder in (out, out / ".plan"):
        for temporary in folder.glob("*.tmp"):
            temporary.unlink(missing_ok=True)


def _write_all(plans: list[ShardPlan], workers: int | None, console: PlainConsole, accept_gaps: bool) -> None:
    """Write the shards, several at once; images are counted."""
    if not plans:
        return
    workers = min(workers or usable_cores(), len(plans))
    total = sum(len(plan.samples) for plan in plans)
    with console.progress(f"writing {len(plans)} shards", "images", keep=True) as report:
        if workers == 1:
            done = itertools.count(1)
            for plan in plans:
                write_shard(plan, lambda: report(next(done), total), accept_gaps)
            return
        # spawn: a fork beside the bar's thread could inherit a lock for ever, and would inherit the folder's lock.
        context = multiprocessing.get_context("spawn")
        counter = context.Value("q", 0)
        with ProcessPoolExecutor(workers, context, _start_worker, (counter,)) as pool:
            pending = {pool.submit(_write_in_worker, plan, accept_gaps) for plan in plans}
            try:
                while pending:
                    finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                    report(counter.value, total)
                    for future in finished:
                        future.result()
            except KeyboardInterrupt:
                console.say("stopping; the shards at hand are finished first")
                raise
            except BrokenProcessPool:
                raise ShardWriteError(
                    "a worker process was killed, most likely for want of memory; run the same command with fewer "
                    "--workers: finished shards are kept"
                ) from None
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


_counter: Any = None  # of images done, shared by the workers


def _start_worker(counter: Any) -> None:
    global _counter
    _counter = counter
    # Ctrl-C reaches the whole group; the parent lets the shards at hand come to their end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Should the parent be killed, nothing else would end this process.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is a worker's thread"
    parent.join()
    os._exit(1)


def _write_in_worker(plan: ShardPlan, accept_gaps: bool) -> None:
    write_shard(plan, _count_image, accept_gaps)


def _count_image() -> None:
    with _counter.get_lock():
        _counter.value += 1


_CAPTION_KINDS = ("empty_caption", "caption_without_image")


def _check_skipped(skipped: list[Skip], kept: list[CaptionedImage], allowed: float, file: str) -> None:
    """Raise if more than the allowed fraction of images, or of captions, is left out."""
    images, captions = sum(skip.kind not in _CAPTION_KINDS for skip in skipped), sum(skip.captions for skip in skipped)
    lost = {
        "images": (images, images + len(kept)),
        "captions": (captions, captions + sum(len(image.captions) for image in kept)),
    }
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(skip.kind for skip in skipped).items())
    reasons = [f"{skip.file or '(no file)'}: {skip.reason}" for skip in skipped]
    note = f"no manifest was written; {kinds}"
    if message := too_many_skipped(file, lost, "--max_skipped", allowed, reasons, note):
        raise ShardWriteError(message)


def _by_kind(skipped: Iterable[Skip]) -> dict[str, list[dict[str, Any]]]:
    """The manifest's ``skipped``: every kind is present, so that an empty list says that nothing was."""
    kinds: dict[str, list[dict[str, Any]]] = {kind: [] for kind in SKIP_KINDS}
    for skip in skipped:
        kinds[skip.kind].append(skip.to_dict())
    return kinds


def knowledge_files(knowledge: str, provenance: str | None) -> tuple[str, str | None]:
    """The files of knowledge and its provenance, where ``knowledge`` may be the folder that holds both."""
    folder = Path(knowledge)
    if not folder.is_dir():
        return knowledge, provenance
    return str(folder / KNOWLEDGE_NAME), str(folder / PROVENANCE_NAME) if provenance is None else provenance


def source_file(path: str) -> dict[str, str]:
    try:
        return {"file": Path(path).name, "sha256": sha256_of(path)}
    except OSError as error:
        raise ShardWriteError(f"{path}: can't be read ({error.strerror}); expected a file; check the path") from None


def load_provenance(path: str | None) -> Any:
    if path is None:
        return None
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ShardWriteError(
            f"{path}: can't be read ({error.strerror}); expected a JSON file; check the path"
        ) from None
    except ValueError as error:
        raise ShardWriteError(
            f"{path}: not valid JSON ({error}); expected the knowledge's provenance; mend it"
        ) from None


def _check_at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ShardWriteError(f"{name} is {value}; expected {least} or more")
