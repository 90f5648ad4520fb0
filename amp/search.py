"""Searches a folder of photos by text.

    amp search --index runs/index --adapter runs/mine/stage2/adapter.safetensors --photos ~/Pictures
    amp search --index runs/index --adapter runs/mine/stage2/adapter.safetensors --sheet found.png \\
        "a dog jumps over a hurdle"

The first command makes the index, or brings it up to date after photos have changed; a query may stand beside it. The
base model is the one that the adapter was trained on.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from amp.command import CommandLine
from amp.errors import AmpError, exit_on_error, printable


@dataclass
class SearchSettings:
    """A search.

    Args:
        index: Folder of the index.
        photos: Folder of photos whose index is made or brought up to date first.
        adapter: Adapter file of a run, folder of `amp publish`, or hf-hub:ORG/REPO; null searches with the base model
            alone.
        model: Base model, as open_clip names it; null takes the one in the adapter's record.
        pretrained: Its weights, as open_clip names them.
        count: Photos that are shown.
        top_k: Photos that are re-ranked (paper: 20).
        fusion_weight: Of the base model's score beside the new one.
        knowledge: Where the query's triplets and states come from: an engine of amp generate_knowledge, or none.
        engine_options: Of that engine, such as {model: Qwen/Qwen2.5-7B-Instruct}.
        sheet: PNG file with the photos found.
        device: Where the model runs; null takes a GPU if there is one.
        batch_size: Photos a forward pass.
        workers: Decoding processes.
    """

    index: str = ""
    photos: str | None = None
    adapter: str | None = None
    model: str | None = None
    pretrained: str | None = None
    count: int = 12
    top_k: int = 20
    fusion_weight: float = 0.0
    knowledge: Literal["rules", "transformers", "openai", "vllm", "none"] = "rules"
    engine_options: dict[str, bool | int | float | str | None] = field(default_factory=dict)
    sheet: str | None = None
    device: str | None = None
    batch_size: int = 32
    workers: int = 4


def parser() -> CommandLine:
    usage = '%(prog)s --index FOLDER [--KEY VALUE ...] "QUERY"'
    parser = CommandLine(usage=usage, description=__doc__.split("\n")[0])
    parser.add_argument("query", nargs="?", default=None, help="what the photo shows")
    parser.add_class_arguments(SearchSettings, as_group=False)
    return parser


def retriever(settings: SearchSettings, asks: bool):
    """The `Retriever` of the settings; where nobody `asks`, an index needs no generator of knowledge.

    Raises:
        AmpError: Neither adapter nor model, or one that can't be loaded.
    """
    from amp.device import usable_device
    from amp.factory import create_model_and_transforms
    from amp.generation.query import KnowledgeGenerator
    from amp.retrieval.retriever import Retriever

    device = usable_device(settings.device)
    common: dict[str, Any] = {"fusion_weight": settings.fusion_weight, "batch_size": settings.batch_size}
    if settings.adapter is None:
        if settings.model is None:
            raise AmpError("adapter and model are both missing, expected one of them; add --adapter FILE")
        model, _, preprocess = create_model_and_transforms(settings.model, settings.pretrained, device=device)
        return Retriever(model, preprocess, settings.index, top_k=0, **common)
    knowledge = None
    if asks and settings.knowledge != "none":
        knowledge = KnowledgeGenerator(settings.knowledge, engine_options=settings.engine_options,
                                       cache=Path(settings.index) / "replies")  # fmt: skip
    return Retriever.from_adapter(settings.adapter, settings.index, settings.model, settings.pretrained, device,
                                  knowledge=knowledge, top_k=settings.top_k, **common)  # fmt: skip


@exit_on_error("the same command goes on from there")
def main(arguments: list[str] | None = None) -> None:
    parsed = parser().parse_args(arguments)
    query = parsed.pop("query")
    settings = SearchSettings(**vars(parsed))
    if not settings.index:
        raise AmpError("index is empty, expected a folder; add --index FOLDER")
    if query is None and settings.photos is None:
        raise AmpError('neither query nor photos, expected one: amp search --index FOLDER "a dog jumps"')
    import torch

    from amp.cores import use_cores
    from amp.factory import quiet_open_clip
    from amp.terminal import PlainConsole, Terminal

    quiet_open_clip()
    terminal, console = Terminal(True), PlainConsole()
    gpu = torch.cuda.is_available() if settings.device is None else settings.device.startswith("cuda")
    use_cores(0 if settings.photos is None else settings.workers, gpu)
    with terminal.progress("loading the model"):
        search = retriever(settings, asks=query is not None)
    if settings.photos is not None:
        with terminal.progress("encoding photos", "photos") as report:
            update = search.update(settings.photos, settings.workers, report)
        counts = f"{update.encoded:,} encoded, {update.removed:,} removed, {len(update.skipped):,} files skipped"
        terminal.say(f"{update.photos:,} photos in {settings.index}: {counts}")
        for name, reason in list(update.skipped.items())[:10]:
            terminal.say(f"skipped {name}: {reason}")
    if query is not None:
        show(console, search.search(query, settings.count), settings.sheet)


def show(console, found, sheet: str | None) -> None:
    """Prints what was found, and draws the contact sheet."""
    from rich.text import Text

    from amp.retrieval.contact_sheet import draw_contact_sheet

    for triplet, state in zip(found.knowledge.triplets, found.knowledge.states, strict=True):
        slots = ", ".join(x for x in (triplet.subject, triplet.action, triplet.object) if x)
        console.print(Text(printable(f"<{slots}>  {state}"), style="dim"))
    console.print(Text("rank  score  CLIP's rank and score  photo", style="bold"))
    for number, hit in enumerate(found.hits, start=1):
        line = f"{number:4}  {hit.score:5.3f}  {hit.base_rank + 1:11}  {hit.base_score:9.3f}  {hit.path}"
        console.print(Text(printable(line)), soft_wrap=True)  # a path cut in two can't be copied
    for path, reason in found.skipped.items():
        console.print(Text(printable(f"skipped {path}: {reason}")), style="yellow", soft_wrap=True)
    if sheet is not None:
        console.print(Text(printable(f"{draw_contact_sheet(sheet, found)} written")), soft_wrap=True)


if __name__ == "__main__":
    main()
