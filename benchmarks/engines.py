"""Captions per second of a language model in one engine, and how many of its replies equal those of another engine.

    python -m benchmarks.engines --engine transformers --model MODEL --out runs/engines/transformers.json
    .venv-vllm/bin/python -m benchmarks.engines --engine vllm --model MODEL --against runs/engines/transformers.json

Each caption of the gold file gets both requests, decoded greedily: the triplets, and the states of the labelled
triplets (so that the second request does not depend on the reply to the first).
"""

import json
import time
from pathlib import Path
from typing import Any

from amp.errors import AmpError, exit_on_error

with exit_on_error():
    from jsonargparse import auto_cli

    from amp.files import write_atomically
    from amp.generation.engines.base import Engine, Sampling, find_engine
    from amp.generation.grammar import StateGrammar, TripletGrammar
    from amp.generation.ladder import MAX_TOKENS
    from amp.generation.prompts import ask_states, ask_triplets, load_template, readable
    from amp.generation.replies import MAX_STATE_CHARACTERS, MAX_TRIPLETS
    from amp.generation.score import load_gold
    from amp.generation.words import slot_words

Replies = dict[str, dict[int, str]]


def main(
    engine: str,
    model: str,
    options: dict[str, Any] | None = None,
    limit: int | None = None,
    against: Path | None = None,
    out: Path = Path("runs/engine.json"),
) -> None:
    """Measures one engine.

    Args:
        engine: Name of the engine, as in `amp generate_knowledge`.
        model: The model.
        options: Options of the engine's class, such as `{"dtype": "float32"}`.
        limit: Number of captions; null takes all.
        against: Output of another run, whose replies are compared.
        out: File of the figures and the replies.
    """
    begin = time.perf_counter()
    kind = find_engine(engine)
    if kind is None:
        raise AmpError("engine is 'rules', which is no language model; expected another engine")
    loaded = kind(model=model, **(options or {}))
    found: dict[str, Any] = {"engine": loaded.describe(), "loading_s": round(time.perf_counter() - begin, 1)}
    replies: Replies = {}
    list(_ask(loaded, "triplets", 1))  # the first request compiles and fills caches
    for stage in ("triplets", "states"):
        begin = time.perf_counter()
        completions = dict(_ask(loaded, stage, limit))
        seconds = time.perf_counter() - begin
        replies[stage] = {number: completion.text for number, completion in sorted(completions.items())}
        tokens = sum(completion.tokens for completion in completions.values())
        read = sum(completion.prompt_tokens for completion in completions.values())
        found[stage] = {
            "captions": len(completions),
            "seconds": round(seconds, 1),
            "captions_per_s": round(len(completions) / seconds, 3),
            "tokens_per_caption": round(tokens / len(completions), 1),
            "prompt_tokens_per_caption": round(read / len(completions), 1),
        }
    if against is not None:
        other = json.loads(against.read_text())["replies"]
        for stage, texts in replies.items():
            same = [text == other[stage].get(str(number)) for number, text in texts.items()]
            found[stage]["same_replies"] = sum(same)
    for stage in replies:
        print(stage, found[stage], flush=True)
    write_atomically(out, (json.dumps({**found, "replies": replies}, indent=1) + "\n").encode())


def _ask(engine: Engine, stage: str, limit: int | None):
    template, labels = load_template(), load_gold()[:limit]
    captions = [readable(label.caption) for label in labels]
    triplets = [label.triplets or label.optional for label in labels]
    if stage == "triplets":
        prefix, suffixes = template.triplets, [ask_triplets(caption) for caption in captions]
        rules: list = [TripletGrammar(slot_words(caption), MAX_TRIPLETS) for caption in captions]
    else:
        kept = [(caption, found) for caption, found in zip(captions, triplets, strict=True) if found]
        prefix, suffixes = template.states, [ask_states(caption, found) for caption, found in kept]
        rules = [StateGrammar(len(found), MAX_STATE_CHARACTERS) for _, found in kept]
    return engine.generate(prefix, suffixes, rules if engine.constrained else None, Sampling(MAX_TOKENS[stage]))


if __name__ == "__main__":
    with exit_on_error():
        auto_cli(main, as_positional=False)
