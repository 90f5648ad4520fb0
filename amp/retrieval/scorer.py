"""Scores (image, caption) pairs, with each image conditioned on the caption's knowledge (paper, sec. 3.5).

Validation, evaluation, search and caption choice all use it, for adapters and controls.
"""

import contextlib

import numpy as np
import torch
from torch import Tensor

from amp.data.frozen_features import Rows
from amp.knowledge.tensors import Captions, KnowledgeBatch
from amp.model.clip import EncodedCaptions
from amp.model.interactions.base import Prompts
from amp.model.similarity import pair_similarity

# Maximum size of a block of prompts: 5,000 captions for ViT-L/14 with both kinds of prompts in fp32.
PROMPT_BYTES = 256 << 20
TEXT_ROWS = 8192
SMALL = 8


class PairScorer:
    """Scores pairs. Each caption is encoded once per block of pairs, and each image once per call or only once.

    Args:
        model: `ActionAwareCLIP` in eval mode, or an engine around it, on the device of `text`.
        images: I images: tokens before the first prompted block (I, F + M, d_v), as a tensor or an array that may be
            memory-mapped; or the interaction's encoding of the images, tensors with I rows on the model's device.
        knowledge: Knowledge of the C captions.
        text: The frozen caption features (C, d).
        autocast: Returns the context manager of a forward pass.
        batch_size: Captions per forward pass.

    Attributes:
        text: Caption features (C, d) that images are scored against, enriched if the model enriches text.
    """

    def __init__(
        self,
        model,
        images: Tensor | np.ndarray | Rows | tuple[Tensor, ...],
        knowledge: KnowledgeBatch,
        text: Tensor,
        autocast=contextlib.nullcontext,
        batch_size: int = 128,
    ):
        self.model, self.knowledge, self._frozen_text = model, knowledge, text
        self.autocast, self.batch_size, self.device = autocast, batch_size, text.device
        self.text = text
        self._prepared = torch.empty(0, dtype=torch.int64)
        self._prompts: Prompts | None = None
        if getattr(model, "module", model).text_enrichment is not None:
            rows = torch.arange(len(text))
            with torch.no_grad():
                if len(text) <= batch_size and autocast is contextlib.nullcontext:  # one pass gives text and prompts
                    encoded = model(None, self._captions_of(rows)).captions
                    self.text, self._prepared, self._prompts = encoded.text, rows, encoded.prompts
                else:
                    parts = rows.split(TEXT_ROWS)
                    self.text = torch.cat([model(None, self._captions_of(part)).captions.text for part in parts])
        self._early: Tensor | np.ndarray | Rows = torch.empty(0)
        self._encoded: tuple[Tensor, ...] | None = None
        if isinstance(images, tuple):
            self._encoded = images
        else:
            self._early = images
            self._encoded = self._small_images()
        self._one_for_all = len(text) == 1 and getattr(model, "module", model).interaction.scores_all_pairs

    def captions_per_block(self) -> int:
        """Number of captions whose prompts fit into `PROMPT_BYTES`."""
        one = self._encode(torch.zeros(1, dtype=torch.int64))
        return max(1, PROMPT_BYTES // sum(x.nbytes for x in (*one.parts, one.mask)))

    def prepare(self, captions: Tensor) -> None:
        """Encodes captions, given as int64 indices that may repeat. Discards the captions of earlier calls."""
        self._prepared = captions.unique()
        blocks = [self._encode(part) for part in self._prepared.split(self.batch_size)]
        parts = tuple(torch.cat(part) for part in zip(*(block.parts for block in blocks), strict=True))
        self._prompts = Prompts(parts, torch.cat([block.mask for block in blocks]))

    def __call__(self, images: Tensor, captions: Tensor) -> Tensor:
        """Scores (P,) of P pairs, given as image and caption indices, int64 (P,). Prepares the captions if needed."""
        rows = torch.searchsorted(self._prepared, captions)
        if not len(self._prepared) or (self._prepared[rows.clamp(max=len(self._prepared) - 1)] != captions).any():
            self.prepare(captions)
            rows = torch.searchsorted(self._prepared, captions)
        distinct, image_index = images.unique(return_inverse=True)
        assert self._prompts is not None
        given, encoded = self._images_of(distinct), EncodedCaptions(self._prompts, None)
        image_index = image_index.to(self.device)
        with torch.no_grad(), self.autocast():
            if self._one_for_all:  # without a copy of each image's encoding per pair
                features = self.model(given, encoded, "all").conditioned[image_index, 0]
            else:
                features = self.model(given, encoded, (image_index, rows.to(self.device))).conditioned
        return pair_similarity(features, self.text[captions.to(self.device)])

    def pooled(self, images: Tensor, captions: Tensor) -> Tensor:
        """Scores (B, k) of B images with k captions each, given as indices int64 (B,) and (B, k).

        Each image is encoded once, conditioned on the union of its captions' knowledge.
        """
        flat = captions.flatten()
        with torch.no_grad(), self.autocast():
            encoded = self.model(None, self._captions_of(flat)).captions
            united = EncodedCaptions(encoded.prompts.unite(captions.shape[1]), None)
            features = self.model(self._images_of(images), united).conditioned
        return pair_similarity(features[:, None], self.text[captions.to(self.device)])

    def _small_images(self) -> tuple[Tensor, ...] | None:
        """The interaction's encoding of all images, if an image's encoding is small (such as a feature) compared with
        its tokens. Otherwise None, and images are encoded with each batch of pairs."""

        def encode(images: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad(), self.autocast():
                return self.model(self._early_of(images)).images

        one = torch.zeros(1, dtype=torch.int64)
        if SMALL * sum(x.nbytes for x in encode(one)) > self._early_of(one).nbytes:
            return None
        batches = [encode(part) for part in torch.arange(len(self._early)).split(self.batch_size)]
        return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))

    def _captions_of(self, captions: Tensor) -> Captions:
        return Captions(self.knowledge[captions].to(self.device), self._frozen_text[captions.to(self.device)])

    def _encode(self, captions: Tensor) -> Prompts:
        with torch.no_grad(), self.autocast():
            return self.model(None, self._captions_of(captions)).captions.prompts

    def _images_of(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Images as input of the model: their encoding if it is known, otherwise their early tokens."""
        if self._encoded is None:
            return self._early_of(images)
        if len(images) == len(self._encoded[0]) and (images == torch.arange(len(images))).all():
            return self._encoded
        return tuple(x[images.to(self.device)] for x in self._encoded)

    def _early_of(self, images: Tensor) -> Tensor:
        """Early tokens of images on the device, float32."""
        if isinstance(self._early, Tensor):
            return self._early[images.to(self._early.device)].to(self.device, torch.float32)
        return torch.from_numpy(np.asarray(self._early[images.numpy()], dtype=np.float32)).to(self.device)
