"""Asks which of a photo's captions is right: SugarCrepe, ARO, and captions with swapped roles and actions.

    amp choose --shards data/flickr8k --adapters ours=FILE --tests swapped-roles swapped-actions \
        --split test --out runs/mine/choices.csv
    amp choose --adapters ours=FILE --tests swap_obj.json replace_rel.json --images coco/val2017 \
        --out runs/mine/sugarcrepe.csv

The swapped tests are made from the captions and triplets of the shards. Files are those of SugarCrepe and ARO, with
their photos in a folder; both captions get knowledge from --knowledge, which never sees which one is right.

All inputs are checked before a model is loaded. Entries that can't be used are skipped, up to --max_skipped_entries of
a test, and listed with the reason in OUT's .skipped.csv. OUT is written again after each test; a test that fails leaves
the others alone.
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
    from amp.evaluate.choice_run import run

    run(settings)


if __name__ == "__main__":
    main()
