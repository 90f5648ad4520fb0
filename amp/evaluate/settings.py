"""What an evaluation is told: data, adapters, base model, search, rows and files. Imports no torch, for ``--help``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from amp.retrieval.settings import RetrievalSettings

Kind = Literal["action", "attribute"]


@dataclass
class BaseSettings:
    """The base CLIP. Null takes what the adapters' record says.

    Args:
        name: As open_clip's: a model name, ``local-dir:FOLDER`` or ``hf-hub:ORG/REPO``. Give it where the base model
            is elsewhere than at training, or to evaluate it without adapters.
        pretrained: Its weights, as open_clip names them: a tag or a file. Read where `name` is given.
        precision: Type of the frozen weights.
        resize_mode: How photos are fitted, ``squash`` keeps the borders; null without adapters is the base model's own
            way.
    """

    name: str | None = None
    pretrained: str | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    resize_mode: Literal["squash", "shortest", "longest"] | None = None


@dataclass
class EvaluationSettings:
    """An evaluation.

    Args:
        shards: Folder that amp make_shards wrote; null takes the one that the adapters were trained on.
        split: Split of the shards.
        adapters: ``NAME=FILE`` each, in the order of the table; none evaluates the base model only.
        model: The base CLIP.
        kinds: Kinds of triplets used; null takes those of the adapters' training.
        search: How the split is searched.
        probes: Further rows of each knowledge-aware adapter with one input spoilt: ``shuffled`` knowledge, ``blank``
            knowledge, knowledge of a ``sibling`` caption of the same image, ``grey`` images, or a probe of a plugin.
        text_only: Add the text-only control: captions with their states, no action-aware image.
        bootstrap: Samples of the images for the 95 % intervals; 0 computes none.
        seed: Random seed of the bootstrap and of probes.
        batch_size: Images per forward pass of the base model.
        workers: Decoding processes per process; fewer where there are fewer cores.
        cache: Folder for text features and frozen image features.
        cache_dtype: Type of cached features; null takes that of the adapters' training, or float32.
        mixed_precision: Autocast type of re-ranking; ``auto`` is bf16 on a GPU and on processors that have instructions
            for it, else no; null takes what `accelerate launch` says.
        timeout_minutes: How long a process waits for the others before it gives up.
        out: JSON file of the result; .csv, .npz with results per query and .verbs.csv are written next to it.
        gallery: Picture with retrievals of the last adapter, a PNG, JPEG or WebP file; null draws none.
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
