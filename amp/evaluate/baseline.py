"""First-stage search with any open_clip model, including models with timm or Hugging Face towers."""

import numpy as np
import torch
from accelerate import Accelerator
from open_clip.model import CLIP, CustomTextCLIP
from torch.utils.data import DataLoader, Subset

from amp.cores import decoding_workers
from amp.data.frozen_features import FrozenFeatures, SplitImages
from amp.data.split import ShardSplit
from amp.data.split_captions import SplitCaptions
from amp.distributed import all_reduce_sum, rank, world_size
from amp.evaluate.settings import EvaluationSettings
from amp.model.factory import get_tokenizer, load_clip, to_precision
from amp.model.towers.base import weights_hash
from amp.retrieval.rerank import shard_bounds
from amp.retrieval.split_search import SplitSearch
from amp.terminal import Terminal


def baseline(
    settings: EvaluationSettings,
    split: ShardSplit,
    captions: SplitCaptions,
    accelerator: Accelerator,
    terminal: Terminal,
) -> tuple[SplitSearch, dict]:
    """Encodes a split with the base model, each process an equal share, and runs the first stage.

    Args:
        settings: Settings of the evaluation; `model.name` must be set.
        split, captions: Split to search, and its captions.
        accelerator, terminal: Accelerator and terminal of the run.

    Returns:
        `SplitSearch` without knowledge, and the result of `describe_clip`.
    """
    model, batch_size = settings.model, settings.batch_size
    assert model.name is not None
    with terminal.progress(f"loading {model.name}"):
        clip, _, preprocess = load_clip(model.name, model.pretrained, image_resize_mode=model.resize_mode)
        described = describe_clip(clip)
        clip = to_precision(clip, model.precision).to(accelerator.device).eval()
        tokenizer = get_tokenizer(model.name)
    images, texts = SplitImages(split, preprocess), captions.texts

    def encoded(total: int, batches, encode, what: str) -> torch.Tensor:
        start, stop = shard_bounds(total, rank(), world_size())
        parts, done = [], 0
        with terminal.progress(f"encoding {what}", what) as report, torch.no_grad():
            for batch in batches(start, stop):
                parts.append(encode(batch.to(accelerator.device, non_blocking=True)).float())
                done += len(parts[-1])
                report(done, stop - start)
        # A process without a share gets the feature width from rank 0.
        own = parts[0].shape[1] if rank() == 0 else 0
        width = int(all_reduce_sum(torch.tensor(own, device=accelerator.device)))
        features = torch.zeros(total, width, device=accelerator.device)
        if parts:
            features[start:stop] = torch.cat(parts)
        return all_reduce_sum(features)

    def decoded(start: int, stop: int):
        part, pinned = Subset(images, range(start, stop)), accelerator.device.type == "cuda"
        workers = decoding_workers(settings.workers, pinned)
        return DataLoader(part, batch_size, num_workers=workers, pin_memory=pinned)

    def tokenised(start: int, stop: int):
        return (tokenizer(texts[low : min(low + batch_size, stop)]) for low in range(start, stop, batch_size))

    first = next(m for m in clip.visual.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear))
    dtype = first.weight.dtype  # of the patch embedding, the first layer of every tower
    base = encoded(len(images), decoded, lambda x: clip.encode_image(x.to(dtype)), f"{split.name} images")
    text = encoded(len(texts), tokenised, clip.encode_text, "texts")
    frozen = FrozenFeatures(None, base.cpu().numpy().astype(np.float32))
    with terminal.progress("searching with the base model"):
        return SplitSearch(captions, frozen, text, None, settings.search, accelerator.device), described


def describe_clip(clip: CLIP | CustomTextCLIP) -> dict:
    """Returns the protocol's entries about a base model."""
    quick_gelu = any(type(module).__name__ == "QuickGELU" for module in clip.modules())
    size = clip.visual.image_size
    return {
        "weights_sha256": weights_hash(clip, quick_gelu),
        "quick_gelu": quick_gelu,
        "image_size": list(size) if isinstance(size, tuple | list) else [size, size],
    }
