"""Converts tar files of other tools into shards, or indexes them as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from amp.cores import usable_cores
from amp.data.captions.base import Caption, CaptionedImage, Skip
from amp.data.captions.knowledge_file import cut_note
from amp.data.captions.splits import normal_split
from amp.data.conversion.folder import INDEXES, clear_indexes, surplus_indexes
from amp.data.conversion.index_tar import IndexPlan, index_tar
from amp.data.conversion.knowledge import attach
from amp.data.conversion.plan import ShardPlan, assign_keys, plan_hash
from amp.data.conversion.processes import worker_pool
from amp.data.conversion.run import ONE_SPLIT, Conversion, Form
from amp.data.conversion.skipped import check_skipped
from amp.data.foreign.captions import JSON_KEYS, CaptionChoice
from amp.data.foreign.names import find_tars
from amp.data.foreign.scan import ForeignSample, scan_tar
from amp.data.images.file import Check, Resize
from amp.data.shards.index import Span
from amp.data.shards.manifest import MANIFEST_NAME, ShardManifest
from amp.errors import AmpError
from amp.parts import part_of
from amp.terminal import PlainConsole

TARS_PER_PROCESS = 4
"""Fewer tar files than this are scanned faster than a process starts."""
INDEXED = Form(INDEXES, index_tar, surplus_indexes, clear_indexes, adds=True)


@dataclass(slots=True)
class TarSamples:
    """The samples of a tar file that can be used.

    Attributes:
        path: The tar file.
        samples: Keys and images, in the order of the tar file.
        photos: Where their photos are in the tar file.
    """

    path: Path
    samples: tuple[tuple[str, CaptionedImage], ...]
    photos: tuple[Span, ...]

    def plan_hash(self, resize: Resize | None) -> str:
        found = self.path.stat()
        state = (found.st_size, found.st_mtime_ns)
        return plan_hash(self.samples, [state] * len(self.samples), resize)


def convert_tars(
    captions: str,
    out: str,
    knowledge: str | None,
    knowledge_provenance: str | None,
    caption_keys: list[str] | None,
    split: str,
    resize: Resize | None,
    check: Check,
    max_skipped: float,
    workers: int | None,
    part: str | None,
    command: list[str] | None,
    console: PlainConsole,
) -> ShardManifest | None:
    """Converts tar files of other tools into shards, one for each. Arguments as in `make_shards`.

    Raises:
        AmpError: An input can't be used. The message says which, where, and what to do.
    """
    split = normal_split(split, "--split")
    tars, skipped, provenance = _read(
        find_tars(captions),
        captions,
        split,
        caption_keys,
        knowledge,
        knowledge_provenance,
        max_skipped,
        workers,
        console,
    )
    plans = [
        ShardPlan(
            path=Path(out) / f"{split}-{number:06d}.tar",
            source=tar.path,
            samples=tar.samples,
            resize=resize,
            hash=tar.plan_hash(resize),
            check=check,
            from_tar=True,
        )
        for number, tar in enumerate(tars)
    ]
    conversion = Conversion(
        out=Path(out),
        plans={split: plans},
        source=captions,
        max_skipped=max_skipped,
        lost=skipped,
        provenance={**provenance, "resize": asdict(resize) if resize else None, "check": check},
        form=ONE_SPLIT,
    )
    return conversion.run(part, workers, command, console)


def index_shards(
    shards: str,
    split: str = "train",
    knowledge: str | None = None,
    knowledge_provenance: str | None = None,
    caption_keys: list[str] | None = None,
    out: str | None = None,
    check: Check = "structure",
    max_skipped: float = 0.01,
    workers: int | None = None,
    part: str | None = None,
    command: list[str] | None = None,
    console: PlainConsole | None = None,
) -> ShardManifest | None:
    """Makes tar files of other tools usable as shards, without copying photos.

    Args:
        shards: Tar files of one folder: a tar file, the folder, a pattern such as 'FOLDER/{00000..00009}.tar', or a
            glob. Samples have a photo and a .txt or .json with captions, as img2dataset, CLIP_benchmark, open_clip and
            FLAIR write them.
        split: Split of all samples of these tar files. Run the command once for each split. A split that the manifest
            already lists is replaced.
        knowledge: JSONL file of action knowledge with one caption per line (sentid, or image and caption; triplets;
            states), or the folder that amp generate_knowledge wrote.
        knowledge_provenance: JSON file that describes how the knowledge was made; copied into the manifest. Default:
            the file in the folder, if knowledge is a folder.
        caption_keys: Keys of each sample's .json that hold captions, a string or a list of strings. Default: the .txt
            if there is one, otherwise the key caption, captions, text, texts or raw_caption.
        out: Folder for the indexes, the records and manifest.json, for tar files in a read-only folder. Default: next
            to the tar files.
        check: How damaged photos are found. structure checks the segments of JPEG files and the checksums of PNG files,
            and decodes only doubtful files and other formats. decode decodes every file.
        max_skipped: Maximum fraction of images, and of captions, that may be skipped; above it no manifest is written.
        workers: Number of processes. Default: one per usable CPU.
        part: Index only part I of N, given as I/N from 0/N to N-1/N, without the manifest. Part I is every Nth tar
            file. Afterwards run the command without part.
        command: Command line, recorded in the manifest.
        console: Console for progress output; stderr by default.

    Returns:
        The manifest; None for a part.

    Raises:
        AmpError: An input can't be used. The message says which, where, and what to do.
    """
    console = console or PlainConsole(stderr=True)
    check_numbers(max_skipped, workers, part)
    split = normal_split(split, "--split")
    found = find_tars(shards)
    folder = _one_folder(found, shards)
    side = Path(out) if out is not None else folder
    if side.resolve() == folder.resolve():
        side = folder
    _check_other_splits(found, side, split)
    tars, skipped, provenance = _read(
        found, shards, split, caption_keys, knowledge, knowledge_provenance, max_skipped, workers, console
    )
    # In a manifest elsewhere, the folder of the tar files has to mean the same from any current folder.
    root = folder if side == folder else folder.resolve()
    plans: list[ShardPlan] = [
        IndexPlan(
            path=root / tar.path.name,
            source=root / tar.path.name,
            samples=tar.samples,
            resize=None,
            hash=tar.plan_hash(None),
            check=check,
            from_tar=True,
            photos=tar.photos,
            side=side,
            split=split,
        )
        for tar in tars
    ]
    conversion = Conversion(
        out=side,
        plans={split: plans},
        source=shards,
        max_skipped=max_skipped,
        lost=skipped,
        provenance={**provenance, "check": check},
        form=INDEXED,
    )
    return conversion.run(part, workers, command, console)


def check_numbers(max_skipped: float, workers: int | None, part: str | None) -> None:
    """Checks options that are used late.

    Raises:
        AmpError: One is out of range.
    """
    if workers is not None and workers < 1:
        raise AmpError(f"workers is {workers}; expected 1 or more")
    if not 0 <= max_skipped <= 1:
        raise AmpError(f"max_skipped is {max_skipped}; expected a fraction from 0 to 1")
    if part is not None:
        part_of(part)


def _read(
    tars: list[Path],
    named: str,
    split: str,
    caption_keys: list[str] | None,
    knowledge: str | None,
    knowledge_provenance: str | None,
    max_skipped: float,
    workers: int | None,
    console: PlainConsole,
) -> tuple[list[TarSamples], list[Skip], dict[str, Any]]:
    """The usable samples of tar files with their knowledge, what was skipped, and the manifest's entry."""
    choice, unread = CaptionChoice(caption_keys), Counter[str]()
    scanned = []
    with console.progress("reading captions", "tar files") as report:
        for found, its_choice, its_unread in _scan_all(tars, caption_keys, workers, console):
            scanned.append(found)
            choice.add(its_choice)
            unread += its_unread
            report(len(scanned), len(tars))
    choice.check_keys(named)
    tars_read, skipped = number_samples(tars, scanned, split)
    images = [image for tar in tars_read for _, image in tar.samples]
    if not images:
        first = f"; {len(skipped):,} skipped, first: {skipped[0].file}: {skipped[0].reason}" if skipped else ""
        raise AmpError(
            f"{named}: no photo with a caption in it; expected photos with a .txt, or a .json with the key "
            f"{', '.join(JSON_KEYS[:-1])} or {JSON_KEYS[-1]}{first}; keys seen in .json: "
            f"{', '.join(sorted(choice.keys_seen)) or 'none'}; choose others with --caption_keys"
        )
    for note in _notes(named, choice, unread):
        console.print(note, soft_wrap=True)
    with console.progress("reading knowledge"):
        counts, entry = attach(images, knowledge, knowledge_provenance, None)
    if cut := cut_note(images, counts):
        console.print(cut, soft_wrap=True)
    check_skipped(skipped, images, max_skipped, named)
    return tars_read, skipped, {"caption_keys": caption_keys, "knowledge": entry}


Scanned = tuple[list[ForeignSample], CaptionChoice, Counter[str]]


def _scan_all(
    tars: list[Path], caption_keys: list[str] | None, workers: int | None, console: PlainConsole
) -> Iterator[Scanned]:
    """Scans tar files, in order; many of them in several processes."""
    scan = partial(_scan, caption_keys=caption_keys)
    workers = min(workers or usable_cores(), len(tars) // TARS_PER_PROCESS)
    if workers < 2:
        yield from map(scan, tars)
        return
    with worker_pool(workers, console, "the tar files that are being read") as (pool, _):
        yield from pool.map(scan, tars)


def _scan(tar: Path, caption_keys: list[str] | None) -> Scanned:
    choice, unread = CaptionChoice(caption_keys), Counter[str]()
    return scan_tar(tar, choice, unread), choice, unread


def number_samples(
    tars: Sequence[Path], scanned: Sequence[Sequence[ForeignSample]], split: str
) -> tuple[list[TarSamples], list[Skip]]:
    """Numbers the captions of all tar files from 0, makes keys unique, and separates what can't be used.

    Empty captions and those of unusable samples count, as in captions files.
    """
    skipped: list[Skip] = []
    number = 0
    kept: list[tuple[int, CaptionedImage, Span]] = []
    for place, (tar, samples) in enumerate(zip(tars, scanned, strict=True)):
        for sample in samples:
            name = f"{tar.name}/{sample.name}"
            ids = range(number, number + len(sample.texts))
            number = ids.stop
            if sample.problem is not None:
                kind, reason = sample.problem
                skipped.append(Skip(kind, name, reason, split, captions=len(sample.texts)))
                continue
            captions = [Caption(i, text) for i, text in zip(ids, sample.texts, strict=True) if text]
            empty = len(sample.texts) - len(captions)
            skipped += [Skip("empty_caption", name, "a caption is empty", split, captions=1)] * empty
            if not captions:
                skipped.append(Skip("image_without_caption", name, "it has no caption", split))
                continue
            kept.append((place, CaptionedImage(sample.name, sample.name, sample.id, split, captions), sample.photo))
    keyed = assign_keys([image for _, image, _ in kept], [f"{place}/{image.path}" for place, image, _ in kept])
    ids_seen = Counter(image.id for _, image in keyed)
    grouped: list[tuple[list[tuple[str, CaptionedImage]], list[Span]]] = [([], []) for _ in tars]
    for (place, _, photo), (key, image) in zip(kept, keyed, strict=True):
        if ids_seen[image.id] > 1:  # tools that number the samples of each tar file from 0
            image.id = key
        grouped[place][0].append((key, image))
        grouped[place][1].append(photo)
    return [
        TarSamples(tar, tuple(samples), tuple(photos)) for tar, (samples, photos) in zip(tars, grouped, strict=True)
    ], skipped


def _notes(named: str, choice: CaptionChoice, unread: Counter[str]) -> list[str]:
    read = ", ".join(f"{place} ({count:,} samples)" for place, count in choice.read.items())
    notes = [f"{named}: captions read from {read}"]
    if unread:
        others = ", ".join(f"{name} ({count:,})" for name, count in unread.most_common(10))
        notes.append(f"{named}: members not read: {others}")
    return notes


def _one_folder(tars: list[Path], named: str) -> Path:
    folders = list(dict.fromkeys(tar.parent for tar in tars))
    if len(folders) > 1:
        raise AmpError(
            f"{named}: tar files in {len(folders)} folders, first {folders[0]} and {folders[1]}; expected one folder; "
            "index each folder by itself, or convert the tar files with amp make_shards --captions"
        )
    return folders[0]


def _check_other_splits(tars: list[Path], side: Path, split: str) -> None:
    """Refuses a tar file that another split of the manifest has, or that has the name of one of its tar files."""
    if not (side / MANIFEST_NAME).exists():
        return
    for other, infos in ShardManifest.load(side).splits.items():
        taken = {info.name for info in infos} & {tar.name for tar in tars} if other != split else set()
        if taken:
            raise AmpError(
                f"{side / MANIFEST_NAME}: {min(taken)} is in split {other!r}; expected each tar file, and each name, "
                f"in one split; index split {other!r} again without it, or choose another --out"
            )
