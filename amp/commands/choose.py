"""Tests whether a model picks the right caption of a photo: SugarCrepe, ARO, and swapped roles and actions.

    amp choose --shards data/flickr8k --adapters ours=FILE --tests swapped-roles swapped-actions \
        --split test --out runs/mine/choices.csv
    amp choose --adapters ours=FILE --tests swap_obj.json replace_rel.json --images coco/val2017 \
        --out runs/mine/sugarcrepe.csv

The tests swapped-roles and swapped-actions are made from the captions and triplets of the shards. Other tests are files
of SugarCrepe or ARO, with their photos in a folder. Both captions get knowledge from --knowledge, which does not know
which caption is right.

All inputs are checked before a model is loaded. Up to --max_skipped_entries unusable entries per test are skipped and
listed with the reason in a .skipped.csv file next to OUT. OUT is written after each test, and a failed test does not
stop the others.
"""

from amp.command_line import CommandLine
from amp.commands.measuring import command_line, read_command_line
from amp.errors import exit_on_error
from amp.evaluate.choice_settings import ChooseSettings


def parser() -> CommandLine:
    return command_line(__doc__, ChooseSettings, "--shards DIR --adapters NAME=FILE [...] --tests TEST [...]")


@exit_on_error()
def main(arguments: list[str] | None = None) -> None:
    settings = read_command_line(parser(), arguments, ChooseSettings)
    from amp.terminal import load_open_clip

    load_open_clip()
    from amp.evaluate.choice_run import run

    run(settings)


if __name__ == "__main__":
    main()
