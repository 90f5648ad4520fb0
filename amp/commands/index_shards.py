"""Makes WebDataset tar files of other tools usable as shards, without copying their photos.

Tar files of img2dataset, CLIP_benchmark, open_clip and FLAIR; the command is run once for each split::

    amp index_shards --shards 'cc3m/{00000..00331}.tar' --split train
    amp index_shards --shards 'cc3m/val_*.tar' --split val --knowledge knowledge.jsonl

Next to each tar file it writes its index and its records, which contain the captions and their knowledge, and in the
same folder `manifest.json`. For tar files that can't be written next to, add `--out FOLDER`. Captions in the `.json` of
each sample are chosen by their keys::

    amp index_shards --shards dreamlip --caption_keys raw_caption longIB_captions

The folder with the manifest is used like a folder of amp make_shards by amp train, evaluate, generate_knowledge and
rewrite_knowledge. Run the same command again after an interruption. On several machines, run one part on each (`--part
0/2`, `--part 1/2`), then the command without `--part`.
"""

from __future__ import annotations

import sys

from amp.commands.make_shards import show_shards
from amp.data.conversion.tars import index_shards
from amp.errors import exit_on_error


def parser():
    from amp.command_line import CommandLine  # not at the top: worker processes import this module too

    parser = CommandLine(
        usage="%(prog)s --shards TARS [--split NAME] [options]", description=__doc__.partition("\n")[0]
    )
    parser.add_function_arguments(index_shards, skip={"command", "console"})
    return parser


@exit_on_error("finished indexes are kept; run the same command again to continue")
def main(arguments: list[str] | None = None) -> None:
    # Not at the top: worker processes import this module too.
    from amp.terminal import PlainConsole

    options = parser().parse_args(arguments)
    console = PlainConsole(stderr=True)
    command = ["index_shards.py", *(sys.argv[1:] if arguments is None else arguments)]
    manifest = index_shards(**options.as_dict(), command=command, console=console)
    if manifest is not None:
        show_shards(manifest)


if __name__ == "__main__":
    main()
