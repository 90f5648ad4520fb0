"""Runs caption-choice tests: reads the tests, scores the models, and saves each test when it is done."""

from pathlib import Path

from amp.device import usable_device
from amp.errors import AmpError, Problems
from amp.evaluate.adapters import Adapter, base_of, load_adapters, load_base, read_adapters
from amp.evaluate.choice import Choices, choose
from amp.evaluate.choice_results import print_choices, save_choices, save_skipped
from amp.evaluate.choice_settings import ChooseSettings
from amp.evaluate.choice_tests import read_tests
from amp.evaluate.foil_choices import FOILS
from amp.evaluate.swaps import TESTS
from amp.files import check_writable
from amp.generation.query import KnowledgeGenerator
from amp.retrieval.figures import BASE
from amp.terminal import PlainConsole, Terminal


def run(settings: ChooseSettings) -> None:
    """Runs all tests and prints a table."""
    out = Path(settings.out)
    lists = out.with_suffix(".skipped.csv")
    terminal, problems, generate = Terminal(True), Problems(), None
    adapters: dict[str, Adapter] = {}
    with problems.collect():
        adapters = read_adapters(settings.adapters)
        if not adapters:
            raise AmpError("adapters is empty, expected at least one; add --adapters NAME=FILE")
        model = base_of(settings.model, adapters)
    with terminal.progress("reading tests"):
        tests = read_tests(settings, adapters, problems)
    with problems.collect():
        if settings.knowledge != "none" and any(test not in (*TESTS, FOILS) for test in settings.tests):
            generate = KnowledgeGenerator(settings.knowledge, engine_options=settings.engine_options)
    with problems.collect():
        check_writable(out, lists)
    problems.check()

    skipped = {test.name: test.skipped for test in tests if test.skipped}
    for name, reasons in skipped.items():
        first = "; ".join(f"{entry}: {reason}" for entry, reason in list(reasons.items())[:3])
        terminal.say(f"{name}: {len(reasons):,} entries skipped, listed in {lists}; first: {first}")
    save_skipped(lists, skipped)
    with terminal.progress(f"loading {model.name}"):
        base, _, preprocess = load_base(model, usable_device())
        models = load_adapters(base, str(model.name), adapters)
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
            except AmpError as error:  # the other tests can still run
                failed.found.append(f"test {test.name}: {error}")
                terminal.say(f"{test.name} failed, continuing with the next test: {error}")
                continue
            results[test.name] = found
            save_choices(out, results)
            if unreadable := found[BASE.method].skipped:
                skipped.setdefault(test.name, {}).update(unreadable)
                save_skipped(lists, skipped)
                terminal.say(
                    f"{test.name}: {len(unreadable):,} photos skipped, listed in {lists}; first: "
                    f"{': '.join(next(iter(unreadable.items())))}"
                )
    finally:  # also if the run is stopped
        if results:
            print_choices(results, PlainConsole())
            terminal.say(f"{out} contains {len(results)} of {len(tests)} tests")
    failed.check()
