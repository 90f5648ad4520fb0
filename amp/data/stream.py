"""The training stream: batches from shards, decoded and tokenized in worker processes."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from amp.data.remote.ahead import Ahead


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
        crop: Crop that normalizes uint8 images on the device.
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
        tokens, token_mask, mask = self.tokenizer(knowledge)
        states = torch.zeros(*mask.shape, self.store.dim)
        k = self.tokenizer.max_triplets
        texts = [text for item in knowledge for text in tower_texts(item, k, self.setting)]
        if texts:
            states[mask] = torch.from_numpy(self.store.lookup(texts))
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
            return self.frozen.tokens.shape[1:], torch.from_numpy(self.frozen.tokens[:0].copy()).dtype
        return None if self.crop is None else ((3, *self.crop.crop.size), torch.uint8)

    def __getitems__(self, items: list[tuple[int, int]]) -> list:
        """The samples of a batch, for DataLoader."""
        if self.frozen is None:
            self.split.prefetch([index for index, _ in items])
        return [self[item] for item in items]

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
    """A 63-bit hash of an image id, the same on every rank and in every run."""
    return int.from_bytes(hashlib.blake2b(str(image_id).encode(), digest_size=8).digest(), "little") >> 1


def training_loader(
    samples: TrainingSamples,
    order: BatchOrder,
    knowledge: KnowledgeCollator,
    workers: int,
    pin_memory: bool,
    worker_init: Callable[[int], None] | None = None,
    downloads: "Ahead | None" = None,
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
        downloads: Downloads of remote shards, which stay ahead of `order`.
    """
    workers, ahead = decoding_workers(workers, gpu=pin_memory), 4
    image, shared = samples.image_type(), None
    if workers and image is not None:
        shape, dtype = image
        pin = pin_memory and torch.cuda.is_available()
        shared = SharedImages((order.batch_size, *shape), dtype, workers, ahead + 1, pin)
    return DataLoader(
        samples,
        batch_sampler=order if downloads is None else downloads.following(order),
        num_workers=workers,
        collate_fn=_Collate(knowledge, samples.crop, shared),
        pin_memory=pin_memory,
        worker_init_fn=worker_init,
        persistent_workers=workers > 0,  # safe, because the order and the epoch are read in the main process
        prefetch_factor=ahead if workers else None,
    )
