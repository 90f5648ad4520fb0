"""Runs the rows of ablation tables over several seeds and writes mean, standard error and the paper's figures.

    python launchers/sweep.py --sweep launchers/sweeps/flickr8k.yaml --dry_run true       what is missing
    python launchers/sweep.py --sweep launchers/sweeps/flickr8k.yaml --seeds '[0]' --rows '[control]'
    python launchers/sweep.py --sweep ... --shard 3/8          the fourth of eight jobs of an array
    python launchers/sweep.py --sweep ... --report_only true   tables of what is there

What is done isn't run again, a run that fails leaves the others alone, and several processes can share a sweep. Writes
RESULTS.csv, RESULTS.md and RESULTS.png. Ends with status 1 where a run failed.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from amp.errors import exit_on_error
from amp.sweep.config import SweepConfig

# They say how a sweep is gone through, not what its results are.
PASSING = ("--dry_run", "--report_only", "--rerun_changed", "--rows", "--shard")


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="launchers/sweep.py",
        usage="launchers/sweep.py [--sweep FILE] [--KEY VALUE ...]",  # the keys would bury an error's line
        description=__doc__.split("\n")[0],
    )
    parser.add_argument(
        "--sweep", "--config", action="config", help="YAML file of launchers/sweeps; the command line wins"
    )
    parser.add_class_arguments(SweepConfig, as_group=False)
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser()
    settings = options.instantiate(options.parse_args(arguments))
    del settings["sweep"]
    with exit_on_error():
        config = SweepConfig(**settings)
        config.check()
        # After the checks, which need none of their imports.
        from amp.sweep.plan import plan, refuse_changed
        from amp.sweep.progress import SweepProgress
        from amp.sweep.run import check_launcher, execute
        from amp.terminal import Terminal

        terminal = Terminal(True)
        runs = plan(config)
        chosen = [run for name, of_row in runs.items() if not config.rows or name in config.rows for run in of_row]
        index, count = config.part()
        # Of all runs, not of the missing ones: jobs of an array start at different times and must split alike.
        mine = list(dict.fromkeys(chosen))[index::count]
        if config.dry_run:
            for run in mine:
                terminal.console.print(f"{run.name}: {run.state()}, {run.folder}", highlight=False, soft_wrap=True)
            return 0
        ended = {}
        if not config.report_only:
            if not config.rerun_changed:
                refuse_changed(mine)
            todo = [run for run in mine if run.state() != "done"]
            terminal.say(f"{len(mine)} runs, {len(mine) - len(todo)} of them done")
            if todo:
                check_launcher(config)
            with SweepProgress(terminal.console, len(todo)) as progress:
                for run in todo:
                    ended[run] = progress.follow(
                        run, lambda say, run=run: execute(config, run, Path(__file__).parent, say)
                    )
        report(config, runs, command(sys.argv[1:] if arguments is None else arguments), terminal)
    failed = [run.name for run, state in ended.items() if state.startswith("failed")]
    elsewhere = sum(state.startswith("running elsewhere") for state in ended.values())
    if elsewhere:
        terminal.say(f"{elsewhere} running elsewhere; --report_only true shows them once they have ended")
    if failed:
        terminal.say(f"{len(failed)} failed: {'; '.join(failed)}. Start the sweep again to try them again")
    return 1 if failed else 0


def report(config: SweepConfig, runs: dict, command: str, terminal) -> None:
    """Writes the results of what is there."""
    from amp.retrieval.results import write_atomically
    from amp.sweep.plot import draw
    from amp.sweep.summary import collect
    from amp.sweep.table import to_csv, to_markdown

    summary = collect(config, runs)
    for run in summary.left_out:
        terminal.say(f"left out: {run.name}, since {run.folder} holds another configuration")
    path = config.results_path
    picture = draw(config, summary)
    if picture is None:  # tables that were made elsewhere are not replaced by empty ones
        terminal.say(f"no run has a result yet: {path}.csv, .md and .png are not written")
        return
    contents = {
        "csv": to_csv(config, summary).encode(),
        "md": to_markdown(config, summary, command).encode(),
        "png": picture,
    }
    for ending, content in contents.items():
        write_atomically(path.with_name(f"{path.name}.{ending}"), content)
    terminal.say(f"{path}.csv, .md and .png written")


def command(arguments: Sequence[str]) -> str:
    """The command that makes the results: what was typed, less what only says how far this call goes."""
    kept, words = [], iter(arguments)
    for word in words:
        if word.partition("=")[0] not in PASSING:
            kept.append(word)
        elif "=" not in word:
            next(words, None)  # its value
    return shlex.join(["python", "launchers/sweep.py", *kept])


if __name__ == "__main__":
    sys.exit(main())
