"""Captions a second of the transformers engine against one `generate` call a caption, in one run.

The plain call gets the whole prompt each time, as a first script would do it. Then come, one after the other, the
prefix that is computed once, full batches, and each different caption only once. All must say the same::

    python tools/measure_generation.py --captions captions.csv --model MODEL --count 64 --out results/generation.json
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

from amp.data.sources import load_captions
from amp.errors import exit_on_error
from amp.generation.engines.base import EngineError, Sampling
from amp.generation.prompts import ask_triplets, load_template, readable


def main(arguments: list[str] | None = None) -> None:
    from jsonargparse import ArgumentParser
    from rich.console import Console
    from rich.table import Table

    parser = ArgumentParser(prog="measure_generation.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--captions", type=str, required=True, help="captions file")
    parser.add_argument("--model", type=str, required=True, help="a local or hub model, or a GGUF file")
    parser.add_argument("--count", type=int, default=64, help="captions, the first of the file, repeated ones included")
    parser.add_argument("--max_tokens", type=int, default=64, help="new tokens a caption at most")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--template", type=str, default="default")
    parser.add_argument("--out", type=str | None, help="JSON file for the figures")
    options = parser.parse_args(arguments)
    with exit_on_error():
        figures = measure(**{key: value for key, value in options.as_dict().items() if key != "out"})
    table = Table("", "seconds", "captions/s", "against the plain call")
    for name, seconds in figures["seconds"].items():
        rate = figures["captions"] / seconds
        table.add_row(name, f"{seconds:.1f}", f"{rate:.2f}", f"{figures['seconds']['plain call'] / seconds:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"{figures['captions']} captions, {figures['different']} different, {figures['prefix_tokens']} shared tokens; "
        f"{figures['same_text']} of {figures['captions']} replies the same in all four"
    )
    if options.out:
        temporary = Path(f"{options.out}.tmp")
        temporary.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, options.out)


def measure(captions: str, model: str, count: int, max_tokens: int, batch_size: int, template: str) -> dict:
    """Times the four ways on the same captions.

    Raises:
        EngineError: the captions file has too few.
    """
    import torch

    from amp.generation.engines.transformers_engine import TransformersEngine

    texts = [readable(c.text) for image in load_captions(captions).images for c in image.captions][:count]
    if len(texts) < count:
        raise EngineError(f"{captions}: {len(texts)} captions; expected at least --count {count}")
    prefix, sampling = load_template(template).triplets, Sampling(max_tokens)
    engine = TransformersEngine(model=model, batch_size=batch_size, constrained=False)
    alone = TransformersEngine(model=model, batch_size=1, constrained=False)
    before, tail = engine.prefix_ids(prefix)

    def plain(captions: list[str]) -> list[str]:
        replies = []
        for caption in captions:
            ids = torch.tensor([before + engine.suffix_ids(ask_triplets(caption)) + tail], device=engine.model.device)
            output = engine.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False,
                eos_token_id=sorted(engine.ends), pad_token_id=min(engine.ends),
            )  # fmt: skip
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

    ways = {"plain call": plain, "+ shared prefix": by(alone), "+ batches": by(engine), "+ each caption once": once}
    seconds, replies = {}, []
    for name, way in ways.items():
        way(texts[:1])  # warm
        start = time.perf_counter()
        replies.append(way(texts))
        seconds[name] = time.perf_counter() - start
    return {
        "model": engine.describe(),
        "captions": count,
        "different": len(set(texts)),
        "max_tokens": max_tokens,
        "batch_size": batch_size,
        "prefix_tokens": len(before),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "seconds": seconds,
        "same_text": sum(len(set(group)) == 1 for group in zip(*replies, strict=True)),
    }


if __name__ == "__main__":
    main()
