"""The protocol of a result file: data, search settings, weights, knowledge and library versions."""

import hashlib
import json
from pathlib import Path

import accelerate
import numpy as np
import open_clip
import torch

from amp.data.split import ShardSplit
from amp.data.split_captions import SplitCaptions
from amp.evaluate.adapters import Adapter
from amp.evaluate.settings import EvaluationSettings
from amp.files import sha256_of
from amp.version import __version__


def protocol(
    settings: EvaluationSettings,
    split: ShardSplit,
    captions: SplitCaptions,
    adapters: dict[str, Adapter],
    precision: str,
    described: dict,
) -> dict:
    """Returns everything that the figures depend on, as JSON values.

    Args:
        settings: Settings of the evaluation, with null values filled in from the adapters' records.
        split, captions: Split that is searched, and its captions.
        adapters: Adapters by name. The protocol contains the hashes of their files.
        precision: Types of weights and autocast, as text.
        described: Result of `describe_clip` for the base model.
    """
    search, model, bootstrap = settings.search, settings.model, settings.bootstrap
    return {
        "dataset": split.dataset,
        "split": split.name,
        "images": captions.images,
        "captions": len(captions.texts),
        "captions_sha256": captions_hash(captions),
        "captions_per_image": search.captions_per_image or "all",
        "queries": search.max_queries or "all",
        "folds": search.folds,
        "bootstrap": f"{bootstrap} samples of the images, seed {settings.seed}" if bootstrap else "none",
        "model": model.name,
        "pretrained": model.pretrained,
        **described,
        "adapters": {name: sha256_of(Path(adapter.path)) for name, adapter in adapters.items()},
        "top_k": search.top_k,
        "i2t": search.i2t,
        "fusion_weight": search.fusion_weight,
        "skip_decided": search.skip_decided,
        "tie_rule": "equal scores keep the gallery's order",
        "prompt_prefix": "",
        "resize": model.resize_mode or "model default",
        "kinds": settings.kinds,
        "precision": precision,
        "knowledge": split.manifests[0].provenance.get("knowledge"),
        "versions": {
            "open-clip-amp": __version__,
            "open_clip": open_clip.__version__,
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
            "numpy": np.__version__,
        },
    }


def captions_hash(captions: SplitCaptions) -> str:
    """Hash of the captions and of the image index of each. Equal hashes mean equal queries and correct answers."""
    text = json.dumps([captions.images, captions.image.tolist(), captions.texts])
    return hashlib.sha256(text.encode()).hexdigest()
