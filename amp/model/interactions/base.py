"""The interface of interactions, which combine images with knowledge."""

from typing import ClassVar, NamedTuple

import torch
import torch.nn as nn

from amp.knowledge.tensors import Captions
from amp.model.prompted_tower import PromptedTower


class Prompts(NamedTuple):
    """An interaction's encoding of C captions.

    Each interaction has its own K. Pooled scoring concatenates the rows of several captions along K (`unite`), so
    `pairs` must accept any K and combine the rows that exist.

    Attributes:
        parts: Any number of tensors (C, K, ...), the same K in all of them.
        mask: Which of the K exist, bool (C, K).
    """

    parts: tuple[torch.Tensor, ...]
    mask: torch.Tensor

    def take(self, index: torch.Tensor) -> "Prompts":
        """Selects captions by an index, int64 (P,)."""
        return Prompts(tuple(part[index] for part in self.parts), self.mask[index])

    def unite(self, captions: int) -> "Prompts":
        """Joins each run of n = `captions` rows into one: (C, K, ...) -> (C / n, n K, ...)."""
        parts, mask = (
            [x.unflatten(0, (-1, captions)).flatten(1, 2) for x in tensors] for tensors in (self.parts, [self.mask])
        )
        return Prompts(tuple(parts), mask[0])


class Interaction(nn.Module):
    """Combines images with knowledge. Everything that differs between interactions is in these methods.

    Subclasses take `(backbone, triplets, states, **options)`: the frozen CLIP, and whether there are triplets and
    states.

    Attributes:
        conditioned: Whether image features depend on the caption. False in controls, which override `image_features`.
        control: Name of the interaction that replaces it if there is no knowledge; None keeps it.
        reads_triplets, reads_states: Whether it reads these kinds of knowledge if there are any.
        reads_caption: Whether `encode_captions` needs the captions' own features.
        scores_all_pairs: Whether `all_pairs` costs about as much as one feature per image, so that training scores each
            image under each caption of the batch.
        trains: Whether it has trainable parameters.
        stage2: Prefix of the model's parameters that the second training stage trains.
    """

    conditioned: ClassVar[bool] = True
    control: ClassVar[str | None] = "visual_prompts"
    reads_triplets: ClassVar[bool] = True
    reads_states: ClassVar[bool] = True
    reads_caption: ClassVar[bool] = False
    scores_all_pairs: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    stage2: ClassVar[str] = "interaction."

    def encode_captions(self, captions: Captions, triplets: torch.Tensor | None) -> Prompts:
        """Encodes C captions, once per caption.

        Args:
            captions: Knowledge of the captions and, with `reads_caption`, their features.
            triplets: Triplet prompts (C, K, d_t) of eq. 4-5; None if the model reads none. They are defined only where
                `captions.knowledge.mask` is True, and in row 0 of captions without a triplet (the null token).
        """
        raise NotImplementedError

    def encode_images(self, tower: PromptedTower, early: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Encodes B images, once per image. Returns tensors with B rows, which can be stored.

        Args:
            tower: The image tower from the first prompted block on.
            early: Input tokens of that block (B, F + M, d_v).
        """
        return (early,)

    def pairs(
        self, tower: PromptedTower, images: tuple[torch.Tensor, ...], prompts: Prompts, image_index: torch.Tensor
    ) -> torch.Tensor:
        """Image features of P pairs (P, d), not normalised.

        Args:
            tower: See `encode_images`.
            images: Return value of `encode_images` for B images.
            prompts: Prompts of the pairs' captions, P rows.
            image_index: The image of each pair, int64 (P,) with values below B.
        """
        raise NotImplementedError

    def all_pairs(self, tower: PromptedTower, images: tuple[torch.Tensor, ...], prompts: Prompts) -> torch.Tensor:
        """Image features of all pairs of B images and C captions, (B, C, d)."""
        count, captions = len(images[0]), len(prompts.mask)
        image_index = torch.arange(count, device=prompts.mask.device).repeat_interleave(captions)
        repeated = prompts.take(torch.arange(captions, device=prompts.mask.device).repeat(count))
        return self.pairs(tower, images, repeated, image_index).unflatten(0, (count, captions))

    def image_features(self, tower: PromptedTower, early: torch.Tensor) -> torch.Tensor:
        """Image features without knowledge (B, d), with visual prompts only."""
        return tower.features(early)

    def attention(
        self, tower: PromptedTower, early: torch.Tensor, captions: Captions, triplets: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Attention maps over the patches of one image, for each triplet of one caption separately.

        Args:
            tower, triplets: See `encode_images` and `encode_captions`.
            early: Tokens of one image (1, F + M, d_v).
            captions: One caption.

        Returns:
            `triplet` and `state`, each (K', M) for the K' triplets that exist, with rows that sum to one. Empty for
            interactions without such maps.
        """
        return {}


class Unconditioned(Interaction):
    """A control: image features are the same for all captions."""

    conditioned: ClassVar[bool] = False
    control: ClassVar[str | None] = None
    reads_triplets: ClassVar[bool] = False
    reads_states: ClassVar[bool] = False

    def encode_captions(self, captions: Captions, triplets: torch.Tensor | None) -> Prompts:
        return Prompts((), captions.knowledge.mask)

    def encode_images(self, tower: PromptedTower, early: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.image_features(tower, early),)

    def pairs(self, tower, images, prompts, image_index):
        return images[0][image_index]
