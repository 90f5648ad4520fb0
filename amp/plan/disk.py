"""Checks whether the disks have space for the files of a run."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from amp.model.clip import ActionAwareCLIP
from amp.plan.data import Dataset
from amp.plan.findings import Finding, error, in_bytes, note, ok, warning
from amp.train.config import TrainConfig


def check_disk(data: Dataset, config: TrainConfig, model: ActionAwareCLIP, trained: int) -> Iterator[Finding]:
    """Checks free space for the files of a run.

    Args:
        data: Data of the run.
        config: Settings of the run.
        model: Model of the run.
        trained: Number of trained parameters of the largest stage.
    """
    backbone, prompt = model.backbone, config.prompt
    adapter = 4 * sum(value.numel() for value in model.adapter_state().values())
    checkpoint, count = adapter + 8 * trained, len(config.stages) * config.checkpoint.keep + 1
    number = 2 if config.data.cache_dtype == "float16" else 4
    base, early = 4 * backbone.embed_dim, number * backbone.num_tokens * backbone.vision_width
    parts = [part for part in (data.train, data.val) if part is not None]
    stored = parts if config.data.cache_texts else parts[1:]
    texts = sum(part.captions for part in stored) * (1 + (data.triplets if prompt.reads_states else 0))
    cached = {"texts": texts * (number * backbone.embed_dim + 8)}
    if data.val is not None:
        cached["validation images"] = data.val.images * (base + early)
    if config.data.cache_images:
        cached["training images"] = data.train.images * (base + early)
    elif config.mined_group > 1:
        cached["training images"] = data.train.images * base
    wanted = {config.out: count * checkpoint + 2 * adapter, config.data.cache: sum(cached.values())}
    said = {
        config.out: f"{count} checkpoints of {in_bytes(checkpoint)}, one of them being written, and the adapters",
        config.data.cache: "at most: " + ", ".join(f"{what} {in_bytes(size)}" for what, size in cached.items()),
    }
    for path, size in wanted.items():
        text = f"{path}: {in_bytes(size)} ({said[path]})"
        if data.simulated:
            yield note(text)
            continue
        place = existing(path)
        shared = [other for other in wanted if existing(other).stat().st_dev == place.stat().st_dev]
        free, needed = shutil.disk_usage(place).free, sum(wanted[other] for other in shared)
        text += f"; {in_bytes(free)} are free" + (f" for {' and '.join(shared)}" if len(shared) > 1 else "")
        if free >= needed:
            yield ok(text)
        elif Path(config.data.cache).exists() and free >= wanted[config.out]:
            yield warning(f"{text}; this is enough only if most of the cache exists already; otherwise make room")
        else:
            yield error(f"{text}; make room, or give another --out or --data.cache")
    if data.simulated and config.data.val_split and config.validate_every:
        yield note(f"{config.data.cache}: {in_bytes(base + early)} more per validation image")


def existing(path: str) -> Path:
    """The nearest existing parent folder of a path."""
    absolute = Path(path).absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.exists())
