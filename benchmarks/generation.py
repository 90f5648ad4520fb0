"""Captions per second of the transformers engine, compared with one `generate` call per caption.

The plain call processes the whole prompt each time, like a simple script. The other methods add, one after the other, a
prefix that is computed once, batches, and processing each distinct caption only once. All replies must be equal.
"""

from collections.abc import Callable

import torch

from amp.generation.engines.base import Sampling
from amp.generation.engines.transformers_engine import TransformersEngine
from amp.generation.prompts import ask_triplets, load_template
from benchmarks.models import drawn_captions
from benchmarks.settings import Settings
from benchmarks.tables import spread, table
from benchmarks.timing import in_turns, medians, ratio, rounded

PLAIN, PREFIX, BATCHES, ONCE = "plain call", "+ shared prefix", "+ batches", "+ each caption once"


def run(settings: Settings, captions: list[str] | None = None) -> dict:
    """Times the four methods on the same captions, by default random ones without duplicates."""
    texts = captions or drawn_captions(settings.captions, 1)[0]
    prefix, sampling = load_template().triplets, Sampling(settings.max_tokens)
    engine = TransformersEngine(model=settings.language_model, batch_size=settings.generation_batch, constrained=False)
    alone = TransformersEngine(model=settings.language_model, batch_size=1, constrained=False)
    before, tail = engine.prefix_ids(prefix)

    def plain(captions: list[str]) -> list[str]:
        replies = []
        for caption in captions:
            ids = torch.tensor([before + engine.suffix_ids(ask_triplets(caption)) + tail], device=engine.model.device)
            output = engine.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=settings.max_tokens,
                do_sample=False,
                eos_token_id=sorted(engine.ends),
                pad_token_id=min(engine.ends),
            )
            replies.append(engine.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
        return replies

    def by(engine: TransformersEngine) -> Callable[[list[str]], list[str]]:
        def run(captions: list[str]) -> list[str]:
            found = dict(engine.generate(prefix, [ask_triplets(caption) for caption in captions], None, sampling))
            return [found[number].text for number in range(len(captions))]

        return run

    def once(captions: list[str]) -> list[str]:
        different = list(dict.fromkeys(captions))
        found = dict(zip(different, by(engine)(different), strict=True))
        return [found[caption] for caption in captions]

    replies: dict[str, list[str]] = {}

    def timed(name: str, way: Callable[[list[str]], list[str]]) -> Callable[[], int]:
        asked = texts[: settings.naive_captions] if name in (PLAIN, PREFIX) else texts

        def work() -> int:
            replies[name] = way(asked)
            return len(asked)

        return work

    ways = {PLAIN: plain, PREFIX: by(alone), BATCHES: by(engine), ONCE: once}
    for way in ways.values():
        way(texts[:1])  # warms up
    rates = in_turns(
        {name: timed(name, way) for name, way in ways.items()}, settings.model_rounds, settings.device, warm=False
    )
    return {
        "model": engine.describe(),
        "captions": len(texts),
        "different": len(set(texts)),
        "batch": settings.generation_batch,
        "max_tokens": settings.max_tokens,
        "prefix_tokens": len(before),
        "asked_one_at_a_time": len(replies[PLAIN]),
        "captions_per_second": medians(rates),
        "ratio": {f"{name} / {PLAIN}": rounded(ratio(rates, name, PLAIN)) for name in rates if name != PLAIN},
        "same_text": sum(len(set(group)) == 1 for group in zip(*replies.values(), strict=False)),
    }


def generations(figures: dict) -> list[str]:
    rows = [
        [name, spread(rate), figures["ratio"].get(f"{name} / plain call")]
        for name, rate in figures["captions_per_second"].items()
    ]
    return table(["", "captions/s", "speedup over the plain call"], rows)


TABLES = {"generation": generations}
