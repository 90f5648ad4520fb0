"""The `amp COMMAND` entry point. The scripts in launchers/ and tools/ call the same functions.

To train on several processes, run `accelerate launch ... -m amp.commands.train` instead of `amp train`.
"""

import sys
from importlib import import_module

import amp.commands  # noqa: F401, sets a variable that torch reads when it is loaded
from amp.errors import WRONG_INPUT, complain, exit_on_error

# Each command is the module of the same name in amp/commands.
GROUPS = {
    "use": {
        "search": "find photos in a folder by text",
        "serve": "serve re-ranking, search and a search page over HTTP",
        "publish": "export an adapter with a model card to a folder or the Hugging Face Hub",
    },
    "train": {
        "generate_knowledge": "generate knowledge for captions",
        "make_shards": "turn photos, captions and knowledge into shards",
        "index_shards": "use WebDataset tar files of other tools as shards, as they are",
        "rewrite_knowledge": "replace the knowledge in existing shards",
        "prepare": "compute and store the features of a training run before it",
        "train": "train an adapter on shards",
        "sweep": "train and evaluate several configurations over several seeds",
    },
    "measure": {
        "evaluate": "measure retrieval with the base CLIP and with adapters",
        "compare": "compare two rows of evaluations, with confidence intervals",
        "report": "write an evaluation as one HTML page",
        "choose": "choose the right caption of a photo: SugarCrepe, ARO, swapped roles and actions",
        "table1": "show the paper's Table 1 next to our results",
        "clip_benchmark": "run CLIP_benchmark with adapters, as its model type amp",
    },
}
COMMANDS = {name: what for group in GROUPS.values() for name, what in group.items()}


@exit_on_error()
def main() -> None:
    """Runs the command named by the first argument with the remaining arguments."""
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if name in COMMANDS:
        import_module(f"amp.commands.{name}").main(arguments)
        return
    usage = "usage: amp COMMAND [options]; amp COMMAND --help lists them"
    if name in ("--help", "-h"):
        print(usage)
        for title, group in GROUPS.items():
            print(f"\n{title}:", *(f"  {command:20}{what}" for command, what in group.items()), sep="\n")
        return
    if name == "--version":
        from amp.version import __version__

        print(__version__)
        return
    print(f"{usage}\n", file=sys.stderr)
    sys.argv[1:] = []  # so that the error names the program only as `amp`
    complain(f"error: command is {name!r}, expected one of {', '.join(COMMANDS)}")
    raise SystemExit(WRONG_INPUT)


if __name__ == "__main__":
    main()
