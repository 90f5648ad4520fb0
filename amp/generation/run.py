"""Generates the knowledge of a captions file: requests and stores the model's replies, then merges them.

`OUT/settings.json` records the settings of the folder and `OUT/cache/` holds the replies. `OUT/knowledge.jsonl` and
`OUT/knowledge_provenance.json` are written last.
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
from amp.generation.foils import write_foils
from amp.generation.ladder import Ladder
from amp.generation.language import language_note
from amp.generation.makers import Makers
from amp.generation.merge import Summary, merge_knowledge
from amp.generation.prompts import load_template, readable
from amp.generation.rules import RuleTriplets
from amp.generation.settings import SETTINGS_NAME, Settings
from amp.parts import part_of
from amp.terminal import PlainConsole


def generate_knowledge(
    captions: str,
    out: str,
    engine: str = "rules",
    triplets: Literal["engine", "rules"] = "engine",
    foils: bool = False,
    template: str | None = None,
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
        captions: Captions file: a Karpathy JSON, COCO's annotations, a JSON list, or a CSV, JSONL, token or Parquet
            file; or datasets:NAME (a folder or a dataset of the Hugging Face hub); or a folder of shards.
        out: Folder for knowledge.jsonl, knowledge_provenance.json and the replies; created if it does not exist.
        engine: rules (spaCy, no model), transformers (a local or hub model, or a GGUF file), openai (any server with
            OpenAI's API, such as vllm serve or llama-server), vllm (in this process), or an engine of a plugin.
        triplets: Who writes the triplets: the engine, or the rules, so that a model writes only states. Small models
            write worse triplets than the rules.
        foils: Also write foils: false captions that differ from a caption in who does what, or in one word, with
            knowledge of their own. The rules write their texts, and the engine writes their knowledge.
        template: YAML file of prompts, in the form of amp/generation/prompts.yaml; null takes that file.
        format: Format of the captions file: karpathy, csv, jsonl, or a format of a plugin; auto uses the file's suffix.
        default_split: Split of CSV and JSONL rows that don't name one.
        keep_restval: Keep Karpathy's restval as a split of its own instead of adding it to train.
        splits: Splits whose captions get knowledge; null takes all splits of the file.
        limit: Number of distinct captions to use, from the start of the file; null uses all.
        part: I/N, from 0/N to N-1/N: generate only the captions of this part, chosen by their hash, and don't merge.
            Parts may run in parallel, in any order and repeatedly. Afterwards, run the command without this option; it
            generates what is missing and merges.
        merge: Only merge, without loading a model; a missing reply is an error.
        retries: Number of further requests, at the given temperature, for a caption whose reply can't be used: 0, 1 or
            2.
        temperature: Temperature of the retries; the first request is greedy.
        seed: Random seed of the retries.
        fallback: What to use if the last retry fails too: rules, or none (an empty record; a triplet without a state is
            dropped).
        max_fallback: Maximum fraction of distinct captions whose knowledge may come from the rules or be incomplete
            because the model's replies could not be used; above it nothing is written.
        spacy_model: spaCy model of the rules; null takes the first known model that is installed.
        cache: Folder of the replies; null takes OUT/cache. Several runs may share one.
        engine_options: Options of the engine's class, such as model.
        command: Command line, for the provenance.
        console: Where progress is shown; stderr by default.

    Returns:
        Counts of the merged knowledge; None for a part.

    Raises:
        AmpError: The input can't be used or the model can't be loaded. Earlier replies are kept.
    """
    console = console or PlainConsole(stderr=True)
    find_engine(engine)  # report a wrong name before reading the captions
    _check_options(retries, temperature, max_fallback, limit)
    if triplets == "rules" and fallback == "none":
        raise AmpError("triplets is rules and fallback is none; expected fallback rules, which loads the rules")
    if part is not None and merge:
        raise AmpError("part and merge are both given; expected only one of them; merge after all parts have finished")
    if merge and not (Path(out) / SETTINGS_NAME).exists():
        raise AmpError(
            f"{out}: has no {SETTINGS_NAME}; expected a folder in which knowledge was generated; check --out, or run "
            "the parts first"
        )
    index, parts = _share(part)
    with console.progress("reading captions"):
        source = _load(captions, format, default_split, keep_restval)
        file = str(Path(captions) / MANIFEST_NAME if Path(captions).is_dir() else captions)
        digest = source.sha256 or source_file(file)["sha256"]
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
    false: dict[int, dict[str, str]] = {}  # foils by kind, by id() of their caption
    if foils:
        with console.progress("writing foils"):
            rules, known = settings.makers.rules or RuleTriplets(spacy_model), set(distinct)
            chosen = [image for image in images if any(readable(caption.text) in known for caption in image.captions)]
            found = write_foils([[readable(caption.text) for caption in i.captions] for i in chosen], rules.parsed)
            for image, texts in zip(chosen, found, strict=True):
                pairs = zip(image.captions, texts, strict=True)
                false |= {id(caption): own for caption, own in pairs if readable(caption.text) in known}
        distinct = list(dict.fromkeys((*distinct, *(text for own in false.values() for text in own.values()))))
    ladder = Ladder(
        engine=settings.described["engine"],
        template=load_template(template),
        rules=settings.described["rules"],
        rule_triplets=triplets == "rules",
        retries=retries,
        temperature=temperature,
        seed=seed,
    )
    settings.check_ladder(ladder)
    name = None if merge else f"replies-{index:05d}-of-{parts:05d}"
    with ReplyCache(Path(cache) if cache else out_root / "cache", name) as replies:
        if replies.damaged:
            console.print(
                f"{replies.damaged:,} damaged lines in the cache are ignored; their replies are requested again"
            )
        if not merge:
            mine = [caption for caption in distinct if _number(caption) % parts == index]
            lost = ask_all(mine, ladder, lambda: settings.makers, replies, console)
            if lost:
                raise AmpError(
                    f"{out_root}: {lost:,} of {len(mine):,} captions have no reply after all tries; the replies so far "
                    "are kept; check the model's server, then run the same command again for the rest"
                )
            if parts > 1:
                console.print(
                    f"part {index}/{parts}: all {len(mine):,} captions are done; when all parts are done, run the same "
                    "command without --part to merge"
                )
                return None
        with console.progress("merging replies"):
            return merge_knowledge(
                images, false, set(distinct), ladder, replies, out_root, max_fallback, digest, command
            )


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
    """Hashes a caption to choose its part. The number is the same on every machine."""
    return int.from_bytes(hashlib.sha256(caption.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def _share(part: str | None) -> tuple[int, int]:
    """Returns (index, parts) of this process. The processes of one launcher split a part among themselves."""
    index, parts = part_of(part) if part is not None else (0, 1)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return index * world + rank, parts * world


def _reply_options(options: dict[str, Any] | None) -> dict[str, Any]:
    """Options that determine the model's replies. The others may change between runs."""
    keys = ("model", "revision", "rendering", "dtype", "constrained")
    return {key: value for key, value in (options or {}).items() if key in keys}
