"""``amp COMMAND``; the scripts of launchers/ and tools/ call the same functions.

On several processes ``accelerate launch ... -m amp.commands.train`` takes the place of ``amp train``.
"""

import sys
from importlib import import_module

import amp.commands  # noqa: F401, sets what torch reads when it is loaded
from amp.errors import WRONG_INPUT, complain, exit_on_error

# Each command is the module of its name in amp/commands.
GROUPS = {
    "use": {
        "search": "find photos of a folder by text",
        "publish": "write an adapter as a folder with a model card, or to the hub",
    },
    "train": {
        "generate_knowledge": "write the knowledge of captions",
        "make_shards": "turn photos, captions and knowledge into shards",
        "rewrite_knowledge": "put new knowledge into shards that exist",
        "train": "train an adapter on shards",
        "sweep": "train and evaluate the rows of a table over several seeds",
    },
    "measure": {
        "evaluate": "retrieval figures of the base CLIP and of adapters",
        "compare": "differences of two rows of evaluations, with intervals",
        "report": "an evaluation as one HTML page",
        "choose": "which of a photo's captions is right? SugarCrepe, ARO, swapped roles and actions",
        "table1": "the paper's Table 1 next to our figures",
        "clip_benchmark": "CLIP_benchmark with adapters as its model type amp",
    },
}
COMMANDS = {name: what for group in GROUPS.values() for name, what in group.items()}


@exit_on_error()
def main() -> None:
    """Runs the command that the first argument names; the others are its own."""
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
    sys.argv[1:] = []  # the name of this command is only `amp`
    complain(f"error: command is {name!r}, expected one of {', '.join(COMMANDS)}")
    raise SystemExit(WRONG_INPUT)


if __name__ == "__main__":
    main()
