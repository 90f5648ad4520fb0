"""Writes one HTML page about an evaluation: tables, plots, verbs, and a gallery with attention maps.

    amp report --config runs/mine/action-aware/config.yaml --results runs/mine/results.json \
        --adapters '["action-aware=runs/mine/action-aware/stage2/adapter.safetensors"]' --out runs/mine/report.html

The page needs no network and no other file. --results names the JSON file of amp evaluate, whose .npz file
stands beside it; the photos come from the shards of the configuration. Of the adapters the last one's attention is
shown, and the TensorBoard files of their runs give the training curves.
"""

from dataclasses import dataclass, field
from pathlib import Path

from amp.command_line import CommandLine, check_given
from amp.errors import AmpError, Problems, exit_on_error
from amp.train.command import command_line, read_command_line
from amp.train.config import TrainConfig


@dataclass
class ReportSettings:
    """What the page shows.

    Args:
        results: JSON file of amp evaluate.
        row: Its row that is compared with base CLIP; null takes the last one that is no probe.
        adapters: ``NAME=FILE`` each, as in the evaluation; none shows neither attention nor training.
        sweep: CSV file of launchers/sweep.py, for the ablation plot; null shows none.
        captions: Caption queries in the gallery.
        images: Image queries in the gallery.
        title: Of the page; null names data and model.
        out: HTML file.
    """

    results: str = ""
    row: str | None = None
    adapters: list[str] = field(default_factory=list)
    sweep: str | None = None
    captions: int = 80
    images: int = 30
    title: str | None = None
    out: str = "runs/report.html"


def parser() -> CommandLine:
    return command_line(__doc__, ReportSettings)


@exit_on_error()
def main(arguments: list[str] | None = None) -> None:
    run(*read_command_line(parser(), arguments, ReportSettings))


def run(settings: ReportSettings, config: TrainConfig) -> None:
    """Collects what the page shows and writes it."""
    from amp.data.split import ShardSplit
    from amp.data.split_captions import SplitCaptions
    from amp.device import usable_device
    from amp.evaluate.adapters import adapted, named_adapters
    from amp.evaluate.per_query import load_queries
    from amp.evaluate.protocol import captions_hash
    from amp.evaluate.results import ResultFile
    from amp.files import check_writable
    from amp.model.factory import create_model_and_transforms
    from amp.report.page import ReportInput, write_report
    from amp.report.plots import results_plot, sweep_plot, training_plot
    from amp.terminal import Terminal

    check_given(settings, "results")
    terminal, problems = Terminal(True), Problems()
    named: dict[str, str] = {}
    plots: dict[str, str | None] = {}
    with problems.collect():
        named = named_adapters(settings.adapters)
    with problems.collect():
        result = ResultFile.load_json(settings.results)
        queries = load_queries(Path(settings.results).with_suffix(".npz"))
        row = settings.row or next((r.name for r in reversed(result.rows) if not _is_probe(r.name)), "base CLIP")
        if (row, "t2i") not in queries:
            names = ", ".join(repr(r.name) for r in result.rows)
            raise AmpError(f"{settings.results}: no row {row!r}, expected one of {names}")
        lacking = [
            key for key in ("split", "captions_per_image", "captions_sha256", "dataset") if key not in result.protocol
        ]
        if lacking:
            raise AmpError(
                f"{settings.results}: protocol key {lacking[0]!r} is missing; write it again with amp evaluate"
            )
        for adapter in named.values():
            result.check_adapter(adapter, where=settings.results)
        split = ShardSplit(config.data.shards, result.protocol["split"])
        per_image = result.protocol["captions_per_image"]
        with terminal.progress("reading captions"):
            captions = SplitCaptions.read(split, config.data.kinds, 0 if per_image == "all" else per_image)
        if captions_hash(captions) != result.protocol["captions_sha256"]:
            raise AmpError(
                f"{config.data.shards}: other captions than {settings.results} was made from, expected the "
                "same shards; give them with --data.shards"
            )
        plots["Rows with 95 % intervals (bootstrap over images)"] = results_plot(result)
    with problems.collect():
        if settings.sweep is not None:
            plots["Ablations, mean and standard error over seeds"] = sweep_plot(settings.sweep)
    with problems.collect():
        if min(settings.captions, settings.images) < 0:
            raise AmpError(f"captions is {settings.captions}, images {settings.images}, expected at least 0 each")
    with problems.collect():
        check_writable(settings.out)
    problems.check()
    with terminal.progress(f"loading {config.model.name}"):
        base, _, preprocess = create_model_and_transforms(
            config.model.name,
            config.model.pretrained,
            precision=config.model.precision,
            device=usable_device(),
            prompt_config=config.prompt,
            image_resize_mode=config.model.resize_mode,
        )
    model = adapted(base, config.model.name, list(named.values())[-1]).eval() if named else None
    plots["Training"] = training_plot({name: Path(path).resolve().parent.parent for name, path in named.items()})
    title = settings.title or f"{result.protocol['dataset']} {split.name}, {Path(config.model.name).name}"
    given = ReportInput(
        result,
        queries,
        row,
        split,
        captions,
        model,
        preprocess,
        base.backbone.visual.preprocess_cfg,
        {name: plot for name, plot in plots.items() if plot is not None},
        title,
    )
    with terminal.progress("drawing queries", "queries") as report:
        path, left_out = write_report(settings.out, given, settings.captions, settings.images, report)
    terminal.say(f"{path} written, {path.stat().st_size / 1e6:.1f} MB")
    if left_out:
        terminal.say(f"{len(left_out):,} queries left out, first: {left_out[0]}")


def _is_probe(name: str) -> bool:
    parts = [part.split(" (")[0] for part in name.split(", ")[1:]]
    return any(part in ("shuffled", "blank", "sibling", "grey") or part.startswith("fusion ") for part in parts)


if __name__ == "__main__":
    main()
