"""Evaluates retrieval: base CLIP and any number of adapters in one table, both directions, re-ranked top k.

    amp evaluate --config launchers/configs/flickr8k.yaml --split test \
        --out runs/flickr8k/results.json --adapters '["control=runs/flickr8k/control/stage2/adapter.safetensors"]'
    accelerate launch --config_file launchers/accelerate/one_node.yaml launchers/evaluate.py ...   (pairs are split)

The configuration is the one of training: of it `model`, `data` and `mixed_precision` are read, and `prompt` for the
base model alone; adapters carry their own prompt settings. How the split is searched is set by --search. Writes OUT
(JSON) and next to it .csv, .npz (results a query, for amp compare and amp report) and .verbs.csv
(accuracy by action verb); with --gallery a picture of some retrievals. A run that was stopped goes on where it was.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from amp.command_line import CommandLine
from amp.errors import exit_on_error
from amp.retrieval.settings import RetrievalSettings
from amp.train.command import command_line, read_command_line


@dataclass
class EvaluationSettings:
    """What is evaluated.

    Args:
        split: Split of the shards.
        adapters: ``NAME=FILE`` each, in the order of the table; none evaluates the base model alone.
        out: JSON file of the result; .csv, and .npz with results a query, stand beside it.
        gallery: Picture with retrievals of the last adapter, a PNG, JPEG or WebP file; null draws none.
        search: How the split is searched.
        probes: Rows beside each knowledge-aware adapter with one input spoilt: ``shuffled`` knowledge, ``blank``
            knowledge, knowledge of a ``sibling`` caption of the same image, ``grey`` images.
        text_only: Add the text-only control: captions with their states, no action-aware image.
        bootstrap: Samples of the images for the 95 % intervals; 0 computes none.
    """

    split: str = "test"
    adapters: list[str] = field(default_factory=list)
    out: str = "runs/results.json"
    gallery: str | None = None
    search: RetrievalSettings = field(default_factory=RetrievalSettings)
    probes: list[Literal["shuffled", "blank", "sibling", "grey"]] = field(default_factory=list)
    text_only: bool = False
    bootstrap: int = 1000


def parser() -> CommandLine:
    return command_line(__doc__, EvaluationSettings)


@exit_on_error("scores so far are kept, and the same command goes on from there")
def main(arguments: list[str] | None = None) -> None:
    evaluation, config = read_command_line(parser(), arguments, EvaluationSettings)
    if evaluation.gallery is not None:
        from amp.report.drawing import picture_format

        picture_format(evaluation.gallery)
    from amp.evaluate.run import evaluate

    evaluate(
        config,
        evaluation.split,
        evaluation.adapters,
        evaluation.search,
        Path(evaluation.out),
        evaluation.gallery,
        evaluation.probes,
        evaluation.text_only,
        evaluation.bootstrap,
    )


if __name__ == "__main__":
    main()
