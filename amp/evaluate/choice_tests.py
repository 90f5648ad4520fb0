"""Reads caption-choice tests from files, or makes them from shards by swapping roles or actions in captions."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from amp.data.images.file import open_photo
from amp.data.images.names import find_file
from amp.data.split import ShardSplit
from amp.data.split_captions import SplitCaptions
from amp.errors import AmpError, Problems
from amp.evaluate.adapters import Adapter, kinds_of, shards_of
from amp.evaluate.choice import Choice, check_skipped
from amp.evaluate.choice_files import load_choices
from amp.evaluate.choice_settings import ChooseSettings
from amp.evaluate.foil_choices import FOILS, foil_choices
from amp.evaluate.swaps import TESTS, swapped_actions, swapped_roles
from amp.retrieval.split_search import spaced


class Test(NamedTuple):
    """One test, ready to run.

    Attributes:
        name: Name in tables and files.
        choices: Choices to score.
        skipped: Entries that are left out, with the reason.
        open_image: Returns the photo for the `image` of a choice.
    """

    name: str
    choices: list[Choice]
    skipped: dict[str, str]
    open_image: Callable[[str], Image.Image]


def read_tests(settings: ChooseSettings, adapters: dict[str, Adapter], problems: Problems) -> list[Test]:
    """Returns the tests with their usable entries. No model is loaded. Errors are added to `problems`."""
    own = (*TESTS, FOILS)
    names = [test if test in own else Path(test).stem for test in settings.tests]
    made = [test for test in settings.tests if test in own]
    images = Path(settings.images) if settings.images is not None else None
    with problems.collect():
        check(settings, names)
    with problems.collect():
        if len(made) < len(names) and (images is None or not images.is_dir()):
            raise AmpError(
                f"images is {settings.images!r}, expected the folder of the photos of the JSON files in tests; "
                "give it with --images"
            )
    split = captions = None
    with problems.collect():
        if made:
            split = ShardSplit(shards_of(settings.shards, adapters), settings.split)
            kinds = kinds_of(settings.kinds, adapters)
            captions = SplitCaptions.read(split, kinds)
    tests: list[Test] = []

    def from_shards(number: str) -> Image.Image:
        assert split is not None, "the captions were read from it"
        return split.image(int(number))

    def from_folder(file: str) -> Image.Image:
        assert images is not None, "a missing folder is an error"
        return open_photo(find_file(images, file))

    for given, name in zip(settings.tests, names, strict=True):
        with problems.collect():
            skipped: dict[str, str] = {}
            if given not in own:
                choices, skipped = load_choices(given, images if images is not None and images.is_dir() else None)
                reasons = [f"{entry}: {reason}" for entry, reason in skipped.items()]
                check_skipped(given, reasons, len(choices) + len(skipped), settings.max_skipped_entries)
            elif split is None or captions is None:
                continue  # the error about the shards was collected above
            elif given == FOILS:
                choices = foil_choices(split, kinds)
                if not choices:
                    raise AmpError(
                        f"{split.root}: has no foils, expected shards with some; run amp generate_knowledge --foils "
                        "true and amp rewrite_knowledge"
                    )
            else:
                choices = {"swapped-roles": swapped_roles, "swapped-actions": swapped_actions}[given](captions)
            if skipped and not choices:
                raise AmpError(f"{given}: none of {len(skipped):,} entries can be used; first: {reasons[0]}")
            if not choices:
                raise AmpError(f"{given}: no choices, expected captions with action triplets; check the knowledge")
            choices = [choices[i] for i in spaced(len(choices), settings.limit).tolist()]
            tests.append(Test(name, choices, skipped, from_shards if given in own else from_folder))
    return tests


def check(settings: ChooseSettings, names: list[str]) -> None:
    """Raises `AmpError` for invalid settings."""
    if not names:
        raise AmpError("tests is empty, expected at least one; add --tests FILE.json")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AmpError(f"tests has more than one named {twice[0]!r}, expected unique names; rename a file")
    for key, least in (("limit", 0), ("choices_a_batch", 1)):
        if getattr(settings, key) < least:
            raise AmpError(f"{key} is {getattr(settings, key)}, expected at least {least}")
    if not 0 <= settings.max_skipped_entries <= 1:
        raise AmpError(f"max_skipped_entries is {settings.max_skipped_entries}, expected a fraction from 0 to 1")
