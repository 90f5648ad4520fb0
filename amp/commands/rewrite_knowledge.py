"""Replaces the knowledge in existing shards. Images, keys and order stay the same.

In place, or in a copy with --out::

    amp generate_knowledge --captions data/coco --out knowledge/qwen --engine ...
    amp rewrite_knowledge --shards data/coco --knowledge knowledge/qwen/knowledge.jsonl \
        --knowledge_provenance knowledge/qwen/knowledge_provenance.json [--out data/coco-qwen]

Run the same command again to finish an interrupted run. manifest.json keeps the record of the earlier knowledge.
"""

from __future__ import annotations

import sys

from amp.data.conversion.rewrite import rewrite_knowledge
from amp.errors import exit_on_error


def parser():
    from amp.command_line import CommandLine

    parser = CommandLine(description=__doc__.partition("\n")[0])
    parser.add_function_arguments(rewrite_knowledge, skip={"command", "console"})
    return parser


@exit_on_error("run the same command again to continue")
def main(arguments: list[str] | None = None) -> None:
    from rich.table import Table

    from amp.terminal import PlainConsole

    options = parser().parse_args(arguments)
    console = PlainConsole(stderr=True)
    command = ["rewrite_knowledge.py", *(sys.argv[1:] if arguments is None else arguments)]
    manifest = rewrite_knowledge(**options.as_dict(), command=command, console=console)
    table = Table("split", "shards", "captions", "without knowledge")
    for column in table.columns[1:]:
        column.justify = "right"
    for split, shards in manifest.splits.items():
        without = manifest.captions_without_knowledge[split]
        table.add_row(split, f"{len(shards):,}", f"{manifest.captions(split):,}", f"{without:,}")
    output = PlainConsole(soft_wrap=True)
    output.print(table)
    output.print(f"{manifest.root / 'manifest.json'} written")


if __name__ == "__main__":
    main()
