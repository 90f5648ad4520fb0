"""Settings of the benchmarks."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Settings:
    """Settings of the benchmarks: data, models and sizes.

    Args:
        model: Base CLIP by open_clip's name, or `local-dir:FOLDER`.
        pretrained: open_clip's tag or file; null uses random weights, which are as fast.
        photos: Folder of photos to use instead of drawn ones.
        images: Number of photos for the stream and the conversion.
        image_size: Side of the images that the stream returns, in pixels.
        stream_batch: Images per batch of the stream.
        step_batch: Images per training step.
        rerank_images: Images of the re-ranked gallery, with one caption each.
        top_k: Candidates per caption.
        pairs_a_batch: Pairs per forward pass of re-ranking.
        naive_queries: Number of captions that the slow re-ranking loops score, from the first on.
        galleries: Sizes of galleries whose memory is measured.
        shards: Folder of shards whose split `test` is evaluated; null uses some drawn photos.
        language_model: Model that generates knowledge: a GGUF file, a folder or a hub name; null skips this benchmark.
        captions: Number of captions to generate knowledge for.
        naive_captions: Number of these captions, from the first on, that are generated one at a time.
        generation_batch: Replies per batch.
        max_tokens: Maximum number of new tokens per caption.
        peer_python: Python interpreter with open_clip_train and webdataset 0.2.86; null skips this comparison.
        rounds: Number of timings of each method of the stream and the conversion.
        model_rounds: Number of timings of the benchmarks that run models.
        device: Device of the models.
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
        """Number of photos in a captions file of `benchmarks.photos`."""
        return len(json.loads(Path(given["captions"]).read_text())["images"])
