"""Serves an adapter over HTTP: re-ranking, search in a folder of photos, and a search page for the browser.

    amp serve --index runs/index --adapter runs/mine/stage2/adapter.safetensors --photos ~/Pictures
    amp serve --adapter runs/mine/stage2/adapter.safetensors --port 9000

The first command updates the index before it serves it. The second one only re-ranks the images of requests.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from amp.command_line import CommandLine
from amp.errors import AmpError, exit_on_error, require


@dataclass
class ServeSettings:
    """Settings of a server.

    Args:
        adapter: Adapter file of a run, folder of `amp publish`, or hf-hub:ORG/REPO.
        index: Folder of the index; null serves only re-ranking.
        photos: Folder of photos to index before serving; null serves the index as it is.
        model: Base model, as named by open_clip; null takes the one recorded in the adapter.
        pretrained: Weights of the base model, as named by open_clip.
        host: Address to serve. The default serves only this machine.
        port: Port to serve; 0 takes a free one.
        allow_hosts: Hosts whose images may be fetched for requests that contain URLs, such as images.example.org.
        top_k: Number of photos to re-rank, unless a request says otherwise (paper: 20).
        fusion_weight: Weight of the base model's score, which is added to the re-ranking score.
        knowledge: Source of the queries' triplets and states: an engine of amp generate_knowledge, or none.
        engine_options: Options of that engine, such as {model: Qwen/Qwen2.5-7B-Instruct}.
        knowledge_timeout: Seconds after which the rules answer in place of a language model; null waits.
        device: Device of the model; null takes a GPU if there is one.
        batch_size: Number of photos per forward pass.
        workers: Number of decoding processes that index photos.
        max_mb: Largest request in MiB.
        queue: Number of requests that may be handled or wait at the same time.
        timeout: Seconds in which a request must be answered.
    """

    adapter: str = ""
    index: str | None = None
    photos: str | None = None
    model: str | None = None
    pretrained: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    allow_hosts: list[str] = field(default_factory=list)
    top_k: int = 20
    fusion_weight: float = 0.0
    knowledge: str = "rules"
    engine_options: dict[str, bool | int | float | str | None] = field(default_factory=dict)
    knowledge_timeout: float | None = 10.0
    device: str | None = None
    batch_size: int = 32
    workers: int = 4
    max_mb: int = 32
    queue: int = 64
    timeout: float = 60.0


def parser() -> CommandLine:
    usage = "%(prog)s --index FOLDER --adapter FILE [--KEY VALUE ...]"
    parser = CommandLine(usage=usage, description=__doc__.split("\n")[0])
    parser.add_class_arguments(ServeSettings, as_group=False)
    return parser


def check(settings: ServeSettings) -> None:
    """Checks what can be checked before the model is loaded.

    Raises:
        AmpError: A setting is missing or out of range.
    """
    from amp.serve.fetch import is_host

    if not settings.adapter:
        raise AmpError("adapter is empty, expected an adapter; add --adapter FILE")
    if settings.photos is not None and settings.index is None:
        raise AmpError("photos is given without index, expected both; add --index FOLDER")
    for key, least in (("top_k", 0), ("max_mb", 1), ("queue", 1), ("timeout", 1)):
        if (value := getattr(settings, key)) < least:
            raise AmpError(f"{key} is {value}, expected at least {least}")
    for host in settings.allow_hosts:
        if not is_host(host):
            raise AmpError(
                f"allow_hosts contains {host!r}, expected a host such as images.example.org or 10.0.0.5:9000, without "
                "http:// and path"
            )
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        require(package, "amp serve")


@exit_on_error("nothing is lost; run the same command again")
def main(arguments: list[str] | None = None) -> None:
    settings = ServeSettings(**vars(parser().parse_args(arguments)))
    check(settings)
    from amp.model.needs import needs_transformers
    from amp.serve.server import Server, accepted_names, address_of, bound_socket
    from amp.terminal import Terminal, load_open_clip

    listening = bound_socket(settings.host, settings.port)
    load_open_clip(needs_transformers(settings.model, settings.adapter))
    import torch

    from amp.commands.search import tell_update
    from amp.cores import use_cores
    from amp.model.factory import quiet_open_clip

    quiet_open_clip()
    terminal = Terminal(True)
    gpu = torch.cuda.is_available() if settings.device is None else settings.device.startswith("cuda")
    use_cores(0 if settings.photos is None else settings.workers, gpu)
    with terminal.progress("loading the model"):
        service = make_service(settings)
    with terminal.progress("loading the source of knowledge"):
        service.reranker.knowledge_of(["a dog jumps"])
    if settings.photos is not None and service.retriever is not None:
        with terminal.progress("encoding photos", "photos") as report:
            update = service.retriever.update(settings.photos, settings.workers, report)
        tell_update(terminal.say, update, str(settings.index))
    if service.retriever is not None and (pending := service.index.pending):
        terminal.say(
            f"{pending:,} photos are not searched, because their encoding was interrupted; add --photos FOLDER"
        )
    app = make_application(settings, service, accepted_names(listening))
    if accepted_names(listening) is None:
        terminal.say(
            f"warning: everybody who can reach {address_of(listening)} can search and see the photos; docs/serve.md "
            "says how to protect them"
        )
    with suppress(KeyboardInterrupt):  # which uvicorn raises again after it has stopped
        Server(app, lambda: terminal.say(f"serving {address_of(listening)} (Ctrl-C stops)")).run([listening])
    terminal.say("stopped")


def make_service(settings: ServeSettings):
    """Loads the model and opens the index.

    Raises:
        AmpError: One of them can't be loaded.
    """
    from amp.device import usable_device
    from amp.search.reranker import Reranker
    from amp.search.retriever import Retriever
    from amp.serve.service import Service

    reranker = Reranker.from_pretrained(
        settings.adapter,
        settings.model,
        settings.pretrained,
        usable_device(settings.device),
        knowledge=settings.knowledge,
        engine_options=settings.engine_options,
        batch_size=settings.batch_size,
        knowledge_timeout=settings.knowledge_timeout,
    )
    retriever = None
    if settings.index is not None:
        retriever = Retriever(reranker, settings.index, settings.top_k, settings.fusion_weight)
    return Service(reranker, retriever)


def make_application(settings: ServeSettings, service, names: frozenset[str] | None):
    """Builds the ASGI application of the settings; see `amp.serve.app.make_app`."""
    from amp.serve.app import Defaults, make_app
    from amp.serve.limits import Limits

    model = f"amp:{Path(service.reranker.model.base_name).name}"
    return make_app(
        service,
        Defaults(model, settings.top_k, settings.fusion_weight),
        Limits(settings.max_mb << 20, settings.queue, settings.timeout),
        names,
        frozenset(settings.allow_hosts),
    )


if __name__ == "__main__":
    main()
