"""The protocol block of a result file: what was searched, how, with which weights, knowledge and versions."""

import hashlib
import json
from pathlib import Path

import accelerate
import numpy as np
import open_clip
import torch

from amp.data.shards import ShardManifest
from amp.data.split import ShardSplit
from amp.data.split_captions import SplitCaptions
from amp.retrieval.settings import RetrievalSettings
from amp.train.config import TrainConfig
from amp.version import __version__


def protocol(
    config: TrainConfig,
    split: ShardSplit,
    captions: SplitCaptions,
    search: RetrievalSettings,
    precision: str,
    bootstrap: int,
    described: dict,
    adapters: dict[str, str],
) -> dict:
    """All that the figures depend on, as JSON values; `described` is what is said of the base model."""
    manifest = ShardManifest.load(config.data.shards)
    return {
        "dataset": Path(config.data.shards).name,
        "split": split.name,
        "images": captions.images,
        "captions": len(captions.texts),
        "captions_sha256": captions_hash(captions),
        "captions_per_image": search.captions_per_image or "all",
        "queries": search.max_queries or "all",
        "folds": search.folds,
        "bootstrap": f"{bootstrap} samples of the images, seed {config.seed}" if bootstrap else "none",
        "model": config.model.name,
        "pretrained": config.model.pretrained,
        **described,
        "adapters": {name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for name, path in adapters.items()},
        "top_k": search.top_k,
        "i2t": search.i2t,
        "fusion_weight": search.fusion_weight,
        "skip_decided": search.skip_decided,
        "tie_rule": "equal scores keep the gallery's order",
        "prompt_prefix": "",
        "resize": config.model.resize_mode or "model default",
        "kinds": config.data.kinds,
        "precision": precision,
        "knowledge": manifest.provenance.get("knowledge"),
        "versions": {
            "open-clip-amp": __version__,
            "open_clip": open_clip.__version__,
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
            "numpy": np.__version__,
        },
    }


def captions_hash(captions: SplitCaptions) -> str:
    """Of the captions and the image of each: equal hashes mean equal queries and answers."""
    text = json.dumps([captions.images, captions.image.tolist(), captions.texts])
    return hashlib.sha256(text.encode()).hexdigest()
