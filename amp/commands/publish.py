"""Writes a trained adapter as a folder with a model card, and optionally uploads it to the Hugging Face hub.

    amp publish --adapter runs/mine/action-aware/stage2/adapter.safetensors --results runs/mine/results.json \
        --out models/mine
    amp publish ... --push ORG/REPO       (needs the network; `hf auth login` first)

Load it with amp.from_pretrained("models/mine") or `amp search --adapter models/mine`. Replace models/mine by
hf-hub:ORG/REPO to load it from the hub.
"""

from dataclasses import dataclass

from amp.command_line import CommandLine, check_given
from amp.errors import exit_on_error


@dataclass
class PublishSettings:
    """Settings of a publication.

    Args:
        adapter: `adapter.safetensors` of a run.
        out: Folder for the adapter, its config.json and the model card.
        results: JSON file of an evaluation of this adapter, to show on the model card; null shows none.
        base: Name of the base model to record for other users; null keeps the name used in training.
        base_pretrained: Weights of the base model, as named by open_clip. Only used together with `base`.
        push: Repository on the Hugging Face hub, ORG/REPO; null uploads nothing.
        private: Whether a newly created repository is private.
    """

    adapter: str = ""
    out: str = ""
    results: str | None = None
    base: str | None = None
    base_pretrained: str | None = None
    push: str | None = None
    private: bool = False


def parser() -> CommandLine:
    parser = CommandLine(
        usage="%(prog)s --adapter FILE --out FOLDER [--KEY VALUE ...]", description=__doc__.split("\n")[0]
    )
    parser.add_class_arguments(PublishSettings, as_group=False)
    return parser


@exit_on_error()
def main(arguments: list[str] | None = None) -> None:
    settings = PublishSettings(**vars(parser().parse_args(arguments)))
    check_given(settings, "adapter")
    from amp.terminal import Terminal, load_open_clip

    load_open_clip()
    from amp.publish.hub import push_to_hub, save_pretrained

    terminal = Terminal(True)
    with terminal.progress("reading the adapter and its base model"):
        folder = save_pretrained(
            settings.out, settings.adapter, settings.results, settings.base, settings.base_pretrained
        )
    print(f"{folder} written")
    if settings.push is not None:
        with terminal.progress(f"uploading to {settings.push}"):
            address = push_to_hub(folder, settings.push, settings.private)
        print(address)


if __name__ == "__main__":
    main()
