"""Writes an HTML page about an evaluation: tables, plots, accuracy by verb, and a gallery with attention maps.

    amp report --results runs/mine/results.json --shards data/flickr8k --out runs/mine/report.html \
        --adapters ours=runs/mine/ours/stage2/adapter.safetensors

The page is a single file that needs no network. --results is the JSON file of amp evaluate, with its .npz file next to
it; base model, transform and kinds of triplets are read from it. Photos come from the shards. The attention maps are
those of the last adapter, and the training curves come from the TensorBoard files of the adapters' runs.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from amp.command_line import CommandLine, check_given
from amp.commands.measuring import command_line, read_command_line
from amp.errors import AmpError, Problems, exit_on_error
from amp.evaluate.settings import BaseSettings

if TYPE_CHECKING:
    from amp.evaluate.results import ResultFile
    from amp.retrieval.figures import RetrievalRow


@dataclass
class ReportSettings:
    """Settings of the page.

    Args:
        results: JSON file of amp evaluate.
        row: Row of the results to compare with base CLIP, such as "ours (pairwise)"; null takes the last row that is
            not a probe.
        shards: Folder of the shards that were evaluated; null takes the folder that the adapters were trained on.
        adapters: Adapters as `NAME=FILE`, named as in the evaluation. Without adapters the page shows no attention maps
            and no training curves.
        model: Base CLIP, if it has moved since the evaluation; null takes the model of the results file.
        sweep: CSV file of amp sweep for the ablation plot; null shows none.
        captions: Number of caption queries in the gallery.
        images: Number of image queries in the gallery.
        title: Title of the page; null uses the names of the dataset and the model.
        out: HTML file.
    """

    results: str = ""
    row: str | None = None
    shards: str | None = None
    adapters: list[str] = field(default_factory=list)
    model: BaseSettings = field(default_factory=BaseSettings)
    sweep: str | None = None
    captions: int = 80
    images: int = 30
    title: str | None = None
    out: str = "runs/report.html"


def parser() -> CommandLine:
    return command_line(__doc__, ReportSettings, "--results FILE --shards DIR --adapters NAME=FILE")


@exit_on_error()
def main(arguments: list[str] | None = None) -> None:
    run(read_command_line(parser(), arguments, ReportSettings))


def run(settings: ReportSettings) -> None:
    """Collects the content of the page and writes it."""
    from amp.terminal import Terminal, load_open_clip

    load_open_clip()
    from amp.data.split import ShardSplit
    from amp.data.split_captions import SplitCaptions
    from amp.device import usable_device
    from amp.evaluate.adapters import Adapter, adapted, kinds_of, load_base, read_adapters, shards_of
    from amp.evaluate.per_query import load_queries
    from amp.evaluate.protocol import captions_hash
    from amp.evaluate.results import ResultFile
    from amp.files import check_writable
    from amp.report.page import ReportInput, write_report
    from amp.report.plots import results_plot, sweep_plot, training_plot

    check_given(settings, "results")
    terminal, problems = Terminal(True), Problems()
    adapters: dict[str, Adapter] = {}
    plots: dict[str, str | None] = {}
    with problems.collect():
        adapters = read_adapters(settings.adapters)
    with problems.collect():
        result = ResultFile.load_json(settings.results)
        queries = load_queries(Path(settings.results).with_suffix(".npz"))
        lacking = [
            key
            for key in ("split", "captions_per_image", "captions_sha256", "dataset", "model")
            if key not in result.protocol
        ]
        if lacking:
            raise AmpError(f"{settings.results}: protocol key {lacking[0]!r} is missing; run amp evaluate again")
        row = result.find(settings.row, settings.results) if settings.row else last_row(result)
        for adapter in adapters.values():
            result.check_adapter(adapter.path, where=settings.results)
        split = ShardSplit(shards_of(settings.shards, adapters), result.protocol["split"])
        per_image, kinds = result.protocol["captions_per_image"], kinds_of(result.protocol.get("kinds"), adapters)
        with terminal.progress("reading captions"):
            captions = SplitCaptions.read(split, kinds, 0 if per_image == "all" else per_image)
        if captions_hash(captions) != result.protocol["captions_sha256"]:
            raise AmpError(
                f"{split.root}: its captions differ from those of {settings.results}; expected the shards that were "
                "evaluated; give them with --shards"
            )
        plots["Rows with 95 % intervals (bootstrap over images)"] = results_plot(result)
    with problems.collect():
        if settings.sweep is not None:
            plots["Ablations, mean and standard error over seeds"] = sweep_plot(settings.sweep)
    with problems.collect():
        if min(settings.captions, settings.images) < 0:
            raise AmpError(
                f"captions is {settings.captions} and images is {settings.images}, expected at least 0 for both"
            )
    with problems.collect():
        check_writable(settings.out)
    problems.check()
    model = evaluated_base(settings.model, result)
    with terminal.progress(f"loading {model.name}"):
        base, _, preprocess = load_base(model, usable_device())
    shown = adapted(base, str(model.name), list(adapters.values())[-1]) if adapters else None
    runs = {name: Path(adapter.path).resolve().parent.parent for name, adapter in adapters.items()}
    plots["Training"] = training_plot(runs)
    title = settings.title or f"{result.protocol['dataset']} {split.name}, {Path(str(model.name)).name}"
    given = ReportInput(
        result,
        queries,
        row.key,
        split,
        captions,
        shown,
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


def last_row(result: "ResultFile") -> "RetrievalRow":
    """Returns the last row that is not a probe."""
    return next(row for row in reversed(result.rows) if not row.key.probe)


def evaluated_base(given: BaseSettings, result: "ResultFile") -> BaseSettings:
    """Returns the given base model with null values replaced by those of the results file."""
    protocol = result.protocol
    resize = given.resize_mode or (None if protocol.get("resize") == "model default" else protocol.get("resize"))
    if given.name is not None:
        return replace(given, resize_mode=resize)
    return BaseSettings(protocol["model"], protocol.get("pretrained"), given.precision, resize)


if __name__ == "__main__":
    main()
