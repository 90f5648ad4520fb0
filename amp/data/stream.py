"""The training stream: shards to batches, decoded and tokenised in workers."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from amp.cores import decoding_workers
from amp.data.frozen_features import FrozenFeatures
from amp.data.order import BatchOrder, caption_of_epoch
from amp.data.pixels import RandomCrop
from amp.data.shared_images import SharedImages
from amp.data.split import ShardSplit
from amp.data.text_features import TextFeatureStore
from amp.knowledge.schema import Knowledge
from amp.knowledge.tensors import KnowledgeBatch, TripletTokenizer
from amp.knowledge.text import tower_texts


@dataclass
class Batch:
    """B images with one caption each.

    Attributes:
        images: Images (B, 3, H, W), or their early tokens (B, F + M, d_v); uint8 images until `to`, where there is a
            `crop`.
        base: The frozen CLIP's image features (B, d), or None where they are not stored.
        text: The frozen CLIP's caption features (B, d), not normalised.
        knowledge: Of the captions.
        image_ids: Int64 (B,); equal numbers are the same image.
        samples: Position of each image in its split, int64 (B,); None where nobody asks.
        crop: What normalises uint8 images on the device.
    """

    images: torch.Tensor
    base: torch.Tensor | None
    text: torch.Tensor
    knowledge: KnowledgeBatch
    image_ids: torch.Tensor
    samples: torch.Tensor | None = None
    crop: RandomCrop | None = None

    def to(self, device, non_blocking: bool = True) -> "Batch":
        batch = self._map(lambda x: x.to(device, non_blocking=non_blocking))
        if self.crop is not None and batch.images.dtype == torch.uint8:
            batch.images = self.crop.normalized(batch.images)
        return batch

    def pin_memory(self) -> "Batch":
        return self._map(lambda x: x.pin_memory())

    def __reduce__(self):
        # A worker hands each tensor over by a file and a socket of its own, a millisecond each: as bytes, all but the
        # images come sooner.
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
    """Knowledge of captions to a `KnowledgeBatch`, state features read from the store.

    Args:
        tokenizer: Cuts triplets into tokens.
        store: Holds the features of the texts that `setting` asks for.
        setting: `PromptConfig.knowledge`; where it asks for no text, `states` are zeros.
    """

    def __init__(self, tokenizer: TripletTokenizer, store: TextFeatureStore, setting: str = "both"):
        self.tokenizer, self.store, self.setting = tokenizer, store, setting

    def __call__(self, knowledge: Sequence[Knowledge]) -> KnowledgeBatch:
        tokens, token_mask, mask = self.tokenizer(knowledge)
        states = torch.zeros(*mask.shape, self.store.dim)
        k = self.tokenizer.max_triplets
        texts = [text for item in knowledge for text in tower_texts(item, k, self.setting)]
        if texts:
            states[mask] = torch.from_numpy(self.store.lookup(texts))
        return KnowledgeBatch(tokens, token_mask, states, mask)


class TrainingSamples(Dataset):
    """(sample, epoch) -> image, caption, knowledge and image id.

    Args:
        split: The shards.
        preprocess: Image transform; open_clip's random crop is replaced by ours, which differs only in rounding.
            Without one, pixels are Pillow's, as in evaluation and stored features. Not used with `frozen`.
        seed: Chooses the caption of an epoch and the random crop, regardless of the worker.
        keep: Kinds of triplets that are used.
        frozen: Stored features of the split, which replace decoding.
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
        """Shape and type of each image; None if only `preprocess` knows."""
        if self.frozen is not None:
            return self.frozen.tokens.shape[1:], torch.from_numpy(self.frozen.tokens[:0].copy()).dtype
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
    def __init__(self, knowledge: KnowledgeCollator, crop: RandomCrop | None, shared: SharedImages | None):
        self.knowledge, self.crop, self.shared = knowledge, crop, shared

    def __call__(self, samples: list) -> Batch:
        images, base, texts, knowledge, ids, indices = zip(*samples, strict=True)
        return Batch(
            default_collate(list(images)) if self.shared is None else self.shared.put(images),
            None if base[0] is None else torch.stack([torch.from_numpy(b.copy()) for b in base]),
            torch.from_numpy(self.knowledge.store.lookup(texts)),
            self.knowledge(knowledge),
            torch.tensor(ids),
            torch.tensor(indices),
            self.crop,
        )


def stable_id(image_id: int | str) -> int:
    """A 63-bit number for an image id, equal on every rank and in every run."""
    return int.from_bytes(hashlib.blake2b(str(image_id).encode(), digest_size=8).digest(), "little") >> 1


def training_loader(
    samples: TrainingSamples,
    order: BatchOrder,
    knowledge: KnowledgeCollator,
    workers: int,
    pin_memory: bool,
    worker_init: Callable[[int], None] | None = None,
) -> DataLoader:
    """Batches of one rank in the order of `order`, regardless of the number of workers.

    The loader is not given to `accelerator.prepare`: splitting over ranks is done here, by `BatchOrder`.
    `worker_init` is called in each worker with its number.
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
        collate_fn=_Collate(knowledge, samples.crop, shared),
        pin_memory=pin_memory,
        worker_init_fn=worker_init,
        persistent_workers=workers > 0,  # the order, and with it the epoch, is read in this process
        prefetch_factor=ahead if workers else None,
    )
