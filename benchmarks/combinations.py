"""Scores combinations of a language model's triplets with those of the rules, on the captions that both files have.

python -m benchmarks.combinations --rules runs/gold/rules/knowledge.jsonl --model runs/gold/qwen/knowledge.jsonl
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from amp.errors import AmpError, exit_on_error

with exit_on_error():
    from jsonargparse import auto_cli

    from amp.data.captions.text_file import jsonl_objects
    from amp.generation.score import load_gold, matches, score_triplets, verb
    from amp.generation.states import plain_verb
    from amp.knowledge.schema import Knowledge, Triplet, parse_knowledge

Triplets = Sequence[Triplet]


def added(rules: Triplets, model: Triplets, allowed: Callable[[Triplet], bool]) -> list[Triplet]:
    """The rules' triplets, and those of the model that are allowed and match none before them."""
    found = list(rules)
    for triplet in model:
        if allowed(triplet) and not any(matches(triplet, other) for other in found):
            found.append(triplet)
    return found


def new_verbs(rules: Triplets, model: Triplets) -> list[Triplet]:
    known = {verb(triplet.action) for triplet in rules}
    return added(rules, model, lambda t: t.kind == "action" and verb(t.action) not in known)


def known_verbs(rules: Triplets, model: Triplets) -> list[Triplet]:
    return new_verbs(rules, [triplet for triplet in model if plain_verb(triplet.action.split()[0]) is not None])


def agreed(rules: Triplets, model: Triplets) -> list[Triplet]:
    seen = {verb(triplet.action) for triplet in model}
    return [t for t in rules if t.kind == "attribute" or verb(t.action) in seen]


COMBINATIONS: dict[str, Callable[[Triplets, Triplets], Triplets]] = {
    "rules": lambda rules, model: rules,
    "model": lambda rules, model: model,
    "both": lambda rules, model: added(rules, model, lambda t: True),
    "rules, and the model's actions": lambda rules, model: added(rules, model, lambda t: t.kind == "action"),
    "rules, and the model's actions with new verbs": new_verbs,
    "rules, and the model's actions with new verbs that the lexicon of states knows": known_verbs,
    "rules, and the model's actions where they have none": lambda rules, model: added(
        rules, model, lambda t: t.kind == "action" and all(own.kind != "action" for own in rules)
    ),
    "the model only where the rules find nothing": lambda rules, model: rules or model,
    "rules, without actions whose verb the model lacks": agreed,
}


def main(rules: Path, model: Path) -> None:
    """Prints precision, recall and F1 (lenient, with its 95 % interval) of each combination.

    Args:
        rules: `knowledge.jsonl` by the rules.
        model: `knowledge.jsonl` by a language model.
    """
    first, second = read(rules), read(model)
    gold = [label for label in load_gold() if label.caption in first and label.caption in second]
    if not gold:
        raise AmpError(f"{rules} and {model} share no labelled caption, expected both to have some")
    print(f"{len(gold)} captions\nprecision  recall  F1")
    for name, combine in COMBINATIONS.items():
        found = [combine(first[label.caption], second[label.caption]) for label in gold]
        score = score_triplets([Knowledge(tuple(triplets), ("",) * len(triplets)) for triplets in found], gold)
        low, high = score.interval
        print(f"{score.precision:9.3f}  {score.recall:6.3f}  {score.f1:.3f} ({low:.3f} - {high:.3f})  {name}")


def read(path: Path) -> dict[str, Triplets]:
    """Triplets by caption."""
    records = ((record, f"{path} line {number}") for number, record in jsonl_objects(path))
    return {record["caption"]: parse_knowledge(record, where).triplets for record, where in records}


if __name__ == "__main__":
    with exit_on_error():
        auto_cli(main, as_positional=False)
