"""Converts a captions file, a folder of photos and their action knowledge to shards for training and evaluation.

COCO (images/ contains train2014/ and val2014/) and Flickr30K, with the Karpathy splits::

    amp make_shards --captions dataset_coco.json --images coco/images --knowledge knowledge.jsonl \
        --out data/coco
    amp make_shards --captions dataset_flickr30k.json --images flickr30k/images --out data/flickr30k

Your own photos: a CSV with the header `image,caption,split` (or JSONL with these keys), one row per caption::

    amp make_shards --captions captions.csv --images photos --out data/mine

WebDataset tar files of img2dataset, CLIP_benchmark, open_clip or FLAIR, one call per split (to use them without a copy,
see amp index_shards)::

    amp make_shards --captions 'cc3m/{00000..00331}.tar' --out data/cc3m [--caption_keys raw_caption longIB_captions]

A dataset of the Hugging Face hub, or a folder that its package `datasets` opens::

    amp make_shards --captions datasets:NAME --out data/mine

Smaller images for a slow disk, few images for a quick try, a subset of the splits::

    amp make_shards ... --resize 336 --limit 500 --splits train val

After an interruption, or a change of captions, knowledge or photos, run the same command again: it does only what is
missing. The manifest is written last, so a folder without `manifest.json` isn't finished.

On several machines with a shared file system, run one part on each (`--part 0/2`, `--part 1/2`), then the command
without `--part` (on Slurm: launchers/slurm/make_shards.sbatch)::

    amp make_shards ... --part 0/2
"""

from __future__ import annotations

import sys

from amp.data.conversion.make import make_shards
from amp.data.shards.manifest import ShardManifest
from amp.errors import exit_on_error


def parser():
    from amp.command_line import CommandLine  # not at the top: worker processes import this module too

    parser = CommandLine(
        usage="%(prog)s --captions FILE|TARS [--images FOLDER] --out FOLDER [options]",
        description=__doc__.partition("\n")[0],
    )
    parser.add_function_arguments(make_shards, skip={"images", "splits", "command", "console"})
    parser.add_argument(
        "--images",
        type=str,
        help="folder that the paths of the image files are relative to; not needed if the captions file or dataset "
        "contains its photos (they are written to this folder; OUT/photos by default)",
    )
    parser.add_argument("--splits", nargs="+", type=str, help="splits to convert; all by default")
    parser.add_argument("--config", action="config", help="YAML file with these options")
    return parser


@exit_on_error("finished shards are kept; run the same command again to continue")
def main(arguments: list[str] | None = None) -> None:
    from amp.terminal import PlainConsole

    options = parser().parse_args(arguments)
    options.pop("config")
    console = PlainConsole(stderr=True)
    command = ["make_shards.py", *(sys.argv[1:] if arguments is None else arguments)]
    manifest = make_shards(**options.as_dict(), command=command, console=console)
    if manifest is not None:
        show_shards(manifest)


def show_shards(manifest: ShardManifest) -> None:
    """Prints what the manifest of finished shards lists."""
    # Not at the top: worker processes import this module too.
    from rich.table import Table

    from amp.terminal import PlainConsole

    table = Table("split", "images", "captions", "without knowledge", "shards", "MB")
    for column in table.columns[1:]:
        column.justify = "right"
    for split, shards in manifest.splits.items():
        table.add_row(
            split,
            f"{manifest.samples(split):,}",
            f"{manifest.captions(split):,}",
            f"{manifest.captions_without_knowledge[split]:,}",
            f"{len(shards):,}",
            f"{sum(shard.bytes for shard in shards) / 1e6:,.1f}",
        )
    output = PlainConsole()
    output.print(table)
    for split, count in manifest.excluded.items():
        output.print(f"{count:,} images of split {split} excluded on request")
    for kind, entries in manifest.skipped.items():
        if entries:
            output.print(f"{len(entries):,} skipped: {kind} (listed in manifest.json), first: {entries[0]['reason']}")
    output.print(f"{manifest.root / 'manifest.json'} written")


if __name__ == "__main__":
    main()
