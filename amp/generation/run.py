"""Knowledge of a captions file: asks what the ladder needs, keeps every reply, and merges when all are there.

``OUT/settings.json`` says what the folder was made with, ``OUT/cache/`` holds the replies, ``OUT/knowledge.jsonl`` and
``OUT/knowledge_provenance.json`` are written last.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from amp.data.captions.base import CaptionedImage, CaptionSource
from amp.data.captions.load import load_captions
from amp.data.captions.splits import normal_split
from amp.data.conversion.sources import source_file
from amp.data.shards import MANIFEST_NAME, ShardManifest
from amp.data.shards.captions import load_shard_captions
from amp.errors import AmpError
from amp.generation.ask import ask_all
from amp.generation.cache import ReplyCache
from amp.generation.engines.base import find_engine
from amp.generation.ladder import Ladder
from amp.generation.language import language_note
from amp.generation.makers import Makers
from amp.generation.merge import Summary, merge_knowledge
from amp.generation.prompts import load_template, readable
from amp.generation.settings import SETTINGS_NAME, Settings
from amp.parts import part_of
from amp.terminal import PlainConsole


def generate_knowledge(
    captions: str,
    out: str,
    engine: str = "rules",
    template: str = "default",
    format: str = "auto",
    default_split: str = "train",
    keep_restval: bool = False,
    splits: list[str] | None = None,
    limit: int | None = None,
    part: str | None = None,
    merge: bool = False,
    retries: int = 2,
    temperature: float = 0.7,
    seed: int = 0,
    fallback: Literal["rules", "none"] = "rules",
    max_fallback: float = 0.05,
    spacy_model: str | None = None,
    cache: str | None = None,
    engine_options: dict[str, Any] | None = None,
    command: list[str] | None = None,
    console: PlainConsole | None = None,
) -> Summary | None:
    """Generates action triplets and states for every caption of a file.

    Args:
        captions: Captions file: a Karpathy JSON, or a CSV or JSONL with image, caption and, if wanted, split; or a
            folder of shards, whose captions get knowledge.
        out: Folder for knowledge.jsonl, knowledge_provenance.json and the replies; made if absent.
        engine: rules (spaCy, no model), transformers (a local or hub model, or a GGUF file), openai (any server of that
            interface, such as vllm serve or llama-server), vllm (in this process), or one of a plugin.
        template: Prompts: default, coco, flickr, or the path of a YAML file.
        format: Format of the captions file: karpathy, csv, jsonl, or one of a plugin; auto goes by its suffix.
        default_split: Split of CSV and JSONL rows that name none.
        keep_restval: Keep Karpathy's restval a split of its own instead of a part of train.
        splits: Splits whose captions get knowledge; all that occur by default.
        limit: Only the first so many different captions.
        part: I/N, from 0/N to N-1/N: ask for the captions of this part, by their hash, and don't merge. Parts may run
            at once, in any order and again; then the command without it does what is missing and merges.
        merge: Only merge; what is missing is an error, and no model is loaded.
        retries: Number of further requests, with temperature, for a caption whose reply can't be used.
        temperature: Temperature of these requests.
        seed: Random seed of these requests.
        fallback: What comes after the last retry: rules, or none (an empty record; a triplet without a state is left
            out).
        max_fallback: Largest fraction of different captions that may have ended with rules or nothing although a model
            was asked; above it nothing is merged.
        spacy_model: spaCy model of the rules; by default the first known one that is installed.
        cache: Folder of replies; OUT/cache by default. Runs may share one.
        engine_options: Options of the engine's class, such as model.
        command: Command line, for the provenance.
        console: Where progress is shown; stderr by default.

    Returns:
        What was merged; None for a part.

    Raises:
        AmpError: Input that can't be used, a model that can't be loaded; replies that came before are kept.
    """
    console = console or PlainConsole(stderr=True)
    find_engine(engine)  # a wrong name is an error before captions are read
    _check_options(retries, temperature, max_fallback, limit)
    if part is not None and merge:
        raise AmpError("part and merge are both given; expected one of them; merge once all parts have ended")
    if merge and not (Path(out) / SETTINGS_NAME).exists():
        raise AmpError(
            f"{out}: no {SETTINGS_NAME} in it; expected a folder in which knowledge was generated; check --out, or run "
            "the parts first"
        )
    index, parts = _share(part)
    with console.progress("reading captions"):
        source = _load(captions, format, default_split, keep_restval)
        digest = source_file(str(Path(captions) / MANIFEST_NAME if Path(captions).is_dir() else captions))["sha256"]
        images = _choose(source.images, splits, captions)
        distinct = list(dict.fromkeys(readable(caption.text) for image in images for caption in image.captions))[:limit]
    for note in source.notes:
        console.print(note, soft_wrap=True)
    for kind, count in Counter(skip.kind for skip in source.skipped).items():
        first = next(skip.reason for skip in source.skipped if skip.kind == kind)
        console.print(f"{captions}: {count:,} skipped: {kind}, first: {first}", soft_wrap=True)
    if engine == "rules" and not merge and (warning := language_note(distinct, "--engine")):
        console.print(f"warning: {warning}", soft_wrap=True)
    out_root = Path(out)
    with console.progress(f"loading {engine}"):
        settings = Settings(
            out_root / SETTINGS_NAME,
            options={
                "engine": engine,
                "fallback": fallback,
                "spacy_model": spacy_model,
                **_reply_options(engine_options),
            },
            makers=Makers(engine, engine_options or {}, fallback, spacy_model),
        )
    ladder = Ladder(
        engine=settings.described["engine"],
        template=load_template(template),
        rules=settings.described["rules"],
        retries=retries,
        temperature=temperature,
        seed=seed,
    )
    settings.check_ladder(ladder)
    name = None if merge else f"replies-{index:05d}-of-{parts:05d}"
    with ReplyCache(Path(cache) if cache else out_root / "cache", name) as replies:
        if replies.damaged:
            console.print(f"{replies.damaged:,} damaged lines in the cache don't count; their captions are asked again")
        if not merge:
            mine = [caption for caption in distinct if _number(caption) % parts == index]
            lost = ask_all(mine, ladder, lambda: settings.makers, replies, console)
            if lost:
                raise AmpError(
                    f"{out_root}: {lost:,} of {len(mine):,} captions have no reply, since the model's server gave none "
                    "within all tries; what came is kept; run the same command again to ask for the rest"
                )
            if parts > 1:
                console.print(
                    f"part {index}/{parts}: all {len(mine):,} captions are done; once every part is, the same command "
                    "without --part merges"
                )
                return None
        with console.progress("merging replies"):
            return merge_knowledge(images, set(distinct), ladder, replies, out_root, max_fallback, digest, command)


def _load(captions: str, format: str, default_split: str, keep_restval: bool) -> CaptionSource:
    if not Path(captions).is_dir():
        return load_captions(captions, format, default_split, keep_restval)
    by_shard = load_shard_captions(ShardManifest.load(captions))
    return CaptionSource([image for images in by_shard.values() for image in images], [])


def _choose(images: list[CaptionedImage], splits: list[str] | None, path: str) -> list[CaptionedImage]:
    known = list(dict.fromkeys(image.split for image in images))
    chosen = {normal_split(split, "--splits", known): split for split in splits or known}
    for name, split in chosen.items():
        if name not in known:
            raise AmpError(f"{path}: no split {split!r}; splits seen: {', '.join(known)}; check --splits")
    return [image for image in images if image.split in chosen]


def _check_options(retries: int, temperature: float, max_fallback: float, limit: int | None) -> None:
    if not 0 <= retries <= 2:
        raise AmpError(f"retries is {retries}; expected 0, 1 or 2")
    if not 0 < temperature <= 2:
        raise AmpError(f"temperature is {temperature}; expected more than 0, at most 2")
    if not 0 <= max_fallback <= 1:
        raise AmpError(f"max_fallback is {max_fallback}; expected a fraction from 0 to 1")
    if limit is not None and limit < 1:
        raise AmpError(f"limit is {limit}; expected at least 1")


def _number(caption: str) -> int:
    """Decides a caption's part, the same on every machine."""
    return int.from_bytes(hashlib.sha256(caption.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def _share(part: str | None) -> tuple[int, int]:
    """(index, parts) of this process: the processes of a launcher divide a part among them."""
    index, parts = part_of(part) if part is not None else (0, 1)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return index * world + rank, parts * world


def _reply_options(options: dict[str, Any] | None) -> dict[str, Any]:
    """The options that decide what a model says; the others may differ from start to start."""
    keys = ("model", "revision", "rendering", "dtype", "constrained")
    return {key: value for key, value in (options or {}).items() if key in keys}
