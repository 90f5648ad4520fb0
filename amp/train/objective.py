"""The loss of one step: which features are computed, which pairs are scored, and the stage's loss over them.

`none` and `paired` score all N x N pairs of the global batch with one feature an image. `contrastive` scores an image
conditioned on the knowledge of the very text it is scored against, so that no image has seen the answer. Beside these
few pairs its stage 1 scores all N x N pairs without knowledge: that costs one feature an image and keeps the coarse
ranking, which a few hard negatives unlearn. With the interaction `readout` all N x N pairs are conditioned instead.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from amp.data.stream import Batch
from amp.distributed import all_gather, all_gather_with_grad, rank, world_size
from amp.knowledge.tensors import KnowledgeBatch
from amp.train import losses
from amp.train.negatives import draw_negatives, gumbel_noise

Conditioning = Literal["none", "paired", "contrastive"]


@dataclass
class Objective:
    """Loss of one stage.

    Args:
        stage: 1 for eq. 10, 2 for eq. 11.
        conditioning: ``paired`` is the literal eq. 10, ``contrastive`` ours, ``none`` the control without knowledge.
        negatives: m, sampled negatives a direction for ``contrastive`` (ours).
        margin: alpha of eq. 11 (ours).
        sampling_scale: 1 / tau of the frozen CLIP, which sharpens the draw of negatives.
        seed: Of the run.
        knowledge_share: Part of this rank's images that are scored under knowledge in a `contrastive` step.
        all_pairs: The model has a `readout`, so that `contrastive` scores all pairs of the global batch.
        knowledge_dropout: Share of the triplets, each with its state, that a step leaves out.
        combined: Stage 1 minimises the sum of eq. 10 and eq. 11 (Table 5, "combined training").
    """

    stage: int
    conditioning: Conditioning
    negatives: int = 2
    margin: float = 0.2
    sampling_scale: float = 1.0
    seed: int = 0
    knowledge_share: float = 1.0
    knowledge_dropout: float = 0.0
    combined: bool = False
    all_pairs: bool = False

    def __call__(self, model, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and logit scale of a step of one batch; see `parts`."""
        return next(self.parts(model, [batch], step))

    def parts(self, model, batches: Sequence[Batch], step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The losses of one optimizer step, to be backpropagated one by one: their mean gradient is the step's.

        Several batches are parts of one global batch: each loss is that of the whole, and its gradient that through its
        own part, where the rows of the others are kept from a pass without gradients. With `contrastive` and no
        readout they are losses of their own, since negatives are drawn within a batch.

        Args:
            model: `ActionAwareCLIP`, or the engine around it; only called, never reached into.
            batches: Of this rank, on the model's device; every rank gives as many, of as many samples.
            step: Of the stage; seeds the draw of negatives and of triplets that are left out.

        Yields:
            Loss (a scalar, the same on every rank up to sampling) and logit scale (1,).
        """
        if self.knowledge_dropout:
            batches = self._without_some_knowledge(batches, step)
        if self.conditioning == "contrastive" and not self.all_pairs:
            for number, batch in enumerate(batches, start=step * len(batches)):
                yield self._contrastive(model, batch, number)
            return
        # Every text is asked of every image with a readout: the texts and knowledge of all ranks and batches.
        everyone = None
        if self.all_pairs and self.conditioning == "contrastive":
            everyone = (
                KnowledgeBatch.cat([batch.knowledge.map(all_gather) for batch in batches]),
                torch.cat([all_gather(batch.text) for batch in batches]),
            )
        kept: list[tuple[torch.Tensor, ...]] = [()]  # the place of the part that is at hand, if it is the only one
        if len(batches) > 1:
            with torch.no_grad():
                kept = [tuple(map(all_gather, self._rows(model, batch, everyone)[:-1])) for batch in batches]
        ignore = losses.same_image_mask(torch.cat([all_gather(batch.image_ids) for batch in batches]))
        for number, batch in enumerate(batches):
            *rows, scale = self._rows(model, batch, everyone)
            parts = list(kept)
            # The gradient of a part passes through one of the losses only, whose mean divides by their number.
            parts[number] = tuple(all_gather_with_grad(scale_gradient(x, len(batches))) for x in rows)
            image, *text = (torch.cat(kind) for kind in zip(*parts, strict=True))
            yield self._loss(losses.similarity(image, *text) if text else image, scale, ignore), scale

    def _rows(self, model, batch: Batch, everyone: tuple[KnowledgeBatch, torch.Tensor] | None):
        """What this rank's images add to the matrix of cosines, and the logit scale: their rows of it with a readout,
        else their features and those of their captions."""
        if everyone is not None:
            knowledge, text = everyone
            features = model(batch.images, knowledge, text=text, all_pairs=True)
            return losses.pair_similarity(features.conditioned, features.text), features.logit_scale
        if self.conditioning == "paired":
            features = model(batch.images, batch.knowledge, text=batch.text)
            return features.conditioned, features.text, features.logit_scale
        features = model(batch.images, batch.knowledge, prompted=True, text=batch.text)
        return features.prompted, features.text, features.logit_scale

    def _loss(self, cosines: torch.Tensor, scale: torch.Tensor, ignore: torch.Tensor) -> torch.Tensor:
        if self.stage == 2:
            return losses.triplet_loss(cosines, self.margin, ignore)
        loss = losses.contrastive_loss(cosines, scale, ignore)
        return loss + losses.triplet_loss(cosines, self.margin, ignore) if self.combined else loss

    def _without_some_knowledge(self, batches: Sequence[Batch], step: int) -> list[Batch]:
        """Drawn for the global batch, of which a rank takes its rows: the same for any processes and parts."""
        size, k = batches[0].knowledge.mask.shape
        drawn = np.random.default_rng([self.seed, step, 2]).random((len(batches), world_size(), size, k))
        out = []
        for batch, part in zip(batches, drawn, strict=True):
            kept = torch.from_numpy(part[rank()] >= self.knowledge_dropout)
            out.append(replace(batch, knowledge=batch.knowledge.keep(kept.to(batch.knowledge.mask.device))))
        return out

    def _contrastive(self, model, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        early, base = batch.images, batch.base
        if early.ndim == 4 or base is None:
            frozen = model(early, only_frozen=True)
            early, base = frozen.early, frozen.base
        # The frozen tokens of all ranks: negatives for texts are images of the global batch.
        early, base = all_gather(early), all_gather(base)
        text, ids = all_gather(batch.text), all_gather(batch.image_ids)
        knowledge = batch.knowledge.map(all_gather)
        size, total = len(batch.text), len(text)
        m = min(self.negatives, total - 1)
        own = torch.arange(rank() * size, (rank() + 1) * size, device=text.device)
        everyone = own
        # The first ones: batches are shuffled.
        size = max(1, round(self.knowledge_share * size))
        own = own[:size]
        cosines, forbidden = losses.similarity(base, text), ids[:, None] == ids[None, :]
        texts_of_image = self._draw(cosines, forbidden, own, m, step, direction=0)
        images_of_text = self._draw(cosines.T, forbidden, own, m, step, direction=1)
        # Rows of the batch this rank needs: all of them, or over many ranks its own and those it has drawn.
        images = texts = torch.arange(total, device=text.device)
        mine, scored, drawn_texts, drawn_images = (
            everyone,
            own,
            texts_of_image.columns.flatten(),
            images_of_text.columns.flatten(),
        )
        if total > len(mine) + size * m:
            images, texts = torch.cat([mine, drawn_images]), torch.cat([mine, drawn_texts])
            mine = torch.arange(len(mine), device=text.device)
            scored = mine[:size]
            drawn_texts = drawn_images = len(mine) + torch.arange(size * m, device=text.device)
        # Pairs in three runs: (own image, own caption), (own image, drawn captions), (drawn images, own caption).
        repeated = scored.repeat_interleave(m)
        image_index, text_index = (
            torch.cat(x) for x in zip((scored, scored), (repeated, drawn_texts), (drawn_images, repeated), strict=True)
        )
        features = model(
            early[images],
            knowledge[texts],
            image_index,
            text_index,
            text=text[texts],
            prompted=mine if self.stage == 1 else False,
        )
        scores = losses.pair_similarity(features.conditioned, features.text[text_index])
        positive, by_image, by_text = scores.split([size, size * m, size * m])
        parts = []
        for negative, drawn in ((by_image, texts_of_image), (by_text, images_of_text)):
            negative = negative.view(size, m)
            if self.stage == 1:
                parts.append(
                    losses.candidate_contrastive_loss(positive, negative, drawn.log_weight, features.logit_scale)
                )
            if self.stage == 2 or self.combined:
                parts.append(losses.candidate_triplet_loss(positive, negative, drawn.log_weight, self.margin))
        loss = sum(parts[1:], start=parts[0]) / 2
        if self.stage == 1:
            image, text = (all_gather_with_grad(x) for x in (features.prompted, features.text[mine]))
            plain = losses.contrastive_loss(
                losses.similarity(image, text), features.logit_scale, losses.same_image_mask(ids)
            )
            # A mean over all images, of which only the share has conditioned pairs: few pairs are a noisy estimate.
            loss = plain + self.knowledge_share * loss
        return loss, features.logit_scale

    def _draw(self, cosines, forbidden, own, m, step, direction):
        rows, columns = cosines.shape
        noise = gumbel_noise(rows, columns, self.seed, step, direction).to(cosines.device)
        return draw_negatives(cosines[own], forbidden[own], noise[own], m, self.sampling_scale)


def scale_gradient(x: torch.Tensor, factor: int) -> torch.Tensor:
    """The same values, whose gradient is `factor` times as large."""
    return x if factor == 1 else x.detach() + factor * (x - x.detach())
