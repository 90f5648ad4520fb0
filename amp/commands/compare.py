"""Compares two rows of evaluations on the same queries: differences with intervals, and queries gained and lost.

    amp compare --a runs/mine/results.json --a_row control --b_row "ours (pairwise)"
    amp compare --a runs/one/results.json --a_row ours --b runs/two/results.json --b_row ours

The paired bootstrap resamples the same images for both rows, so queries that both find or both miss add no noise. Reads
the .npz file next to each JSON file. Give a row's name as printed in the table, or its method if it has only one row.
"""

from dataclasses import dataclass

from amp.command_line import CommandLine, check_given
from amp.errors import exit_on_error


@dataclass
class CompareSettings:
    """Settings of a comparison. Differences are row b minus row a.

    Args:
        a: Result file of amp evaluate with row a.
        a_row: Name of row a, the reference, such as "control" or "ours (pairwise)".
        b_row: Name of row b, which is compared with row a.
        b: Result file with row b; null takes the file `a`.
        out: JSON file of the comparison; null writes none.
        bootstrap: Number of bootstrap samples of the images.
        seed: Random seed of the bootstrap samples.
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
