"""Settings of amp evaluate. Does not import torch, so that `--help` is fast."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from amp.retrieval.settings import RetrievalSettings

Kind = Literal["action", "attribute"]


@dataclass
class BaseSettings:
    """The base CLIP.

    Args:
        name: Model of open_clip: a name, `local-dir:FOLDER` or `hf-hub:ORG/REPO`. Set it to evaluate a base model
            without adapters, or if the base model has moved since training; null uses the adapters' base model.
        pretrained: Weights of open_clip: a tag or a file. Ignored if `name` is null.
        precision: Type of the frozen weights.
        resize_mode: How photos are resized: `squash` changes the aspect ratio instead of cropping the borders; null
            uses the mode of the adapters' training, or the base model's own mode.
    """

    name: str | None = None
    pretrained: str | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    resize_mode: Literal["squash", "shortest", "longest"] | None = None


@dataclass
class EvaluationSettings:
    """Settings of an evaluation.

    Args:
        shards: Folder written by amp make_shards; null uses the shards that the adapters were trained on.
        split: Split of the shards.
        adapters: Adapters to evaluate, each as `NAME=FILE`, in the order of the table. Without adapters, only the base
            model is evaluated.
        model: The base CLIP.
        kinds: Kinds of triplets to use; null uses those that the adapters were trained with.
        search: How the split is searched.
        probes: Additional rows for each knowledge-aware adapter, each with one input corrupted: `shuffled` knowledge,
            `blank` knowledge, knowledge of a `sibling` caption of the same image, `grey` images, or a probe of a
            plugin.
        text_only: Whether to add the text-only control, which scores captions combined with their states against
            frozen image features.
        bootstrap: Number of bootstrap samples of the images for the 95 % intervals; 0 computes no intervals.
        seed: Random seed of the bootstrap and the probes.
        batch_size: Images per forward pass of the base model.
        workers: Image-decoding workers per process; fewer are started if there are too few cores.
        cache: Folder for cached text features and frozen image features.
        cache_dtype: Type of cached features; null uses the type of the adapters' training, or float32.
        mixed_precision: Autocast type of re-ranking. `auto` is bf16 on a GPU or a CPU with bf16 instructions, otherwise
            no; null uses the setting of `accelerate launch`.
        timeout_minutes: Minutes that a process waits for the others before it gives up.
        out: JSON file of the results. A .csv file, an .npz file with per-query results and a .verbs.csv file are
            written next to it.
        gallery: Picture of some retrievals of the last adapter, a PNG, JPEG or WebP file; null draws none.
    """

    shards: str | None = None
    split: str = "test"
    adapters: list[str] = field(default_factory=list)
    model: BaseSettings = field(default_factory=BaseSettings)
    kinds: list[Kind] | None = None
    search: RetrievalSettings = field(default_factory=RetrievalSettings)
    probes: list[str] = field(default_factory=list)
    text_only: bool = False
    bootstrap: int = 1000
    seed: int = 0
    batch_size: int = 64
    workers: int = 4
    cache: str = "data/cache"
    cache_dtype: Literal["float32", "float16"] | None = None
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] | None = "auto"
    timeout_minutes: float = 30.0
    out: Path = Path("runs/results.json")
    gallery: str | None = None
