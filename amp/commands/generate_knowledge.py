"""Generates the action knowledge of a captions file: triplets, and a state that describes each triplet.

With rules, without a language model (needs `pip install "open-clip-amp[generate]"` and a spaCy model)::

    amp generate_knowledge --captions dataset_coco.json --out knowledge/rules

With a local or hub model or a GGUF file (on several GPUs, start it with `accelerate launch`, then run `--merge`)::

    amp generate_knowledge --captions dataset_coco.json --out knowledge/qwen \
        --engine transformers --model Qwen/Qwen2.5-7B-Instruct

With a server of OpenAI's API, such as `vllm serve MODEL --enable-prefix-caching` or `llama-server -m MODEL.gguf`::

    amp generate_knowledge --captions captions.csv --out knowledge/mine \
        --engine openai --openai.base_url http://localhost:8000/v1 --model Qwen/Qwen2.5-7B-Instruct

Run the same command again to generate only what is missing. In a job array, run the parts `--part 0/16` to
`--part 15/16`, then the command without `--part` (on Slurm: launchers/slurm/generate_knowledge.sbatch). Then write the
shards::

    amp make_shards ... --knowledge OUT

or put the knowledge into existing shards with amp rewrite_knowledge.
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
    parser.add_argument("--splits", nargs="+", type=str, help="splits whose captions get knowledge; all by default")
    parser.add_argument("--model", type=str | None, default=None, help="model of the engine; not for the engine rules")
    for name, engine in known_engines().items():
        parser.add_class_arguments(engine, name, skip={"model"})
    parser.add_argument("--config", action="config", help="YAML file with these options")
    return parser


@exit_on_error("the replies so far are kept; run the same command again to continue")
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
            f"--model is {model!r} with --engine {options['engine']}; expected a model for every engine except rules; "
            "give both --model and --engine, or neither"
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
    output.print(f"{summary.captions:,} captions, {summary.distinct:,} distinct")
    if summary.foils:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in summary.foils.most_common())
        output.print(f"{summary.foils.total():,} foils: {kinds}")
    for reason, count in summary.empty.items():
        output.print(f"{count:,} without a triplet: {reason}")
    output.print(f"{options['out']}/{KNOWLEDGE_NAME} written")


if __name__ == "__main__":
    main()
