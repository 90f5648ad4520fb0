"""Reads what Hugging Face's `datasets` opens: a local folder or a dataset of the hub, with or without its photos."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from amp.data.captions.arrow_table import BATCH_ROWS, ArrowTable, read_tables
from amp.data.captions.base import DATASET_PREFIX, CaptionSource
from amp.data.captions.splits import SplitNames
from amp.errors import AmpError, require


def read_dataset(path: Path, splits: SplitNames) -> CaptionSource:
    """See `amp.data.captions.base.Reader`. The path is `datasets:NAME` or `datasets:NAME:CONFIG`."""
    datasets = require("datasets", "a captions file of the format datasets")
    name, config = _name_and_config(path)
    tables = [_table(dataset, split) for split, dataset in _load(datasets, path, name, config)]
    source = read_tables(path, tables, splits)
    source.folder = _folder(datasets, name, source)
    source.sha256 = _hash(source)
    return source


def _name_and_config(path: Path) -> tuple[str, str | None]:
    rest = str(path).removeprefix(DATASET_PREFIX)
    if rest == str(path) or not rest:
        raise AmpError(
            f"{path}: not the name of a dataset; expected {DATASET_PREFIX}NAME or {DATASET_PREFIX}NAME:CONFIG, in "
            "which NAME is a folder or a dataset of the Hugging Face hub; correct --captions"
        )
    if Path(rest).is_dir():
        return rest, None
    name, _, config = rest.partition(":")
    return name, config or None


def _load(datasets: Any, path: Path, name: str, config: str | None) -> list[tuple[str | None, Any]]:
    """The splits of a dataset."""
    try:
        if any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json")):  # of save_to_disk
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, config)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise AmpError(
            f"{path}: can't be opened ({type(error).__name__}: {reason}); expected a folder, or NAME or NAME:CONFIG of "
            "a dataset of the Hugging Face hub; check the name and the network"
        ) from None
    if isinstance(loaded, datasets.DatasetDict):
        return list(loaded.items())
    return [(None if loaded.split is None else str(loaded.split), loaded)]


def _table(dataset: Any, split: str | None) -> ArrowTable:
    def batches(columns: list[str]) -> Iterator[Any]:
        # Arrow tables contain the photos' files. Other formats decode them.
        yield from dataset.select_columns(columns).with_format("arrow").iter(BATCH_ROWS)

    place = f"{split} row {{}}" if split is not None else "row {}"
    return ArrowTable(place, dataset.features.arrow_schema, batches, split)


def _folder(datasets: Any, name: str, source: CaptionSource) -> Path | None:
    """The folder of photos that are files: the dataset's, or their common folder in the hub's cache."""
    files = [image.path for image in source.images if image.path.startswith("/")]
    if not files:
        return None
    if Path(name).is_dir():
        return Path(name)
    common = Path(os.path.commonpath([os.path.dirname(file) for file in files]))
    hub = require("huggingface_hub.constants", "the hub")
    caches = [datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, hub.HF_HUB_CACHE]
    # A dataset could name any other file of this machine.
    return common if any(common.is_relative_to(Path(cache).absolute()) for cache in caches) else None


def _hash(source: CaptionSource) -> str:
    """SHA-256 of the images' names, splits and captions, because a dataset isn't one file."""
    digest = hashlib.sha256()
    for image in source.images:
        captions = [caption.text for caption in image.captions]
        digest.update(json.dumps([PurePosixPath(image.path).name, image.split, captions]).encode("ascii"))
    return digest.hexdigest()
