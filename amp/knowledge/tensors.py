"""Knowledge as tensors, built by data workers and read by the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch

from amp.knowledge.schema import Knowledge
from amp.knowledge.text import SLOT_TOKENS, select

WORD_START = "\u2581"
"""SentencePiece's mark for the start of a word."""


@dataclass
class KnowledgeBatch:
    """Knowledge of C captions, padded to K triplets.

    Attributes:
        triplet_tokens: Token ids of (subject, action, object), int64 (C, K, 3, S), padded with 0.
        token_mask: Which of those ids are not padding, bool (C, K, 3, S).
        states: Features of the state prompts from the frozen text tower, projected but not normalised, float (C, K, d).
        mask: Which of the K triplets exist, bool (C, K). A row without any True is a caption without knowledge.
    """

    triplet_tokens: torch.Tensor
    token_mask: torch.Tensor
    states: torch.Tensor
    mask: torch.Tensor

    def __len__(self) -> int:
        return self.mask.shape[0]

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> "KnowledgeBatch":
        """Applies `fn` to each tensor."""
        return KnowledgeBatch(*(fn(getattr(self, f.name)) for f in fields(self)))

    def to(self, device, non_blocking: bool = False) -> "KnowledgeBatch":
        return self.map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "KnowledgeBatch":
        return self.map(torch.Tensor.pin_memory)

    def __getitem__(self, index) -> "KnowledgeBatch":
        """Selects captions by a slice or an int64 or bool tensor."""
        return self.map(lambda x: x[index])

    def blank(self) -> "KnowledgeBatch":
        """The same captions with all knowledge masked out."""
        return KnowledgeBatch(self.triplet_tokens, self.token_mask, self.states, torch.zeros_like(self.mask))

    def keep(self, kept: torch.Tensor) -> "KnowledgeBatch":
        """The same captions with only those triplets and states where `kept`, bool (C, K), is True."""
        return KnowledgeBatch(self.triplet_tokens, self.token_mask, self.states, self.mask & kept)

    @staticmethod
    def cat(batches: Sequence["KnowledgeBatch"]) -> "KnowledgeBatch":
        """Concatenates the captions of batches that are padded to the same K."""
        return KnowledgeBatch(*(torch.cat([getattr(b, f.name) for b in batches]) for f in fields(KnowledgeBatch)))


class Captions(NamedTuple):
    """C captions as input of the model.

    Attributes:
        knowledge: Knowledge of the captions.
        text: Features of the captions from the frozen text tower (C, d), not normalised; None for models that don't
            read them.
    """

    knowledge: KnowledgeBatch
    text: torch.Tensor | None = None


class TripletTokenizer:
    """Tokenizes subjects, actions and objects, without start and end tokens.

    For Hugging Face tokenizers, words are cleaned in the same way as captions. SentencePiece's mark for the start of a
    word is dropped if it is a token of its own, because it would take one of the S places without carrying meaning.

    Args:
        tokenizer: Return value of `open_clip.get_tokenizer`.
        max_triplets: Maximum triplets per caption, K. S is `SLOT_TOKENS`.
    """

    def __init__(self, tokenizer, max_triplets: int):
        self.tokenizer = tokenizer
        self.max_triplets = max_triplets
        self._cache: dict[str, tuple[np.ndarray, int]] = {}  # a dataset has only some thousand distinct slots

    def slot(self, text: str) -> tuple[np.ndarray, int]:
        """Token ids of one slot, int64 (S,) padded with zeros, and their number."""
        if text not in self._cache:
            if len(self._cache) > 100_000:
                self._cache.clear()
            ids = self._encode(text)[:SLOT_TOKENS]
            self._cache[text] = np.array(ids + [0] * (SLOT_TOKENS - len(ids)), dtype=np.int64), len(ids)
        return self._cache[text]

    def _encode(self, text: str) -> list[int]:
        if not text.strip():
            return []
        if hasattr(self.tokenizer, "encode"):  # open_clip.SimpleTokenizer: plain byte pairs
            return self.tokenizer.encode(text.lower())
        inner = self.tokenizer.tokenizer  # open_clip.HFTokenizer
        clean = getattr(self.tokenizer, "clean_fn", str)  # open_clip.SigLipTokenizer has none
        ids = inner.encode(clean(text), add_special_tokens=False)
        return [i for i, token in zip(ids, inner.convert_ids_to_tokens(ids), strict=True) if token != WORD_START]

    def __call__(self, knowledge: Sequence[Knowledge]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns `triplet_tokens`, `token_mask` and `mask` of a `KnowledgeBatch` for C captions."""
        shape = (len(knowledge), self.max_triplets, 3, SLOT_TOKENS)
        # Arrays, because assigning single elements of a tensor takes ten times as long.
        tokens, counts = np.zeros(shape, dtype=np.int64), np.zeros(shape[:3], dtype=np.int64)
        mask = np.zeros(shape[:2], dtype=bool)
        for c, item in enumerate(knowledge):
            for k, (triplet, _) in enumerate(select(item, self.max_triplets)):
                mask[c, k] = True
                for s, text in enumerate((triplet.subject, triplet.action, triplet.object)):
                    tokens[c, k, s], counts[c, k, s] = self.slot(text)
        token_mask = np.arange(SLOT_TOKENS) < counts[..., None]
        return torch.from_numpy(tokens), torch.from_numpy(token_mask), torch.from_numpy(mask)
