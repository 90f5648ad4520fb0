"""Asks which of a photo's captions is right: SugarCrepe, ARO, and captions with swapped roles and actions.

    python launchers/choose.py --config runs/mine/action-aware/config.yaml --adapters '["action-aware=FILE"]' \
        --tests '[swapped-roles, swapped-actions]' --split test --out runs/mine/choices.csv
    python launchers/choose.py --config runs/mine/action-aware/config.yaml --adapters '["action-aware=FILE"]' \
        --tests '[swap_obj.json, replace_rel.json]' --images coco/val2017 --out runs/mine/sugarcrepe.csv

The swapped tests are made from the captions and triplets of the shards. Files are those of SugarCrepe and ARO, with
their photos in a folder; both captions get knowledge from --knowledge, which never sees which one is right.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from amp.command import CommandLine
from amp.errors import AmpError, exit_on_error
from amp.train.command import command_line, read_command_line
from amp.train.config import TrainConfig


@dataclass
class ChooseSettings:
    """What is asked.

    Args:
        adapters: ``NAME=FILE`` each.
        tests: JSON files, or ``swapped-roles`` and ``swapped-actions``, made from the shards.
        images: Folder of the photos of JSON files.
        split: Split of the shards for the swapped tests.
        knowledge: Where knowledge of a JSON file's captions comes from: an engine of amp generate_knowledge, or
            none.
        engine_options: Of that engine, such as {model: Qwen/Qwen2.5-7B-Instruct}.
        limit: Choices of each test at most, evenly spaced; 0 for all.
        choices_a_batch: Choices at a time.
        out: CSV file.
    """

    adapters: list[str] = field(default_factory=list)
    tests: list[str] = field(default_factory=lambda: ["swapped-roles", "swapped-actions"])
    images: str | None = None
    split: str = "test"
    knowledge: Literal["rules", "transformers", "openai", "vllm", "none"] = "rules"
    engine_options: dict[str, bool | int | float | str | None] = field(default_factory=dict)
    limit: int = 0
    choices_a_batch: int = 64
    out: str = "runs/choices.csv"


def parser() -> CommandLine:
    return command_line(__doc__, ChooseSettings)


@exit_on_error()
def main(arguments: list[str] | None = None) -> None:
    run(*read_command_line(parser(), arguments, ChooseSettings))


def run(settings: ChooseSettings, config: TrainConfig) -> None:
    """Runs all tests and prints a table."""
    from rich.table import Table

    from amp.data.file_names import find_file
    from amp.data.image_file import open_photo
    from amp.data.split import ShardSplit
    from amp.device import usable_device
    from amp.factory import create_model_and_transforms
    from amp.generation.query import KnowledgeGenerator
    from amp.retrieval.adapters import adapted, named_adapter
    from amp.retrieval.choice import choose, load_choices, save_choices
    from amp.retrieval.evaluate import SplitCaptions, spaced
    from amp.retrieval.swaps import TESTS, swapped_actions, swapped_roles
    from amp.terminal import PlainConsole, Terminal

    named = dict(named_adapter(text) for text in settings.adapters)
    if not named:
        raise AmpError("adapters is empty, expected one at least; add --adapters '[NAME=FILE]'")
    files = [test for test in settings.tests if test not in TESTS]
    if files and settings.images is None:
        raise AmpError(f"tests has {files[0]!r} and images is null, expected the folder of its photos; add --images")
    terminal = Terminal(True)
    generate = None
    if files and settings.knowledge != "none":
        generate = KnowledgeGenerator(settings.knowledge, engine_options=settings.engine_options)
    with terminal.progress(f"loading {config.model.name}"):
        base, _, preprocess = create_model_and_transforms(
            config.model.name, config.model.pretrained, precision=config.model.precision, device=usable_device(),
            prompt_config=config.prompt, image_resize_mode=config.model.resize_mode,
        )  # fmt: skip
    models = {name: adapted(base, config.model.name, path).eval() for name, path in named.items()}
    if len(files) < len(settings.tests):
        split = ShardSplit(config.data.shards, settings.split)
        captions = SplitCaptions.read(split, config.data.kinds)
    results = {}
    table = Table("test", "method", "choices", "accuracy", "mean of groups", "mended", "broken")
    for test in settings.tests:
        if test in TESTS:
            make = {"swapped-roles": swapped_roles, "swapped-actions": swapped_actions}[test]
            choices, name = make(captions), test

            def open_image(number: str):
                return split.image(int(number))
        else:
            choices, name = load_choices(test), Path(test).stem

            def open_image(file: str):
                return open_photo(find_file(Path(settings.images), file))

        choices = [choices[i] for i in spaced(len(choices), settings.limit).tolist()]
        if not choices:
            raise AmpError(f"{test}: no choice, expected captions with action triplets; look at the knowledge")
        with terminal.progress(name, "choices") as report:
            results[name] = choose(choices, models, preprocess, open_image, generate, settings.choices_a_batch, report)
        base_right = results[name]["base CLIP"].right
        for method, found in results[name].items():
            changes = [(a, b) for a, b in zip(base_right, found.right, strict=True) if a != b]
            mended = sum(new for _, new in changes)
            table.add_row(name, method, f"{len(found.right):,}", f"{found.accuracy:.1f}", f"{found.group_mean:.1f}",
                          f"{mended:,}", f"{len(changes) - mended:,}")  # fmt: skip
        skipped = results[name]["base CLIP"].skipped
        if skipped:
            terminal.say(f"{name}: {len(skipped):,} photos skipped, first: {next(iter(skipped.items()))}")
    save_choices(settings.out, results)
    PlainConsole().print(table)


if __name__ == "__main__":
    main()
