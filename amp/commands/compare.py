"""Compares two rows of evaluations on the same queries: differences with intervals, and what one mends or breaks.

    amp compare --a runs/mine/results.json --a_row control --b_row "ours (pairwise)"
    amp compare --a runs/one/results.json --a_row ours --b runs/two/results.json --b_row ours

Both are resampled with the same images (paired bootstrap), so queries that both find or both miss add no noise. Reads
the .npz file next to each JSON file. A row is named as the table prints it, or by its method if that has one row only.
"""

from dataclasses import dataclass

from amp.command_line import CommandLine, check_given
from amp.errors import exit_on_error


@dataclass
class CompareSettings:
    """Two rows.

    Args:
        a: Result file of amp evaluate.
        a_row: Its row that the differences start from, such as "control" or "ours (pairwise)".
        b_row: The row that is compared with it.
        b: Result file of that row; null takes `a`.
        out: JSON file of the comparison; null writes none.
        bootstrap: Samples of the images.
        seed: Of the samples.
    """

    a: str = ""
    a_row: str = "base CLIP"
    b_row: str = ""
    b: str | None = None
    out: str | None = None
    bootstrap: int = 10_000
    seed: int = 0


def parser() -> CommandLine:
    parser = CommandLine(usage="%(prog)s --a FILE --a_row ROW --b_row ROW", description=__doc__.split("\n")[0])
    parser.add_class_arguments(CompareSettings, as_group=False)
    return parser


@exit_on_error()
def main(arguments: list[str] | None = None) -> None:
    settings = CompareSettings(**vars(parser().parse_args(arguments)))
    check_given(settings, "a")
    from amp.evaluate.compare import compare
    from amp.files import check_writable
    from amp.terminal import PlainConsole, Terminal

    if settings.out is not None:
        check_writable(settings.out)
    with Terminal(True).progress(f"comparing {settings.b_row} with {settings.a_row}"):
        comparison = compare(
            settings.a, settings.a_row, settings.b or settings.a, settings.b_row, settings.bootstrap, settings.seed
        )
    if settings.out is not None:
        comparison.save_json(settings.out)
    comparison.print_table(PlainConsole())


if __name__ == "__main__":
    main()
