"""The training stream: batches from shards, decoded and tokenized in worker processes."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from random import Random
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from amp.cores import decoding_workers
from amp.data.frozen_features import FrozenFeatures
from amp.data.order import BatchOrder, caption_of_epoch
from amp.data.pixels import RandomCrop
from amp.data.shard_texts import ShardTexts
from amp.data.shared_images import SharedImages
from amp.data.split import ShardSplit
from amp.data.text_features import TextFeatureStore
from amp.knowledge.schema import Knowledge
from amp.knowledge.tensors import KnowledgeBatch, TripletTokenizer
from amp.knowledge.text import tower_texts

TextTokenizer = Callable[[list[str]], torch.Tensor]
"""open_clip's tokenizers: n texts to token ids int64 (n, context length)."""


@dataclass
class Batch:
    """B images with one caption each.

    Attributes:
        images: Images (B, 3, H, W), or their early tokens (B, F + M, d_v). With a `crop`, images are uint8 until `to`.
        base: The frozen CLIP's image features (B, d); None if they are not stored.
        text: The frozen CLIP's caption features (B, d), not normalized.
        knowledge: Knowledge of the captions.
        image_ids: Image ids int64 (B,); equal ids are the same image.
        samples: Position of each image in its split, int64 (B,); None if it is not needed.
        tokens: Token ids of the captions and then of the P texts of their knowledge, int64 (B + P, context length), if
            `text` and `knowledge.states` are still to be computed (`encoded`).
        crop: Crop that normalizes uint8 images on the device.
    """

    images: torch.Tensor
    base: torch.Tensor | None
    text: torch.Tensor
    knowledge: KnowledgeBatch
    image_ids: torch.Tensor
    samples: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    crop: RandomCrop | None = None

    def to(self, device, non_blocking: bool = True) -> "Batch":
        batch = self._map(lambda x: x.to(device, non_blocking=non_blocking))
        if self.crop is not None and batch.images.dtype == torch.uint8:
            batch.images = self.crop.normalized(batch.images)
        return batch

    def encoded(self, encode: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """Fills in the features of the texts; `encode` maps token ids (n, context length) to features (n, d)."""
        if self.tokens is None:
            return self
        features, captions = encode(self.tokens).to(self.text.dtype), len(self.text)
        states = torch.zeros_like(self.knowledge.states)
        states[self.knowledge.mask] = features[captions:]
        return replace(self, text=features[:captions], knowledge=replace(self.knowledge, states=states), tokens=None)

    def pin_memory(self) -> "Batch":
        return self._map(lambda x: x.pin_memory())

    def __reduce__(self):
        # torch passes each tensor between processes by a separate file and socket, which takes a millisecond. Small
        # tensors are faster as bytes.
        small = {key: value.numpy() for key, value in vars(self).items() if key != "images" and torch.is_tensor(value)}
        knowledge = {key: value.numpy() for key, value in vars(self.knowledge).items()}
        return _unpacked, (self.images, small, knowledge, self.crop)

    def _map(self, function) -> "Batch":
        return replace(self, **{k: function(x) for k, x in vars(self).items() if k != "crop" and x is not None})


def _unpacked(images: torch.Tensor, small: dict, knowledge: dict, crop: RandomCrop | None) -> Batch:
    texts = {key: torch.from_numpy(x) for key, x in knowledge.items()}
    tensors: dict[str, Any] = {"base": None, **{key: torch.from_numpy(x) for key, x in small.items()}}
    return Batch(images=images, knowledge=KnowledgeBatch(**texts), crop=crop, **tensors)


class KnowledgeCollator:
    """Collates knowledge of captions into a `KnowledgeBatch`, with state features from a store.

    Args:
        tokenizer: Tokenizer of triplets.
        store: Store with the features of the texts that `setting` needs.
        setting: Value of `PromptConfig.knowledge`. If it needs no texts, `states` are zeros.
    """

    def __init__(self, tokenizer: TripletTokenizer, store: TextFeatureStore, setting: str = "both"):
        self.tokenizer, self.store, self.setting = tokenizer, store, setting

    def __call__(self, knowledge: Sequence[Knowledge]) -> KnowledgeBatch:
        texts = [text for item in knowledge for text in self.texts(item)]
        return self.with_states(knowledge, self.store.lookup(texts) if texts else None)

    def texts(self, knowledge: Knowledge) -> list[str]:
        """The texts of one caption's knowledge."""
        return tower_texts(knowledge, self.tokenizer.max_triplets, self.setting)

    def with_states(self, knowledge: Sequence[Knowledge], features: np.ndarray | None) -> KnowledgeBatch:
        """Collates knowledge, given the features (P, d) of all its texts in order. None leaves the states zero."""
        tokens, token_mask, mask = self.tokenizer(knowledge)
        states = torch.zeros(*mask.shape, self.store.dim)
        if features is not None:
            states[mask] = torch.from_numpy(features)
        return KnowledgeBatch(tokens, token_mask, states, mask)


class TrainingSamples(Dataset):
    """Dataset of training samples, indexed by (sample, epoch): image, caption, knowledge and image id.

    Args:
        split: Split to read.
        preprocess: Image transform. open_clip's random crop is replaced by the faster `RandomCrop`; other transforms
            are applied unchanged. Not used with `frozen`.
        seed: Random seed of the caption of an epoch and of the random crop, regardless of the worker.
        keep: Kinds of triplets that are used.
        frozen: Stored features of the split, used instead of decoded images.
    """

    def __init__(
        self,
        split: ShardSplit,
        preprocess,
        seed: int,
        keep: Sequence[str],
        frozen: FrozenFeatures | None,
    ):
        self.split, self.preprocess, self.seed, self.keep, self.frozen = split, preprocess, seed, tuple(keep), frozen
        self.crop = RandomCrop.of(preprocess, scaled=True)

    def image_type(self) -> tuple[tuple[int, ...], torch.dtype] | None:
        """Shape and type of each image; None if they depend on `preprocess`."""
        if self.frozen is not None:
            return self.frozen.tokens.shape[1:], torch.from_numpy(np.empty(0, self.frozen.tokens.dtype)).dtype
        return None if self.crop is None else ((3, *self.crop.crop.size), torch.uint8)

    def __getitem__(self, item: tuple[int, int]):
        index, epoch = item
        record = self.split.record(index)
        number = caption_of_epoch(self.seed, epoch, index, len(record["captions"]))
        text, knowledge = self.split.caption(record, number, self.keep)
        image_id = stable_id(record["image_id"])
        if self.frozen is not None:
            early = torch.from_numpy(self.frozen.tokens[index].copy())
            return early, self.frozen.base[index], text, knowledge, image_id, index
        draw = stable_id(f"{self.seed}/{epoch}/{index}")
        if self.crop is not None:
            image = self.split.decoded(index, partial(self.crop, random=Random(draw)))
            return image, None, text, knowledge, image_id, index
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(draw)
            image = self.preprocess(self.split.image(index))
        return image, None, text, knowledge, image_id, index


class _Collate:
    def __init__(
        self,
        samples: TrainingSamples,
        knowledge: KnowledgeCollator,
        texts: ShardTexts | TextTokenizer | None,
        shared: SharedImages | None,
    ):
        self.split, self.crop = samples.split, samples.crop
        self.knowledge, self.texts, self.shared = knowledge, texts, shared

    def __call__(self, samples: list) -> Batch:
        images, base, texts, knowledge, ids, indices = zip(*samples, strict=True)
        text, collated, tokens = self._texts(texts, knowledge, indices)
        return Batch(
            default_collate(list(images)) if self.shared is None else self.shared.put(images),
            None if base[0] is None else torch.stack([torch.from_numpy(b.copy()) for b in base]),
            text,
            collated,
            torch.tensor(ids),
            torch.tensor(indices),
            tokens,
            self.crop,
        )

    def _texts(
        self, captions: Sequence[str], knowledge: Sequence[Knowledge], indices: Sequence[int]
    ) -> tuple[torch.Tensor, KnowledgeBatch, torch.Tensor | None]:
        """Caption features (B, d), knowledge, and token ids if the features are computed in the step."""
        if self.texts is None:
            return torch.from_numpy(self.knowledge.store.lookup(captions)), self.knowledge(knowledge), None
        of_knowledge = [self.knowledge.texts(item) for item in knowledge]
        texts = [*captions, *chain.from_iterable(of_knowledge)]
        if not isinstance(self.texts, ShardTexts):
            empty = torch.zeros(len(captions), self.knowledge.store.dim)
            return empty, self.knowledge.with_states(knowledge, None), self.texts(texts)
        shards = [self.split.shards[self.split.shard_of(index)].texts for index in indices]
        owners = [shard for shard, found in zip(shards, of_knowledge, strict=True) for _ in found]
        features = self.texts.lookup(texts, [*shards, *owners])
        states = self.knowledge.with_states(knowledge, features[len(captions) :] if owners else None)
        return torch.from_numpy(features[: len(captions)]), states, None


def stable_id(image_id: int | str) -> int:
    """A 63-bit hash of an image id, the same on every rank and in every run."""
    return int.from_bytes(hashlib.blake2b(str(image_id).encode(), digest_size=8).digest(), "little") >> 1


def training_loader(
    samples: TrainingSamples,
    order: BatchOrder,
    knowledge: KnowledgeCollator,
    workers: int,
    pin_memory: bool,
    worker_init: Callable[[int], None] | None = None,
    texts: ShardTexts | TextTokenizer | None = None,
) -> DataLoader:
    """Makes a loader of one rank's batches, in the order given by `order`, regardless of the number of workers.

    Don't pass the loader to `accelerator.prepare`: `BatchOrder` already splits batches over ranks.

    Args:
        samples: The training samples.
        order: Batch sampler of this rank.
        knowledge: Collator of the captions' knowledge.
        workers: Number of decoding processes.
        pin_memory: Whether batches are copied to page-locked memory.
        worker_init: Called in each worker with the worker's number.
        texts: Features of the split's texts by shard, or a function that returns the token ids of n texts, for
            features that are computed in the step. None uses the collator's store.
    """
    workers, ahead = decoding_workers(workers, gpu=pin_memory), 4
    image, shared = samples.image_type(), None
    if workers and image is not None:
        shape, dtype = image
        pin = pin_memory and torch.cuda.is_available()
        shared = SharedImages((order.batch_size, *shape), dtype, workers, ahead + 1, pin)
    return DataLoader(
        samples,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=_Collate(samples, knowledge, texts, shared),
        pin_memory=pin_memory,
        worker_init_fn=worker_init,
        persistent_workers=workers > 0,  # safe, because the order and the epoch are read in the main process
        prefetch_factor=ahead if workers else None,
    )
