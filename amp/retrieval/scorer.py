"""Scores of (image, caption) pairs, each image conditioned on its caption's knowledge (paper, sec. 3.5)."""

import contextlib

import numpy as np
import torch
from torch import Tensor

from amp.knowledge.tensors import KnowledgeBatch
from amp.model.clip import Prompts
from amp.train.losses import pair_similarity

# What the prompts of a block of captions may take: 5,000 captions of ViT-L/14 with both kinds of prompts in fp32.
PROMPT_BYTES = 256 << 20
ENRICH_ROWS = 65_536


class PairScorer:
    """Scores pairs from stored early tokens, with the knowledge of each caption encoded once a block of pairs.

    Args:
        model: `ActionAwareCLIP` in eval mode, or an engine around it, on the device of `text`.
        early: Tokens of the images before block `interaction_layer`, (I, F + M, d_v), may be memory-mapped.
        knowledge: Of C captions.
        text: The frozen caption features (C, d).
        autocast: Makes the context of a forward pass.
        batch_size: Captions a forward pass.
    """

    def __init__(
        self,
        model,
        early: np.ndarray,
        knowledge: KnowledgeBatch,
        text: Tensor,
        autocast=contextlib.nullcontext,
        batch_size: int = 128,
    ):
        self.model, self.early, self.knowledge, self.text = model, early, knowledge, text
        self.autocast, self.batch_size = autocast, batch_size
        self.scored_text = scored_text(model, knowledge, text)
        self._captions = torch.empty(0, dtype=torch.int64)
        self._prompts: Prompts | None = None

    def captions_a_block(self) -> int:
        """Captions whose prompts fit into `PROMPT_BYTES`."""
        one = self._encode(torch.zeros(1, dtype=torch.int64))
        return max(1, PROMPT_BYTES // sum(x.nbytes for x in one if x is not None))

    def prepare(self, captions: Tensor) -> None:
        """Encodes the knowledge of captions, int64 with repeats, in place of that of earlier calls."""
        self._captions = captions.unique()
        parts = [self._encode(part) for part in self._captions.split(self.batch_size)]
        self._prompts = Prompts._make(None if x[0] is None else torch.cat(x) for x in zip(*parts, strict=True))

    def __call__(self, images: Tensor, captions: Tensor) -> Tensor:
        """Scores (P,) of images (P,) with prepared captions (P,), on the CPU."""
        distinct, image_index = images.unique(return_inverse=True)
        rows = torch.searchsorted(self._captions, captions)
        device = self.text.device
        with torch.no_grad(), self.autocast():
            features = self.model(
                early_tokens(self.early, distinct, device), self._prompts, image_index.to(device), rows.to(device)
            ).conditioned
        return pair_similarity(features, self.scored_text[captions.to(device)]).cpu()

    def _encode(self, captions: Tensor) -> Prompts:
        device = self.text.device
        with torch.no_grad(), self.autocast():
            return self.model(
                None, self.knowledge[captions].to(device), text=self.text[captions.to(device)], only_prompts=True
            ).prompts


def early_tokens(early: np.ndarray, images: Tensor, device: torch.device) -> Tensor:
    """Rows of stored tokens on the device, float32."""
    return torch.from_numpy(np.asarray(early[images.numpy()], dtype=np.float32)).to(device)


def scored_text(model, knowledge: KnowledgeBatch, text: Tensor) -> Tensor:
    """What images are scored against: caption features (C, d), enriched where the model does that."""
    parts = []
    with torch.no_grad():
        for low in range(0, len(text), ENRICH_ROWS):
            rows = slice(low, low + ENRICH_ROWS)
            parts.append(model(None, knowledge[rows].to(text.device), text=text[rows]).text)
    return torch.cat(parts)
