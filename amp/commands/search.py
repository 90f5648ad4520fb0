"""Searches a folder of photos by text.

    amp search --index runs/index --adapter runs/mine/stage2/adapter.safetensors --photos ~/Pictures
    amp search --index runs/index --adapter runs/mine/stage2/adapter.safetensors --sheet found.png \\
        "a dog jumps over a hurdle"
    amp search --index runs/index --adapter runs/mine/stage2/adapter.safetensors
    amp search --index runs/index --adapter runs/mine/stage2/adapter.safetensors < queries.txt

The first command creates the index, or updates it after photos have changed. It can also take a query. The third asks
for queries until an empty line, and the fourth reads one query per line. Both load the model only once. The base model
is the one that the adapter was trained on.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from amp.command_line import CommandLine
from amp.commands.asking import on_terminal, read_queries
from amp.errors import WRONG_INPUT, AmpError, complain, exit_on_error, printable, require
from amp.generation.apart import RulesProcess


@dataclass
class SearchSettings:
    """Settings of a search.

    Args:
        index: Folder of the index.
        photos: Folder of photos to index before the search; null searches the index as it is.
        adapter: Adapter file of a run, folder of `amp publish`, or hf-hub:ORG/REPO; null searches with the base model
            only.
        model: Base model, as named by open_clip; null takes the one recorded in the adapter.
        pretrained: Weights of the base model, as named by open_clip.
        count: Number of photos to show.
        top_k: Number of photos to re-rank (paper: 20).
        fusion_weight: Weight of the base model's score, which is added to the re-ranking score.
        knowledge: Source of the query's triplets and states: an engine of amp generate_knowledge, or none.
        engine_options: Options of that engine, such as {model: Qwen/Qwen2.5-7B-Instruct}.
        knowledge_timeout: Seconds after which the rules answer in place of a language model; null waits.
        sheet: File for a contact sheet of the photos found, such as found.png or found.jpg; null draws none. Each query
            replaces it.
        states: How `--photos` stores what re-ranking needs of each photo, so that a search decodes no photo: `int8`,
            `fp16` (twice the size), or `none`, with which each search decodes the photos that it re-ranks.
        device: Device of the model; null takes a GPU if there is one.
        batch_size: Number of photos per forward pass.
        workers: Number of decoding processes.
    """

    index: str = ""
    photos: str | None = None
    adapter: str | None = None
    model: str | None = None
    pretrained: str | None = None
    count: int = 12
    top_k: int = 20
    fusion_weight: float = 0.0
    knowledge: str = "rules"
    engine_options: dict[str, bool | int | float | str | None] = field(default_factory=dict)
    knowledge_timeout: float | None = 10.0
    sheet: str | None = None
    states: Literal["int8", "fp16", "none"] = "int8"
    device: str | None = None
    batch_size: int = 32
    workers: int = 4


def parser() -> CommandLine:
    usage = '%(prog)s --index FOLDER [--KEY VALUE ...] "QUERY"'
    parser = CommandLine(usage=usage, description=__doc__.split("\n")[0])
    parser.add_argument(
        "query",
        nargs="?",
        default=None,
        help="description of the photo; if it and --photos are missing, queries are read from standard input",
    )
    parser.add_class_arguments(SearchSettings, as_group=False)
    return parser


def retriever(settings: SearchSettings):
    """Makes the `Retriever` of the settings, without a source of knowledge.

    Raises:
        AmpError: Adapter and model are both missing, or can't be loaded.
    """
    from amp.device import usable_device
    from amp.model.factory import create_model_and_transforms, refuse_unknown_model
    from amp.search.reranker import Reranker
    from amp.search.retriever import Retriever

    device = usable_device(settings.device)
    if settings.adapter is None:
        if settings.model is None:
            raise AmpError("adapter and model are both missing, expected one of them; add --adapter FILE")
        if ":" not in settings.model and not settings.pretrained:
            refuse_unknown_model(settings.model, None)
            raise AmpError(
                f"pretrained is missing, expected the weights of {settings.model}, since random weights give random "
                "results; add --pretrained FILE, or --pretrained TAG with a tag of open_clip.list_pretrained()"
            )
        model, _, preprocess = create_model_and_transforms(settings.model, settings.pretrained, device=device)
        return Retriever(Reranker(model, preprocess, batch_size=settings.batch_size), settings.index, top_k=0)
    reranker = Reranker.from_pretrained(
        settings.adapter,
        settings.model,
        settings.pretrained,
        device,
        knowledge="none",
        batch_size=settings.batch_size,
    )
    return Retriever(reranker, settings.index, settings.top_k, settings.fusion_weight)


@exit_on_error("run the same command again to continue")
def main(arguments: list[str] | None = None) -> None:
    parsed = parser().parse_args(arguments)
    query = parsed.pop("query")
    settings = SearchSettings(**vars(parsed))
    if not settings.index:
        raise AmpError("index is empty, expected a folder; add --index FOLDER")
    asks = query is not None or settings.photos is None
    queries = read_queries('amp search --index FOLDER "a dog jumps"') if asks and query is None else iter(())
    if settings.sheet is not None:
        from amp.report.drawing import picture_format

        picture_format(settings.sheet)  # said before minutes of work
        require("matplotlib", "--sheet")
    rules = RulesProcess() if asks and settings.adapter is not None and settings.knowledge == "rules" else None
    from amp.model.needs import needs_transformers
    from amp.terminal import PlainConsole, Terminal, load_open_clip

    load_open_clip(needs_transformers(settings.model, settings.adapter))
    import torch

    from amp.cores import use_cores
    from amp.model.factory import quiet_open_clip

    quiet_open_clip()
    terminal, console = Terminal(True), PlainConsole()
    gpu = torch.cuda.is_available() if settings.device is None else settings.device.startswith("cuda")
    use_cores(0 if settings.photos is None else settings.workers, gpu)
    with terminal.progress("loading the model"):
        search = retriever(settings)
        if asks and settings.adapter is not None and settings.knowledge != "none":
            search.reranker.knowledge = rules or language_model(settings)
        if rules is not None:
            rules.check()
    if settings.photos is not None:
        with terminal.progress("encoding photos", "photos") as report:
            states = None if settings.states == "none" or settings.adapter is None else settings.states
            update = search.update(settings.photos, settings.workers, report, states)
        tell_update(terminal.say, update, settings.index)
    if asks:
        check_index(search, settings, terminal.say)
        if query is None:
            answer_all(search, queries, settings, terminal.say, console)
        else:
            answer(search, query, settings, terminal.say, console)


def language_model(settings: SearchSettings):
    """The generator of knowledge that asks a language model."""
    from amp.generation.query import KnowledgeGenerator

    return KnowledgeGenerator(
        settings.knowledge,
        engine_options=settings.engine_options,
        cache=Path(settings.index) / "replies",
        timeout=settings.knowledge_timeout,
    )


def check_index(search, settings: SearchSettings, say: Callable[[str], None]) -> None:
    """Reports photos that are missing in the index, and refuses to replace a photo by a contact sheet."""
    if search.index.pending:
        say(
            f"{search.index.pending:,} photos are not searched, because their encoding was interrupted; add "
            "--photos FOLDER to encode them"
        )
    if settings.sheet is not None and search.index.holds(settings.sheet):
        raise AmpError(
            f"{settings.sheet}: is a photo of the index {settings.index}, expected a new file; choose a path outside "
            "the folder of photos"
        )


def answer_all(search, queries: Iterable[str], settings: SearchSettings, say: Callable[[str], None], console) -> None:
    """Answers the queries on standard input. An error of one query is printed, and the others are answered."""
    typed, failed = on_terminal(), False
    if typed:
        say(f"{len(search.index):,} photos; an empty line or Ctrl-D ends")
    for query in queries:
        if not typed:
            console.print(f"\n{query}")
        try:
            answer(search, query, settings, say, console)
        except AmpError as error:
            complain(f"error: {error}", outside=False)
            failed = True
    if failed and not typed:
        raise SystemExit(WRONG_INPUT)


def answer(search, query: str, settings: SearchSettings, say: Callable[[str], None], console) -> None:
    """Searches for one query and shows the result."""
    if search.cuts(query):
        limit = search.reranker.model.backbone.context_length
        say(f"the query is longer than the {limit} tokens that the model reads; its end is ignored; shorten it")
    show(console, search.search(query, settings.count), settings.sheet)


def tell_update(say: Callable[[str], None], update, index: str) -> None:
    """Reports an update of the index."""
    from amp.search.update import SKIPPED

    counts = f"{update.encoded:,} encoded, {update.photos - update.encoded:,} kept, {update.removed:,} removed"
    say(f"{update.photos:,} photos in {index}: {counts}")
    for line in skipped_lines(update.skipped):
        say(line)
    if update.skipped:
        say(f"{Path(index) / SKIPPED} lists all {len(update.skipped):,} skipped files and folders")
    left = {"hidden files and folders": update.hidden, "files that are not photos": update.others}
    if any(left.values()):
        say("left out: " + ", ".join(f"{count:,} {what}" for what, count in left.items() if count))


def skipped_lines(skipped: Mapping[Any, str]) -> list[str]:
    """One line per reason, with the first names."""
    named: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        named.setdefault(reason.partition(" (")[0], []).append(str(name))
    return [
        f"skipped {len(names):,}, {reason}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for reason, names in named.items()
    ]


def show(console, found, sheet: str | None) -> None:
    """Prints the results and draws the contact sheet."""
    from rich.text import Text

    def line(text: str, style: str = "") -> None:
        console.print(
            Text(printable(text), style=style), soft_wrap=True
        )  # without line breaks, so that paths can be copied

    for triplet, state in zip(found.knowledge.triplets, found.knowledge.states, strict=True):
        slots = ", ".join(x for x in (triplet.subject, triplet.action, triplet.object) if x)
        line(f"<{slots}>  {state}", "dim")
    line("rank  score  CLIP's rank and score  photo", "bold")
    for number, hit in enumerate(found.hits, start=1):
        line(f"{number:4}  {hit.score:5.3f}  {hit.base_rank + 1:11}  {hit.base_score:9.3f}  {hit.path}")
    for text in skipped_lines(found.skipped):
        line(text, "yellow")
    if sheet is not None:
        from amp.report.contact_sheet import draw_contact_sheet

        line(f"{draw_contact_sheet(sheet, found)} written")


if __name__ == "__main__":
    main()
