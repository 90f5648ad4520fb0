"""Runs the rows of ablation tables over several seeds and writes mean, standard error and the paper's figures.

    amp sweep --config launchers/sweeps/flickr8k.yaml --dry_run true       (list the missing runs)
    amp sweep --config launchers/sweeps/flickr8k.yaml --seeds 0 --rows control
    amp sweep --config ... --shard 3/8         (the fourth of eight jobs of an array)
    amp sweep --config ... --report_only true  (only write the tables of the results so far)

All rows are checked before the first is trained. Finished runs are not repeated, a failed run does not stop the others,
and several processes can share a sweep. Writes RESULTS.csv, RESULTS.md and RESULTS.png after each run. The exit status
is 1 if a run failed or a result can't be used.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from amp.command_line import CommandLine
from amp.errors import AmpError, Problems, exit_on_error
from amp.sweep.config import SweepConfig

if TYPE_CHECKING:
    from amp.sweep.runs import Run


def parser() -> CommandLine:
    parser = CommandLine(
        usage="%(prog)s [--config FILE] [--KEY VALUE ...]",
        description=__doc__.split("\n")[0],
    )
    parser.add_argument("--config", action="config", help="YAML file of launchers/sweeps; options take precedence")
    parser.add_class_arguments(SweepConfig, as_group=False)
    return parser


@exit_on_error("finished runs are kept; run the same command again to continue")
def main(arguments: list[str] | None = None) -> None:
    options = parser()
    parsed = options.parse_args(arguments)
    settings = options.instantiate(parsed)
    names = ", ".join(str(path) for path in settings.pop("config") or ())
    if status := run_sweep(SweepConfig(**settings), f"amp sweep --config {names}"):
        raise SystemExit(status)


def run_sweep(config: SweepConfig, command: str) -> int:
    """Runs the missing runs and writes the tables after each run. Returns the exit status."""
    config.check()
    from amp.sweep.runs import execute, plan
    from amp.terminal import Terminal

    terminal = Terminal(True)
    runs = plan(config)
    wanted = list(
        dict.fromkeys(run for name, of_row in runs.items() if name in (config.rows or runs) for run in of_row)
    )
    missing = [run for run in wanted if not run.done]
    index, count = config.part()
    mine = missing[index::count]
    terminal.say(f"{len(wanted)} runs, {len(wanted) - len(missing)} done, {len(mine)} to do here")
    if not config.report_only:
        check_runs(config, mine)
    if config.dry_run:
        for run in mine:
            terminal.say(f"{run.row}, seed {run.seed}: {run.folder}")
        return 0
    states = {}
    with terminal.progress("sweep", "runs") as report:
        report(0, len(mine))
        for number, run in enumerate([] if config.report_only else mine):
            states[run] = execute(config, run, terminal.say)
            terminal.say(f"{run.row}, seed {run.seed}: {states[run]}")
            report(number + 1, len(mine))
            write_tables(config, runs, command)
    written, left_out = write_tables(config, runs, command)
    terminal.say(
        f"{config.results}.csv, .md and .png written" if written else "no run has a result yet, so no table is written"
    )
    for reason in left_out:
        terminal.say(f"left out: {reason}")
    failed = [run for run, state in states.items() if state == "failed"]
    for run in failed:
        terminal.say(f"failed: {run.row}, seed {run.seed}; see {run.folder}/*.log, then run the sweep again")
    return 1 if failed or left_out else 0


def check_runs(config: SweepConfig, runs: "list[Run]") -> None:
    """Raises one `AmpError` that names every row with wrong settings, before any row is trained."""
    if not runs:
        return
    from jsonargparse import ArgumentError

    from amp.commands import evaluate, train
    from amp.commands.measuring import read_command_line
    from amp.data.split import ShardSplit
    from amp.evaluate.probes import check_probes
    from amp.evaluate.settings import EvaluationSettings
    from amp.files import check_writable
    from amp.train.config import TrainConfig

    problems = Problems()
    for run in {run.row: run for run in runs}.values():  # one run per row, since a seed can't be wrong
        with problems.collect():
            try:
                options = train.parser()
                options.exit_on_error = False
                settings = options.instantiate(options.parse_args([*run.arguments, "--out", str(run.folder)]))
                training = TrainConfig(**{key: settings[key] for key in TrainConfig.__dataclass_fields__})
                training.check()
                options = evaluate.parser()
                options.exit_on_error = False
                found = read_command_line(options, list(run.evaluation), EvaluationSettings)
                check_probes(found.probes)
                for split in (training.data.train_split, config.split):
                    ShardSplit(training.data.shards, split)
            except (AmpError, ArgumentError) as error:
                raise AmpError(f"row {run.row!r}: {' '.join(str(error).split())}") from error
    with problems.collect():
        check_writable(*(Path(config.results).with_suffix(suffix) for suffix in (".csv", ".md", ".png")))
    if shutil.which(config.launcher[0]) is None:
        problems.found.append(
            f"launcher is {config.launcher}, expected a command that starts training; "
            f"{config.launcher[0]!r} is not installed"
        )
    problems.check()


def write_tables(config: SweepConfig, runs: "dict[str, list[Run]]", command: str) -> tuple[bool, list[str]]:
    """Writes tables and plot of the results so far. Returns whether there are any, and why some are left out."""
    from amp.files import write_atomically
    from amp.sweep.plot import draw
    from amp.sweep.summary import collect, to_csv, to_markdown

    lines, base, left_out = collect(config, runs)
    if not base.values:
        return False, left_out
    results = Path(config.results)
    write_atomically(results.with_suffix(".csv"), to_csv(lines, base, config.control).encode())
    write_atomically(results.with_suffix(".md"), to_markdown(config, lines, base, command, left_out).encode())
    if picture := draw(config, lines, base):
        write_atomically(results.with_suffix(".png"), picture)
    return True, left_out


if __name__ == "__main__":
    main()
