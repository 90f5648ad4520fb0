"""Asks which of a photo's captions is right: SugarCrepe, ARO, and captions with swapped roles and actions.

    python launchers/choose.py --config runs/mine/action-aware/config.yaml --adapters '["action-aware=FILE"]' \
        --tests '[swapped-roles, swapped-actions]' --split test --out runs/mine/choices.csv
    python launchers/choose.py --config runs/mine/action-aware/config.yaml --adapters '["action-aware=FILE"]' \
        --tests '[swap_obj.json, replace_rel.json]' --images coco/val2017 --out runs/mine/sugarcrepe.csv

The swapped tests are made from the captions and triplets of the shards. Files are those of SugarCrepe and ARO, with
their photos in a folder; both captions get knowledge from --knowledge, which never sees which one is right.

All inputs are checked before a model is loaded. Entries that can't be used are skipped, up to --max_skipped_entries of
a test, and listed with the reason in OUT's .skipped.csv. OUT is written again after each test; a test that fails leaves
the others alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from amp.errors import AmpError, Problems, exit_on_error

with exit_on_error():
    from amp.command_line import CommandLine
    from amp.train.command import command_line, read_command_line
    from amp.train.config import TrainConfig

if TYPE_CHECKING:
    from PIL import Image

    from amp.evaluate.choice import Choice, Choices


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
        max_skipped_entries: Largest fraction of a test's entries that may be skipped: a caption is empty, a photo is
            missing or can't be read, and the like.
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
    max_skipped_entries: float = 0.01
    out: str = "runs/choices.csv"


def parser() -> CommandLine:
    return command_line(__doc__, ChooseSettings)


@exit_on_error()
def main(arguments: list[str] | None = None) -> None:
    run(*read_command_line(parser(), arguments, ChooseSettings))


class Test(NamedTuple):
    """One test, ready to run.

    Attributes:
        name: As shown.
        choices: That are asked.
        skipped: Why other entries are left out, by entry.
        open_image: A choice's `image` to the photo.
    """

    name: str
    choices: "list[Choice]"
    skipped: dict[str, str]
    open_image: "Callable[[str], Image.Image]"


def run(settings: ChooseSettings, config: TrainConfig) -> None:
    """Runs all tests and prints a table."""
    from amp.device import usable_device
    from amp.evaluate.adapters import load_adapters, named_adapters
    from amp.evaluate.choice import choose, save_choices, save_skipped
    from amp.evaluate.swaps import TESTS
    from amp.files import check_writable
    from amp.generation.query import KnowledgeGenerator
    from amp.model.factory import create_model_and_transforms
    from amp.terminal import Terminal

    out = Path(settings.out)
    lists = out.with_suffix(".skipped.csv")
    terminal, problems, named, generate = Terminal(True), Problems(), {}, None
    with problems.collect():
        named = named_adapters(settings.adapters)
        if not named:
            raise AmpError("adapters is empty, expected one at least; add --adapters '[NAME=FILE]'")
    with terminal.progress("reading tests"):
        tests = read_tests(settings, config, problems)
    with problems.collect():
        if settings.knowledge != "none" and any(test not in TESTS for test in settings.tests):
            generate = KnowledgeGenerator(settings.knowledge, engine_options=settings.engine_options)
    with problems.collect():
        check_writable(out, lists)
    problems.check()

    skipped = {test.name: test.skipped for test in tests if test.skipped}
    for name, reasons in skipped.items():
        first = "; ".join(f"{entry}: {reason}" for entry, reason in list(reasons.items())[:3])
        terminal.say(f"{name}: {len(reasons):,} entries skipped, listed in {lists}; first: {first}")
    save_skipped(lists, skipped)
    with terminal.progress(f"loading {config.model.name}"):
        base, _, preprocess = create_model_and_transforms(
            config.model.name,
            config.model.pretrained,
            precision=config.model.precision,
            device=usable_device(),
            prompt_config=config.prompt,
            image_resize_mode=config.model.resize_mode,
        )
        models = load_adapters(base, config.model.name, named)
    results: dict[str, dict[str, Choices]] = {}
    failed = Problems()
    try:
        for test in tests:
            try:
                with terminal.progress(test.name, "choices") as report:
                    found = choose(
                        test.choices,
                        models,
                        preprocess,
                        test.open_image,
                        generate,
                        settings.choices_a_batch,
                        report,
                        settings.max_skipped_entries,
                    )
            except AmpError as error:  # the other tests don't depend on it
                failed.found.append(f"test {test.name}: {error}")
                terminal.say(f"{test.name} failed, going on with the next test: {error}")
                continue
            results[test.name] = found
            save_choices(out, results)
            if unreadable := found["base CLIP"].skipped:
                skipped.setdefault(test.name, {}).update(unreadable)
                save_skipped(lists, skipped)
                terminal.say(
                    f"{test.name}: {len(unreadable):,} photos skipped, listed in {lists}; first: "
                    f"{': '.join(next(iter(unreadable.items())))}"
                )
    finally:  # also of a run that is stopped
        if results:
            print_table(results)
            terminal.say(f"{out} holds {len(results)} of {len(tests)} tests")
    failed.check()


def read_tests(settings: ChooseSettings, config: TrainConfig, problems: Problems) -> list[Test]:
    """All tests with the entries that can be used, found without a model; what is wrong goes to `problems`."""
    from amp.data.images.file import open_photo
    from amp.data.images.names import find_file
    from amp.data.split import ShardSplit
    from amp.data.split_captions import SplitCaptions
    from amp.evaluate.choice import check_skipped, load_choices
    from amp.evaluate.swaps import TESTS, swapped_actions, swapped_roles
    from amp.retrieval.split_search import spaced

    names = [test if test in TESTS else Path(test).stem for test in settings.tests]
    swapped = [test for test in settings.tests if test in TESTS]
    images = Path(settings.images) if settings.images is not None else None
    with problems.collect():
        check(settings, names)
    with problems.collect():
        if len(swapped) < len(names) and (images is None or not images.is_dir()):
            raise AmpError(
                f"images is {settings.images!r}, expected the folder of the photos of the JSON files in tests; "
                "give it with --images"
            )
    split = captions = None
    with problems.collect():
        if swapped:
            split = ShardSplit(config.data.shards, settings.split)
            captions = SplitCaptions.read(split, config.data.kinds)
    tests: list[Test] = []

    def from_shards(number: str) -> "Image.Image":
        assert split is not None, "read before the captions"
        return split.image(int(number))

    def from_folder(file: str) -> "Image.Image":
        assert images is not None, "files need a folder"
        return open_photo(find_file(images, file))

    for given, name in zip(settings.tests, names, strict=True):
        with problems.collect():
            skipped: dict[str, str] = {}
            if given not in TESTS:
                choices, skipped = load_choices(given, images if images is not None and images.is_dir() else None)
                reasons = [f"{entry}: {reason}" for entry, reason in skipped.items()]
                check_skipped(given, reasons, len(choices) + len(skipped), settings.max_skipped_entries)
            elif captions is None:
                continue  # the shards' own error says why
            else:
                choices = {"swapped-roles": swapped_roles, "swapped-actions": swapped_actions}[given](captions)
            if skipped and not choices:
                raise AmpError(f"{given}: none of {len(skipped):,} entries can be used; first: {reasons[0]}")
            if not choices:
                raise AmpError(f"{given}: no choice, expected captions with action triplets; look at the knowledge")
            choices = [choices[i] for i in spaced(len(choices), settings.limit).tolist()]
            tests.append(Test(name, choices, skipped, from_shards if given in TESTS else from_folder))
    return tests


def check(settings: ChooseSettings, names: list[str]) -> None:
    """Raises AmpError for settings that can't be."""
    if not names:
        raise AmpError("tests is empty, expected one at least; add --tests '[FILE.json]'")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AmpError(f"tests has more than one named {twice[0]!r}, expected different names; rename a file")
    for key, least in (("limit", 0), ("choices_a_batch", 1)):
        if getattr(settings, key) < least:
            raise AmpError(f"{key} is {getattr(settings, key)}, expected at least {least}")
    if not 0 <= settings.max_skipped_entries <= 1:
        raise AmpError(f"max_skipped_entries is {settings.max_skipped_entries}, expected a fraction from 0 to 1")


def print_table(results: "dict[str, dict[str, Choices]]") -> None:
    """One line per test and method."""
    from rich.table import Table

    from amp.terminal import PlainConsole

    table = Table("test", "method", "choices", "accuracy", "mean of groups", "mended", "broken")
    for test, methods in results.items():
        base_right = methods["base CLIP"].right
        for method, found in methods.items():
            changes = [(a, b) for a, b in zip(base_right, found.right, strict=True) if a != b]
            mended = sum(new for _, new in changes)
            table.add_row(
                test,
                method,
                f"{len(found.right):,}",
                f"{found.accuracy:.1f}",
                f"{found.group_mean:.1f}",
                f"{mended:,}",
                f"{len(changes) - mended:,}",
            )
    PlainConsole().print(table)


if __name__ == "__main__":
    main()
