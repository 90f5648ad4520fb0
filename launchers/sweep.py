"""Runs the rows of ablation tables over several seeds and writes mean, standard error and the paper's figures.

    python launchers/sweep.py --config launchers/sweeps/flickr8k.yaml --dry_run true       what is missing
    python launchers/sweep.py --config launchers/sweeps/flickr8k.yaml --seeds '[0]' --rows '[control]'
    python launchers/sweep.py --config ... --shard 3/8         the fourth of eight jobs of an array
    python launchers/sweep.py --config ... --report_only true  tables of what is there

What is done isn't run again, a run that fails leaves the others alone, and several processes can share a sweep. Writes
RESULTS.csv, RESULTS.md and RESULTS.png. Ends with status 1 where a run failed.
"""

import sys
from pathlib import Path

from amp.command import CommandLine
from amp.errors import exit_on_error
from amp.sweep.config import SweepConfig


def parser() -> CommandLine:
    parser = CommandLine(
        usage="%(prog)s [--config FILE] [--KEY VALUE ...]",
        description=__doc__.split("\n")[0],
    )
    parser.add_argument("--config", action="config", help="YAML file of launchers/sweeps; the command line wins")
    parser.add_class_arguments(SweepConfig, as_group=False)
    return parser


@exit_on_error("finished runs are kept, and the same command goes on from there")
def main(arguments: list[str] | None = None) -> int:
    options = parser()
    parsed = options.parse_args(arguments)
    settings = options.instantiate(parsed)
    names = ", ".join(str(path) for path in settings.pop("config") or ())
    config = SweepConfig(**settings)
    config.check()
    from amp.retrieval.results import write_atomically
    from amp.sweep.plot import draw
    from amp.sweep.runs import execute, plan
    from amp.sweep.summary import collect, to_csv, to_markdown
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
    lines, base = collect(config, runs)
    if not base.values:
        terminal.say("no run has a result yet, so no table is written")
    else:
        results = Path(config.results)
        command = f"python launchers/sweep.py --config {names}"
        write_atomically(results.with_suffix(".csv"), to_csv(lines, base, config.control).encode())
        write_atomically(results.with_suffix(".md"), to_markdown(config, lines, base, command).encode())
        if picture := draw(config, lines, base):
            write_atomically(results.with_suffix(".png"), picture)
        terminal.say(f"{results}.csv, .md and .png written")
    failed = [run for run, state in states.items() if state == "failed"]
    for run in failed:
        terminal.say(f"failed: {run.row}, seed {run.seed}; see {run.folder}/*.log, then start the sweep again")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
