"""What a run of the benchmarks measures."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Settings:
    """What is measured, and on what.

    Args:
        model: Base CLIP by open_clip's name, or ``local-dir:FOLDER``.
        pretrained: open_clip's tag or file; null takes random weights, which take as long.
        photos: Folder of photos in place of drawn ones.
        images: Photos of the stream and of the conversion.
        image_size: Pixels that the stream makes of a photo.
        stream_batch: Images a batch of the stream.
        step_batch: Images a training step.
        rerank_images: Images of the re-ranked gallery, a caption each.
        top_k: Candidates a caption.
        pairs_a_batch: Pairs a forward pass of re-ranking.
        naive_queries: Captions that the slow loops of re-ranking score, the first ones.
        galleries: Sizes of galleries whose memory is measured.
        shards: Folder of shards whose split `test` is evaluated; null takes some drawn photos.
        language_model: Model that generates knowledge, a GGUF file, a folder or a hub name; null leaves that out.
        captions: Captions that knowledge is generated for.
        naive_captions: Those of them, the first ones, that are asked one at a time.
        generation_batch: Replies at once.
        max_tokens: New tokens a caption at most.
        peer_python: Interpreter with open_clip_train and webdataset 0.2.86; null leaves that out.
        rounds: How often each way of the stream and of the conversion is timed.
        model_rounds: The same of what models do.
        device: Where models run.
    """

    model: str = "ViT-S-32"
    pretrained: str | None = None
    photos: Path | None = None
    images: int = 3072
    image_size: int = 224
    stream_batch: int = 64
    step_batch: int = 16
    rerank_images: int = 40
    top_k: int = 20
    pairs_a_batch: int = 128
    naive_queries: int = 2
    galleries: tuple[int, ...] = (1_000, 4_000, 16_000)
    shards: Path | None = None
    language_model: str | None = None
    captions: int = 64
    naive_captions: int = 16
    generation_batch: int = 64
    max_tokens: int = 64
    peer_python: Path | None = None
    rounds: int = 5
    model_rounds: int = 3
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    @staticmethod
    def photos_count(given: dict[str, str]) -> int:
        """Photos that a captions file of `benchmarks.photos` names."""
        return len(json.loads(Path(given["captions"]).read_text())["images"])
