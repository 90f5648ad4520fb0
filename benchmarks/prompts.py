"""Chooses prompts: F1 of the triplets and share of good states of each template, on captions that no figure uses.

    python -m benchmarks.prompts --engine transformers --model MODEL --templates '[null, mine.yaml]'

Each caption gets one request for triplets, decoded greedily without retries, and one for the states of its labelled
triplets, so that the second does not depend on the reply to the first.
"""

import time
from pathlib import Path
from typing import Any

from amp.errors import AmpError, exit_on_error

with exit_on_error():
    from jsonargparse import auto_cli

    from amp.generation.engines.base import Engine, Sampling, find_engine
    from amp.generation.grammar import Grammar, StateGrammar, TripletGrammar
    from amp.generation.ladder import MAX_TOKENS
    from amp.generation.prompts import Template, ask_states, ask_triplets, load_template, readable
    from amp.generation.replies import MAX_STATE_CHARACTERS, MAX_TRIPLETS, read_states, read_triplets
    from amp.generation.score import GoldCaption, good_states, load_gold, score_triplets
    from amp.generation.words import slot_words
    from amp.knowledge.schema import Knowledge

DEVELOPMENT = Path(__file__).with_name("development.yaml")


def main(
    engine: str,
    model: str,
    templates: list[str | None],
    options: dict[str, Any] | None = None,
    labels: Path = DEVELOPMENT,
    states: bool = True,
) -> None:
    """Prints a row of figures for each template.

    Args:
        engine: Name of the engine, as in `amp generate_knowledge`.
        model: The model.
        templates: YAML files of prompts; null is this project's file.
        options: Options of the engine's class, such as `{"dtype": "float32"}`.
        labels: Labelled captions. Those of the gold file are only for the final figures.
        states: Whether states are asked for too.
    """
    kind = find_engine(engine)
    if kind is None:
        raise AmpError("engine is 'rules', which reads no template; expected another engine")
    read = [load_template(name) for name in templates]
    loaded, gold = kind(model=model, **(options or {})), load_gold(labels)
    print(f"{len(gold)} captions\nF1     actions  attributes  precision  recall  states  seconds  template")
    for name, template in zip(templates, read, strict=True):
        begin = time.perf_counter()
        found = triplets_of(loaded, template, gold)
        score = score_triplets(found, gold)
        kinds = [score_triplets(found, gold, kind=part).f1 for part in ("action", "attribute")]
        good = good_states_of(loaded, template, gold) if states else float("nan")
        figures = f"{score.f1:.3f}  {kinds[0]:7.3f}  {kinds[1]:10.3f}  {score.precision:9.3f}  {score.recall:6.3f}"
        print(f"{figures}  {good:6.3f}  {time.perf_counter() - begin:7.0f}  {name}", flush=True)


def triplets_of(engine: Engine, template: Template, gold: list[GoldCaption]) -> list[Knowledge]:
    captions = [readable(label.caption) for label in gold]
    grammars: list[Grammar] = [TripletGrammar(slot_words(caption), MAX_TRIPLETS) for caption in captions]
    replies = ask(engine, template.triplets, [ask_triplets(caption) for caption in captions], grammars, "triplets")
    found = [read_triplets(reply, caption).triplets for reply, caption in zip(replies, captions, strict=True)]
    return [Knowledge(triplets, ("",) * len(triplets)) for triplets in found]


def good_states_of(engine: Engine, template: Template, gold: list[GoldCaption]) -> float:
    labels = [label for label in gold if label.triplets]
    suffixes = [ask_states(readable(label.caption), label.triplets) for label in labels]
    grammars: list[Grammar] = [StateGrammar(len(label.triplets), MAX_STATE_CHARACTERS) for label in labels]
    good = []
    for label, reply in zip(labels, ask(engine, template.states, suffixes, grammars, "states"), strict=True):
        states = tuple(text or "" for text, _ in read_states(reply, len(label.triplets)))
        good += good_states(Knowledge(label.triplets, states), label.caption)
    return sum(good) / max(len(good), 1)


def ask(engine: Engine, prefix, suffixes: list[str], grammars: list[Grammar], stage: str) -> list[str]:
    """The replies in the order of the requests."""
    rules = grammars if engine.constrained else None
    completions = dict(engine.generate(prefix, suffixes, rules, Sampling(MAX_TOKENS[stage])))
    return [completions[number].text for number in range(len(suffixes))]


if __name__ == "__main__":
    with exit_on_error():
        auto_cli(main, as_positional=False)
