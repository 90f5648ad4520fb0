"""Converts a captions file and a folder of photos into shards: writes missing shards, then the manifest."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from amp.data.captions.base import CaptionedImage, Skip
from amp.data.captions.knowledge_file import KnowledgeReport, attach_knowledge, cut_note
from amp.data.captions.load import load_captions
from amp.data.captions.splits import normal_split
from amp.data.conversion.absolute_paths import make_relative
from amp.data.conversion.folder import clear_stale, lock_folder, surplus_shards
from amp.data.conversion.photos import photo_folder, write_photos
from amp.data.conversion.plan import ShardPlan, assign_keys, in_stored_order, plan_split
from amp.data.conversion.selection import choose_splits, exclude, find_samples, load_image_list, split_notes
from amp.data.conversion.skipped import by_kind, check_skipped
from amp.data.conversion.sources import knowledge_files, load_provenance, source_file
from amp.data.conversion.write import write_all
from amp.data.images.file import Check, Resize
from amp.data.images.names import RelativeNames
from amp.data.shards.index import SideFile
from amp.data.shards.manifest import MANIFEST_NAME, ShardInfo, ShardManifest
from amp.errors import AmpError, public_command
from amp.parts import part_of
from amp.terminal import PlainConsole
from amp.version import __version__


def make_shards(
    captions: str,
    images: str | None,
    out: str,
    knowledge: str | None = None,
    knowledge_provenance: str | None = None,
    format: str = "auto",
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
    """Converts a captions file and a folder of photos into shards.

    Args:
        captions: Captions file: a Karpathy JSON, COCO's annotations, a JSON list, or a CSV, JSONL, token or Parquet
            file. It may be compressed with gzip. Or datasets:NAME or datasets:NAME:CONFIG, where NAME is a folder or a
            dataset of the Hugging Face hub.
        images: Folder that the paths of the image files are relative to. Absolute paths must lead into it. Photos that
            the captions file contains are written to it. None for captions with their photos: uses the dataset's
            folder, or OUT/photos.
        out: Folder for the shards and manifest.json; created if it doesn't exist.
        knowledge: JSONL file of action knowledge with one caption per line (sentid, or image and caption; triplets;
            states), or the folder that amp generate_knowledge wrote.
        knowledge_provenance: JSON file that describes how the knowledge was made; copied into the manifest. Default:
            the file in the folder, if knowledge is a folder.
        format: Format of the captions file: karpathy, csv, jsonl, coco, list, token, parquet, datasets, or the name of
            a plugin's format; auto chooses by the file's suffix and content.
        default_split: Split of images without a split.
        keep_restval: Keep Karpathy's restval as a separate split instead of adding it to train.
        splits: Splits to convert. Default: all splits in the captions file.
        limit: Maximum number of images per split, chosen at random (see seed). Default: no limit.
        exclude_images: Text file with one image file name per line. These images are left out of exclude_split, for
            example because the base model was pre-trained on them.
        exclude_split: Split that exclude_images applies to.
        samples_per_shard: Number of images per shard.
        resize: Size in pixels to which images are resized; they are stored as JPEG. Default: files are stored
            unchanged.
        resize_mode: shortest resizes the shorter side, keeps the aspect ratio and never enlarges; squash makes images
            square.
        resize_quality: JPEG quality of resized images, 1 to 95.
        check: How damaged images are found. structure checks the segments of JPEG files and the checksums of PNG
            files, and decodes only doubtful files and other formats. decode decodes every file; it takes several times
            as long and also finds damage inside a JPEG's scan, which would stop a training run.
        max_skipped: Maximum fraction of images, and of captions, that may be skipped; above it no manifest is written.
        workers: Number of processes. Default: one per usable CPU.
        seed: Random seed of the order of samples and of the choice made by limit.
        part: Write only part I of N, given as I/N from 0/N to N-1/N, without the manifest. Part I is every Nth shard,
            starting with shard I. Parts can run at the same time, in any order, and repeatedly. Afterwards run the
            command without part to write missing shards and the manifest.
        command: Command line, recorded in the manifest.
        console: Console for progress output; stderr by default.

    Returns:
        The manifest, as written to `out`; None for a part.

    Raises:
        AmpError: An input can't be used. The message says which, where, and what to do.
    """
    console = console or PlainConsole(stderr=True)
    out_root = Path(out)
    if images is not None and not Path(images).is_dir():
        raise AmpError(f"{images}: no such folder; expected the folder of image files; check --images")
    for name, value in (("samples_per_shard", samples_per_shard), ("limit", limit), ("workers", workers)):
        if value is not None and value < 1:
            raise AmpError(f"{name} is {value}; expected 1 or more")
    if not 0 <= max_skipped <= 1:
        raise AmpError(f"max_skipped is {max_skipped}; expected a fraction from 0 to 1")
    index, parts = part_of(part) if part is not None else (0, 1)
    resizing = Resize(resize, resize_mode, resize_quality) if resize is not None else None

    with console.progress("reading captions and knowledge"):
        provenance: dict[str, Any] = {"captions": source_file(captions)}
        source = load_captions(captions, format, default_split, keep_restval)
        if source.sha256 is not None:
            provenance["captions"]["sha256"] = source.sha256
        images_root = photo_folder(images, source, out_root, captions)
        make_relative(source, images_root, captions)
        report, provenance["knowledge"] = _attach(source.images, knowledge, knowledge_provenance, images_root)
        keyed = assign_keys(source.images)
        chosen = choose_splits(source.images, splits)
        excluded: dict[str, int] = {}
        if exclude_images is not None:
            relative = RelativeNames(images_root)
            names = {relative.find(name) or name for name in load_image_list(exclude_images)}
            exclude_split = normal_split(exclude_split, "--exclude_split", {image.split for image in source.images})
            before = len(keyed)
            keyed = exclude(keyed, names, exclude_split, exclude_images)
            excluded = {exclude_split: before - len(keyed)} if exclude_split in chosen else {}
            provenance["exclude_images"] = {
                **source_file(exclude_images),
                "split": exclude_split,
                "names": len(names),
                "images": before - len(keyed),
            }
    wanted = [image for image in source.images if image.split in chosen]
    cut = cut_note(wanted, report)
    for note in (*source.notes, *split_notes(captions, source.images), *([cut] if cut else [])):
        console.print(note, soft_wrap=True)
    # Without --splits, this includes entries of splits in which no image is left.
    skipped = [skip for skip in source.skipped if splits is None or skip.split in chosen]
    check_skipped(skipped, wanted, max_skipped, captions)

    members = {split: in_stored_order(keyed, seed, split) for split in chosen}
    if source.photos is not None:
        members = {split: chosen_members[:limit] for split, chosen_members in members.items()}
        write_photos(source, [image for each in members.values() for _, image in each], images_root, console)
    with console.progress("looking for the image files"):
        plans: dict[str, list[ShardPlan]] = {}
        lost_files: list[Skip] = []
        for split in chosen:
            samples, missing = find_samples(images_root, members[split], limit)
            lost_files += missing
            plans[split] = plan_split(out_root, images_root, split, samples, samples_per_shard, resizing, check)
    every_plan = [plan for split_plans in plans.values() for plan in split_plans]
    planned = [image for plan in every_plan for _, image in plan.samples]
    check_skipped(lost_files, planned, max_skipped, str(images_root))
    _check_none_empty(plans, lost_files, excluded, captions)

    mine = every_plan[index::parts]
    with lock_folder(out_root, shared=part is not None):
        _write_missing(out_root, every_plan, mine, workers, console, whole=part is None)
        unreadable = [skip for plan in mine for skip in plan.unreadable()]
        lost_files += unreadable
        gone = {skip.file for skip in unreadable}
        kept = [image for image in planned if image.path not in gone]
        if part is not None:
            # The limit is a fraction of the images of all parts; a part must not fail where the whole would pass.
            check_skipped(lost_files, kept, max_skipped, f"{images_root} (part {part})")
            done = sum(not plan.must_be_written() for plan in mine)
            console.print(
                f"part {part}: {done} of its {len(mine)} shards are complete, {len(unreadable)} images are unreadable; "
                "run the same command without --part to write missing shards and the manifest"
            )
            return None
        infos, without_knowledge = _collect(plans, str(images_root))
        check_skipped(lost_files, kept, max_skipped, str(images_root))
        manifest = ShardManifest(
            root=out_root,
            splits=infos,
            captions_without_knowledge=without_knowledge,
            skipped=by_kind(skipped + lost_files),
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


def _attach(
    images: list[CaptionedImage], knowledge: str | None, knowledge_provenance: str | None, images_root: Path
) -> tuple[KnowledgeReport | None, dict[str, Any] | None]:
    """Attaches knowledge to the captions; returns the counts and the manifest's entry about it."""
    if knowledge is None:
        if knowledge_provenance is not None:
            raise AmpError("knowledge_provenance is given without knowledge; give both or neither")
        return None, None
    file, provenance = knowledge_files(knowledge, knowledge_provenance)
    report = attach_knowledge(images, file, images_root)
    return report, {
        **source_file(file),
        "records": report.records,
        "captions_with_knowledge": report.attached,
        "records_without_caption": report.unused,
        "provenance": load_provenance(provenance),
    }


def _check_none_empty(
    plans: dict[str, list[ShardPlan]], lost_files: list[Skip], excluded: dict[str, int], captions: str
) -> None:
    for split, split_plans in plans.items():
        if not split_plans:
            lost = [skip for skip in lost_files if skip.split == split]
            first = f"; {len(lost):,} can't be used, first: {lost[0].file}: {lost[0].reason}" if lost else ""
            raise AmpError(
                f"{captions}: no image is left in split {split!r} (excluded: {excluded.get(split, 0)}){first}; "
                "expected at least one; leave the split out with --splits, or check --images and --exclude_images"
            )


def _write_missing(
    out: Path, plans: list[ShardPlan], mine: list[ShardPlan], workers: int | None, console: PlainConsole, whole: bool
) -> None:
    """Writes the shards of `mine` that don't exist as planned; `whole` means that `mine` is all of `plans`."""
    surplus = surplus_shards(out, plans)
    to_write = [plan for plan in mine if plan.must_be_written()]
    others = sum(plan.path.exists() for plan in to_write) + (len(surplus) if whole else 0)
    if others:
        console.print(
            f"{out}: existing shards to be replaced, because they differ from what these options give: {others}"
        )
    if to_write or surplus:
        # The old manifest describes files that are about to change.
        (out / MANIFEST_NAME).unlink(missing_ok=True)
    if whole:
        clear_stale(out, surplus)
    done = len(mine) - len(to_write)
    if done:
        console.print(f"keeping {done} of {len(mine)} shards that are already complete")
    write_all(to_write, workers, console, accept_gaps=whole)


def _collect(plans: dict[str, list[ShardPlan]], images: str) -> tuple[dict[str, list[ShardInfo]], dict[str, int]]:
    """The shards of each split, and its number of captions without knowledge, from the sidecars."""
    infos: dict[str, list[ShardInfo]] = {split: [] for split in plans}
    without_knowledge = dict.fromkeys(plans, 0)
    for split, split_plans in plans.items():
        for plan in split_plans:
            sidecar = plan.finished()
            if sidecar is None:
                raise AmpError(f"{plan.path}: changed while the shards were being written; run the same command again")
            without_knowledge[split] += sidecar["captions_without_knowledge"]
            if sidecar["samples"]:
                counts = {key: sidecar[key] for key in ("samples", "captions", "bytes", "sha256")}
                index = SideFile(**sidecar["index"]) if "index" in sidecar else None
                infos[split].append(ShardInfo(path=plan.path, **counts, index=index))
        if not infos[split]:
            raise AmpError(f"{images}: no image of split {split!r} can be read; expected at least one")
    return infos, without_knowledge
