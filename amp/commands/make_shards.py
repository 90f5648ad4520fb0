"""Turn a captions file, a folder of photos and their action knowledge into shards for training and evaluation.

COCO (images/ holds train2014/ and val2014/) and Flickr30K, with the Karpathy splits::

    amp make_shards --captions dataset_coco.json --images coco/images --knowledge knowledge.jsonl \
        --out data/coco
    amp make_shards --captions dataset_flickr30k.json --images flickr30k/images --out data/flickr30k

Your own photos: a CSV with the header ``image,caption,split`` (or JSONL with these keys), several rows an image::

    amp make_shards --captions captions.csv --images photos --out data/mine

Smaller files for a slow disk, a quick try, a subset of the splits::

    amp make_shards ... --resize 336 --limit 500 --splits train val

The same command again does only what is missing: after an interruption, or after the captions, the knowledge or some
photos have changed. The manifest is written last; a folder without ``manifest.json`` isn't finished.

Several machines with one file system: a part on each, ``--part 0/2`` and ``--part 1/2``, then the command without it
(on Slurm: launchers/slurm/make_shards.sbatch)::

    amp make_shards ... --part 0/2
"""

from __future__ import annotations

import sys

from amp.data.conversion.make import make_shards
from amp.errors import exit_on_error


def parser():
    from amp.command_line import CommandLine  # not above: worker processes import this file too

    parser = CommandLine(
        usage="%(prog)s --captions FILE --images FOLDER --out FOLDER [options]",
        description=__doc__.partition("\n")[0],
    )
    parser.add_function_arguments(make_shards, skip={"splits", "command", "console"})
    parser.add_argument("--splits", nargs="+", type=str, help="splits to convert; all that occur by default")
    parser.add_argument("--config", action="config", help="YAML file with these options")
    return parser


@exit_on_error("finished shards are kept, and the same command goes on from there")
def main(arguments: list[str] | None = None) -> None:
    # Imported here because the worker processes import this file too.
    from rich.table import Table

    from amp.terminal import PlainConsole

    options = parser().parse_args(arguments)
    options.pop("config")
    console = PlainConsole(stderr=True)
    command = ["make_shards.py", *(sys.argv[1:] if arguments is None else arguments)]
    manifest = make_shards(**options.as_dict(), command=command, console=console)
    if manifest is None:
        return

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
