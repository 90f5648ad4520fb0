"""Converts a captions file and a folder of photos into shards: writes missing shards, then the manifest."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from amp.data.captions.base import DATASET_PREFIX, Skip
from amp.data.captions.knowledge_file import cut_note
from amp.data.captions.load import load_captions
from amp.data.captions.splits import normal_split
from amp.data.conversion.absolute_paths import make_relative
from amp.data.conversion.knowledge import attach
from amp.data.conversion.photos import photo_folder, write_photos
from amp.data.conversion.plan import ShardPlan, assign_keys, in_stored_order, plan_split
from amp.data.conversion.run import Conversion
from amp.data.conversion.selection import choose_splits, exclude, find_samples, load_image_list, split_notes
from amp.data.conversion.skipped import check_skipped
from amp.data.conversion.sources import source_file
from amp.data.conversion.tars import check_numbers, convert_tars
from amp.data.foreign.names import names_tars
from amp.data.images.file import Check, Resize
from amp.data.images.names import RelativeNames
from amp.data.shards.manifest import ShardManifest
from amp.errors import AmpError
from amp.terminal import PlainConsole


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
    split: str | None = None,
    caption_keys: list[str] | None = None,
    max_skipped: float = 0.01,
    workers: int | None = None,
    seed: int = 0,
    part: str | None = None,
    command: list[str] | None = None,
    console: PlainConsole | None = None,
) -> ShardManifest | None:
    """Converts a captions file and a folder of photos, or tar files of another tool, into shards.

    Args:
        captions: Captions file: a Karpathy JSON, COCO's annotations, a JSON list, or a CSV, JSONL, token or Parquet
            file. It may be compressed with gzip. Or datasets:NAME or datasets:NAME:CONFIG, where NAME is a folder or a
            dataset of the Hugging Face hub. Or WebDataset tar files of img2dataset, CLIP_benchmark, open_clip or FLAIR:
            a tar file, a folder of them, a pattern such as 'FOLDER/{00000..00009}.tar', or a glob.
        images: Folder that the paths of the image files are relative to. Absolute paths must lead into it. Photos that
            the captions file contains are written to it. None for captions with their photos: uses the dataset's
            folder, or OUT/photos. Not used with tar files.
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
        split: Split of all samples of tar files, train by default. Run the command once for each split. Not used with a
            captions file.
        caption_keys: Keys of the .json in tar files that hold captions, a string or a list of strings. Default: the
            .txt if there is one, otherwise the key caption, captions, text, texts or raw_caption.
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
    captions, out_root = str(captions), Path(out)
    for name, value in (("samples_per_shard", samples_per_shard), ("limit", limit)):
        if value is not None and value < 1:
            raise AmpError(f"{name} is {value}; expected 1 or more")
    check_numbers(max_skipped, workers, part)
    resizing = Resize(resize, resize_mode, resize_quality) if resize is not None else None
    if names_tars(captions):
        given = {
            "images": images is not None,
            "format": format != "auto",
            "default_split": default_split != "train",
            "splits": splits is not None,
            "limit": limit is not None,
            "exclude_images": exclude_images is not None,
        }
        _refuse(given, f"{captions}: tar files", "all samples of tar files are taken, in their order, into --split")
        return convert_tars(
            captions,
            out,
            knowledge=knowledge,
            knowledge_provenance=knowledge_provenance,
            caption_keys=caption_keys,
            split=split or "train",
            resize=resizing,
            check=check,
            max_skipped=max_skipped,
            workers=workers,
            part=part,
            command=command,
            console=console,
        )
    given = {"split": split is not None, "caption_keys": caption_keys is not None}
    if Path(captions).exists() or captions.startswith(DATASET_PREFIX):
        _refuse(given, f"{captions}: a captions file", "this option is for tar files")
    if images is not None and not Path(images).is_dir():
        raise AmpError(f"{images}: no such folder; expected the folder of image files; check --images")

    with console.progress("reading captions and knowledge"):
        provenance: dict[str, Any] = {"captions": source_file(captions)}
        source = load_captions(captions, format, default_split, keep_restval)
        if source.sha256 is not None:
            provenance["captions"]["sha256"] = source.sha256
        images_root = photo_folder(images, source, out_root, captions)
        make_relative(source, images_root, captions)
        report, provenance["knowledge"] = attach(source.images, knowledge, knowledge_provenance, images_root)
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
    planned = [image for split_plans in plans.values() for plan in split_plans for _, image in plan.samples]
    check_skipped(lost_files, planned, max_skipped, str(images_root))
    _check_none_empty(plans, lost_files, excluded, captions)
    provenance |= {"resize": asdict(resizing) if resizing else None, "check": check, "seed": seed, "limit": limit}
    conversion = Conversion(
        out=out_root,
        plans=plans,
        source=str(images_root),
        max_skipped=max_skipped,
        lost=lost_files,
        skipped=skipped,
        excluded=excluded,
        provenance=provenance,
    )
    return conversion.run(part, workers, command, console)


def _refuse(given: dict[str, bool], what: str, why: str) -> None:
    for name in (name for name, is_given in given.items() if is_given):
        raise AmpError(f"{what}, but --{name} is given; expected none, because {why}; remove --{name}")


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
