"""The stored features of a training run: texts and images that the frozen CLIP encodes once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from amp.data.frozen_features import FrozenFeatures
from amp.data.prepare import prepare_images, prepare_shard_texts
from amp.data.shard_texts import ShardTexts
from amp.data.split import ShardSplit
from amp.data.split_captions import SplitCaptions
from amp.data.stream import KnowledgeCollator
from amp.model.clip import ActionAwareCLIP
from amp.retrieval.split_search import SplitSearch
from amp.terminal import Terminal
from amp.train.config import TrainConfig
from amp.train.mining import confusable

NEIGHBOURS = 20  # as many as the first stage passes to re-ranking


@dataclass
class Features:
    """Stored features of a run.

    Attributes:
        texts: Features of the training texts; None if they are computed in the step.
        images: Frozen features of the training images; None if the run doesn't use them.
        val_texts, val_images: Features of the validation split; None without validation.
    """

    texts: ShardTexts | None
    images: FrozenFeatures | None
    val_texts: ShardTexts | None
    val_images: FrozenFeatures | None

    @classmethod
    def prepare(
        cls,
        config: TrainConfig,
        model: ActionAwareCLIP,
        split: ShardSplit,
        val_split: ShardSplit | None,
        preprocess,
        terminal: Terminal,
        first: float = 0.0,
    ) -> Features:
        """Opens the features of both splits. Missing ones are computed, together with all processes that call this.

        Args:
            config: Settings of the run.
            model: The model on its device.
            split: Training split.
            val_split: Validation split; None without validation.
            preprocess: The validation transform.
            terminal: Console for progress output.
            first: Where in a split this process starts, as a fraction.
        """
        data = config.data

        def texts(part: ShardSplit) -> ShardTexts:
            return prepare_shard_texts(terminal, part, model, data.cache, data.cache_dtype, first)

        def images(part: ShardSplit, tokens: bool) -> FrozenFeatures:
            return prepare_images(
                terminal,
                part,
                model,
                preprocess,
                data.cache,
                data.cache_dtype,
                data.batch_size,
                data.workers,
                tokens,
                first,
            )

        stored = data.cache_images or config.mined_group > 1
        return cls(
            texts(split) if data.cache_texts else None,
            images(split, data.cache_images) if stored else None,
            None if val_split is None else texts(val_split),
            None if val_split is None else images(val_split, True),
        )

    def confusable_images(self, split: ShardSplit, kinds: Sequence[str], device: torch.device) -> np.ndarray:
        """For each training image, the images that the frozen CLIP confuses with it (`amp.train.mining`)."""
        assert self.texts is not None and self.images is not None, "prepared for mined groups"
        captions = SplitCaptions.read(split, kinds)
        text = torch.from_numpy(self.texts.lookup(captions.texts, _shards(split, captions)))
        base = torch.from_numpy(np.array(self.images.base))
        return confusable(base.to(device), text.to(device), captions.image.to(device), NEIGHBOURS).numpy()

    def validation(
        self, split: ShardSplit, collate: KnowledgeCollator, config: TrainConfig, device: torch.device
    ) -> SplitSearch:
        """The search of the validation split."""
        assert self.val_texts is not None and self.val_images is not None, "prepared for this split"
        captions = SplitCaptions.read(split, config.data.kinds, config.validation.captions_per_image)
        shards = _shards(split, captions)
        of_knowledge = [collate.texts(item) for item in captions.knowledge]
        texts = [text for found in of_knowledge for text in found]
        owners = [shard for shard, found in zip(shards, of_knowledge, strict=True) for _ in found]
        return SplitSearch(
            captions,
            self.val_images,
            torch.from_numpy(self.val_texts.lookup(captions.texts, shards)),
            collate.with_states(captions.knowledge, self.val_texts.lookup(texts, owners) if texts else None),
            config.validation,
            device,
        )


def _shards(split: ShardSplit, captions: SplitCaptions) -> list[str]:
    """`ShardInfo.texts` of each caption's shard."""
    return [split.shards[split.shard_of(image)].texts for image in captions.image.tolist()]
