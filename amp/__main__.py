"""``amp COMMAND``: what an installed package needs no clone for; the scripts of launchers/ and tools/ call the same.

On several processes ``accelerate launch ... -m amp.commands.train`` takes the place of ``amp train``.
"""

import sys
from importlib import import_module

import amp.commands  # noqa: F401, sets what torch reads when it is loaded
from amp.errors import WRONG_INPUT, complain, exit_on_error

COMMANDS = {
    "generate_knowledge": ("amp.commands.generate_knowledge", "write the knowledge of captions"),
    "make_shards": ("amp.commands.make_shards", "photos, captions and knowledge to shards"),
    "rewrite_knowledge": ("amp.commands.rewrite_knowledge", "put new knowledge into shards that exist"),
    "train": ("amp.commands.train", "train an adapter on shards"),
    "evaluate": ("amp.commands.evaluate", "retrieval figures of the base CLIP and of adapters"),
    "compare": ("amp.commands.compare", "two rows of evaluations with intervals"),
    "report": ("amp.commands.report", "an evaluation as one HTML page"),
    "search": ("amp.commands.search", "find photos of a folder by text"),
    "publish": ("amp.commands.publish", "an adapter as a folder with a model card, or on the hub"),
}


@exit_on_error()
def main() -> None:
    """Runs the command that the first argument names; the others are its own."""
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if name in COMMANDS:
        import_module(COMMANDS[name][0]).main(arguments)
        return
    known = "\n".join(f"  {command:20}{what}" for command, (_, what) in COMMANDS.items())
    usage = f"usage: amp COMMAND [options]; amp COMMAND --help lists them\n\n{known}"
    if name in ("--help", "-h"):
        print(usage)
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
