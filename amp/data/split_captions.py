"""All captions of a split."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from amp.data.split import ShardSplit
from amp.knowledge.schema import Knowledge
from amp.knowledge.text import tower_texts
from amp.terminal import Terminal


@dataclass
class SplitCaptions:
    """The C captions of a split, in order.

    Attributes:
        texts: Text of each caption.
        knowledge: Knowledge of each caption.
        image: Index of each caption's image, int64 (C,).
        images: Number of images.
    """

    texts: list[str]
    knowledge: list[Knowledge]
    image: torch.Tensor
    images: int

    @classmethod
    def read(cls, split: ShardSplit, keep: Sequence[str], captions_per_image: int = 0) -> "SplitCaptions":
        """Reads the captions of a split: the first `captions_per_image` of each image, or all for 0."""
        texts, knowledge, image = [], [], []
        for index, record in enumerate(split.records()):
            for text, item in split.captions(record, keep)[: captions_per_image or None]:
                texts.append(text)
                knowledge.append(item)
                image.append(index)
        return cls(texts, knowledge, torch.tensor(image), len(split))

    def say_without_knowledge(self, terminal: Terminal) -> None:
        """Prints how many captions have no triplet, if there are any."""
        if lacking := sum(not item.triplets for item in self.knowledge):
            terminal.say(f"{lacking:,} of {len(self.texts):,} captions without knowledge")

    def all_texts(self, max_triplets: int, setting: str = "both") -> list[str]:
        """All texts that need a feature: captions, and the knowledge texts for `PromptConfig.knowledge`."""
        return self.texts + [text for item in self.knowledge for text in tower_texts(item, max_triplets, setting)]
