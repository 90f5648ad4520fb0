"""Renders Table 1 with the figures of the paper, of open_clip and of our own runs, and marks errors of the paper.

    amp table1 --out results/table1.md
    amp table1 --commands true         (print the commands for the empty lines)

Results that can't be used are left out and listed, and the exit status is 1.
"""

from dataclasses import dataclass

from amp.command_line import CommandLine
from amp.errors import exit_on_error


@dataclass
class TableSettings:
    """Settings of the table.

    Args:
        published: YAML file of published figures.
        results: Folder of the result files ID.coco.json and ID.flickr30k.json.
        out: Markdown file; null only prints the table.
        commands: Print the commands that produce the missing figures, instead of the table.
    """

    published: str = "results/table1_published.yaml"
    results: str = "runs/table1"
    out: str | None = None
    commands: bool = False


def parser() -> CommandLine:
    parser = CommandLine(usage="%(prog)s [--out FILE] [--commands true]", description=__doc__.split("\n")[0])
    parser.add_class_arguments(TableSettings, as_group=False)
    return parser


@exit_on_error()
def main(arguments: list[str] | None = None) -> None:
    settings = TableSettings(**vars(parser().parse_args(arguments)))
    from rich.markdown import Markdown

    from amp.evaluate.table1 import add_results, commands, load_published, render_markdown
    from amp.files import write_atomically
    from amp.terminal import PlainConsole, Terminal

    rows, sources = load_published(settings.published)
    left_out = add_results(rows, settings.results)
    for reason in left_out:
        Terminal(True).say(f"left out: {reason}")
    if settings.commands:
        print("\n".join(commands(rows, settings.results)))
        return
    text = render_markdown(rows, sources, left_out)
    if settings.out is not None:
        write_atomically(settings.out, text.encode())
    console = PlainConsole()
    console.print(Markdown(text) if console.is_terminal else text)
    if left_out:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
