"""Counts captions and knowledge texts that are longer than the text tower reads."""

from collections.abc import Iterator

from amp.data.text_features import cut_texts
from amp.knowledge.text import tower_texts
from amp.model.factory import get_tokenizer
from amp.plan.data import Dataset
from amp.plan.findings import Finding, counted, note, ok, warning
from amp.train.config import TrainConfig

TEXT_IMAGES = 1_000  # images per split whose texts are counted


def check_texts(data: Dataset, config: TrainConfig, length: int) -> Iterator[Finding]:
    """Counts captions and knowledge texts of a sample of images that are longer than the text tower reads."""
    if data.simulated:
        return
    try:
        tokenizer = get_tokenizer(config.model.name)
    except OSError as problem:  # from transformers, if the tokenizer is not on this machine
        yield note(f"long texts are not counted: {str(problem).strip().splitlines()[0][:200]}")
        return
    texts: dict[str, list[str]] = {"captions": [], "texts of knowledge": []}
    images = 0
    for split in data.splits:
        for index in range(0, len(split), -(-len(split) // TEXT_IMAGES)):
            images += 1
            for caption, knowledge in split.captions(split.record(index), config.data.kinds):
                texts["captions"].append(caption)
                texts["texts of knowledge"] += tower_texts(
                    knowledge, config.prompt.max_triplets, config.prompt.knowledge
                )
    cut = {kind: cut_texts(found, tokenizer, length) for kind, found in texts.items()}
    counts = " and ".join(f"{cut[kind]:,} of {len(found):,} {kind}" for kind, found in texts.items() if found)
    text = f"{counts} of {counted(images, 'image')} are longer than {length} tokens"
    if any(number > 0.01 * len(texts[kind]) for kind, number in cut.items()):
        yield warning(f"{text} and are cut off there; shorten them, or use a model with a longer context")
    else:
        yield ok(text)
