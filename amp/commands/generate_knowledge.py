"""Generate the action knowledge of a captions file: triplets and a state description of each, for amp make_shards.

Rules, no language model (``pip install "open-clip-amp[generate]"`` and a spaCy model)::

    amp generate_knowledge --captions dataset_coco.json --out knowledge/rules

A local or hub model, or a GGUF file; several GPUs with ``accelerate launch`` in front, then ``--merge``::

    amp generate_knowledge --captions dataset_coco.json --out knowledge/qwen --template coco \
        --engine transformers --model Qwen/Qwen2.5-7B-Instruct

A server of OpenAI's interface: ``vllm serve MODEL --enable-prefix-caching``, ``llama-server -m MODEL.gguf``::

    amp generate_knowledge --captions captions.csv --out knowledge/mine \
        --engine openai --openai.base_url http://localhost:8000/v1 --model Qwen/Qwen2.5-7B-Instruct

The same command again does only what is missing. A job array: ``--part 0/16`` to ``--part 15/16``, then the command
without it (on Slurm: launchers/slurm/generate_knowledge.sbatch). Then::

    amp make_shards ... --knowledge OUT

or amp rewrite_knowledge for shards that exist.
"""

from __future__ import annotations

import sys

from amp.errors import AmpError, exit_on_error
from amp.generation.engines.base import known_engines
from amp.generation.run import generate_knowledge
from amp.knowledge.schema import KNOWLEDGE_NAME


def parser():
    from amp.command_line import CommandLine

    parser = CommandLine(
        usage="%(prog)s --captions FILE --out FOLDER [--engine NAME --model MODEL] [options]",
        description=__doc__.partition("\n")[0],
    )
    parser.add_function_arguments(generate_knowledge, skip={"splits", "engine_options", "command", "console"})
    parser.add_argument("--splits", nargs="+", type=str, help="splits whose captions get knowledge; by default all")
    parser.add_argument("--model", type=str | None, default=None, help="model of the engine; rules have none")
    for name, engine in known_engines().items():
        parser.add_class_arguments(engine, name, skip={"model"})
    parser.add_argument("--config", action="config", help="YAML file with these options")
    return parser


@exit_on_error("the replies are kept, and the same command goes on from there")
def main(arguments: list[str] | None = None) -> None:
    from rich.table import Table

    from amp.terminal import PlainConsole

    options = parser().parse_args(arguments).as_dict()
    console = PlainConsole(stderr=True)
    command = ["generate_knowledge.py", *(sys.argv[1:] if arguments is None else arguments)]
    options.pop("config")
    of_engines = {name: options.pop(name) for name in known_engines()}
    model = options.pop("model")
    if (model is None) != (options["engine"] == "rules"):
        raise AmpError(
            f"--model is {model!r} with --engine {options['engine']}; expected a model for an engine that has "
            "one, and none for rules; give both, or neither"
        )
    if model is not None:
        options["engine_options"] = {"model": model, **of_engines.get(options["engine"], {})}
    summary = generate_knowledge(**options, command=command, console=console)
    if summary is None:
        return

    table = Table("source", "triplets", "states")
    for column in table.columns[1:]:
        column.justify = "right"
    for source in dict.fromkeys((*summary.triplets, *summary.states)):
        table.add_row(source, f"{summary.triplets[source]:,}", f"{summary.states[source]:,}")
    output = PlainConsole()
    output.print(table)
    output.print(f"{summary.captions:,} captions, {summary.distinct:,} different ones")
    for reason, count in summary.empty.items():
        output.print(f"{count:,} without a triplet: {reason}")
    output.print(f"{options['out']}/{KNOWLEDGE_NAME} written")


if __name__ == "__main__":
    main()
