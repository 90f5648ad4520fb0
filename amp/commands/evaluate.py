"""Evaluates retrieval: base CLIP and any number of adapters in one table, both directions, re-ranked top k.

    amp evaluate --shards data/flickr8k --out runs/mine/results.json \
        --adapters control=runs/mine/control/stage2/adapter.safetensors ours=runs/mine/ours/stage2/adapter.safetensors
    amp evaluate --shards data/flickr8k --model.name ViT-B-32-quickgelu --model.pretrained openai     (base model only)
    accelerate launch --config_file launchers/accelerate/one_node.yaml -m amp.commands.evaluate ...   (several GPUs)

The base model, image transform and kinds of triplets are read from the adapters. --search sets how the split is
searched. Writes OUT (JSON) and, next to it, .csv, .npz (results per query, for amp compare and amp report) and
.verbs.csv (accuracy by action verb). --gallery draws some retrievals. Run the same command again to continue an
interrupted evaluation.
"""

from pathlib import Path

from amp.command_line import CommandLine
from amp.commands.measuring import command_line, read_command_line
from amp.errors import exit_on_error
from amp.evaluate.settings import EvaluationSettings


def parser() -> CommandLine:
    return command_line(__doc__, EvaluationSettings, "--shards DIR --adapters NAME=FILE [NAME=FILE ...]")


@exit_on_error("scores so far are kept; run the same command again to continue")
def main(arguments: list[str] | None = None) -> None:
    settings = read_command_line(parser(), arguments, EvaluationSettings)
    if settings.gallery is not None:
        from amp.report.drawing import picture_format

        picture_format(settings.gallery)
    from amp.terminal import PlainConsole, load_open_clip

    load_open_clip()
    from amp.evaluate.results_table import print_table
    from amp.evaluate.run import evaluate

    found = evaluate(settings)
    if not found.main:
        return
    print_table(found.result, PlainConsole())
    if settings.gallery is not None and found.rankings is not None:
        from amp.report.picture import draw_retrievals

        draw_retrievals(Path(settings.gallery), found.split, found.captions, found.rankings)


if __name__ == "__main__":
    main()
