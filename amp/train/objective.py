"""The loss of one step: which features are computed, which pairs are scored, and the stage's loss over them.

`paired` and controls score all N x N pairs of the global batch with one feature per image. `contrastive` scores an
image conditioned on the knowledge of the text that it is scored against, so that a match doesn't give itself away. It
scores all N x N pairs if the interaction can, such as `readout`, and otherwise each image's own pair and sampled
negatives. With sampled negatives, stage 1 also scores all N x N pairs without knowledge. This costs one feature per
image and keeps the coarse ranking, which a few hard negatives would unlearn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from amp.data.stream import Batch
from amp.distributed import all_gather, all_gather_with_grad, rank, world_size
from amp.knowledge.tensors import Captions, KnowledgeBatch
from amp.model.clip import ActionAwareCLIP
from amp.model.interactions.base import Interaction
from amp.model.similarity import pair_similarity, similarity
from amp.train import losses
from amp.train.negatives import draw_negatives, gumbel_noise

if TYPE_CHECKING:
    from amp.train.config import TrainConfig


@dataclass
class Objective:
    """Loss of one stage.

    Args:
        stage: 1 for eq. 10, 2 for eq. 11.
        interaction: The model's interaction, which determines the pairs that can be scored.
        conditioning: `paired` is the literal eq. 10, `contrastive` is our choice; no effect on controls.
        negatives: Sampled negatives per direction for `contrastive`, m (our choice).
        margin: Margin of eq. 11, alpha (our choice).
        sampling_scale: 1 / tau of the frozen CLIP, which sharpens the draw of negatives: a number, or a 0-d tensor,
            because the weights of a plan have no values.
        seed: Random seed of the run.
        knowledge_dropout: Probability with which a step drops a triplet and its state.
        combined: Stage 1 minimises the sum of eq. 10 and eq. 11 (Table 5, "combined training").
    """

    stage: int
    interaction: Interaction
    conditioning: Literal["contrastive", "paired"] = "contrastive"
    negatives: int = 2
    margin: float = 0.2
    sampling_scale: float | torch.Tensor = 1.0
    seed: int = 0
    knowledge_dropout: float = 0.0
    combined: bool = False

    @classmethod
    def of(cls, config: "TrainConfig", stage: int, model: ActionAwareCLIP) -> "Objective":
        """The objective of a stage of a run."""
        return cls(
            stage,
            model.interaction,
            config.conditioning,
            config.negatives,
            config.margin,
            model.backbone.clip.logit_scale.detach().exp().reshape(()),
            config.seed,
            config.knowledge_dropout,
            config.combined,
        )

    @property
    def all_pairs(self) -> bool:
        """Whether every image of the global batch is conditioned on every caption."""
        return self.conditioning == "contrastive" and self.interaction.scores_all_pairs

    @property
    def samples(self) -> bool:
        """Whether images are conditioned on their own captions and on sampled negatives."""
        return self.conditioning == "contrastive" and self.interaction.conditioned and not self.all_pairs

    def __call__(self, model, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and logit scale of a step of one batch; see `parts`."""
        return next(self.parts(model, [batch], step))

    def parts(self, model, batches: Sequence[Batch], step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields the losses of one optimizer step, to be backpropagated one by one. Their mean gradient is the step's.

        With gradient accumulation, every micro-batch is scored against the whole global batch, but its loss
        backpropagates only through its own micro-batch. The rows of the others come from a pass without gradients. With
        sampled negatives, each batch has a loss of its own, because negatives are drawn within it.

        Args:
            model: `ActionAwareCLIP`, or the engine around it. It is only called; its attributes are not used.
            batches: Batches of this rank, on the model's device. Their number and size must be the same on every rank.
            step: Step of the stage, which seeds the draw of negatives and the knowledge dropout.

        Yields:
            Loss (a scalar, the same on every rank except for sampling) and logit scale (1,).
        """
        if self.knowledge_dropout:
            batches = self._without_some_knowledge(batches, step)
        if self.samples:
            for number, batch in enumerate(batches, start=step * len(batches)):
                yield self._contrastive(model, batch, number)
            return
        everyone = None  # the captions of all ranks and batches
        if self.all_pairs:
            everyone = Captions(
                KnowledgeBatch.cat([batch.knowledge.map(all_gather) for batch in batches]),
                torch.cat([all_gather(batch.text) for batch in batches]),
            )
        kept: list[tuple[torch.Tensor, ...]] = [()]  # a placeholder for the only batch
        if len(batches) > 1:
            with torch.no_grad():
                kept = [tuple(map(all_gather, self._rows(model, batch, everyone)[:-1])) for batch in batches]
        ignore = losses.same_image_mask(torch.cat([all_gather(batch.image_ids) for batch in batches]))
        for number, batch in enumerate(batches):
            *rows, scale = self._rows(model, batch, everyone)
            parts = list(kept)
            # The gradient of a batch passes through only one of the losses, and their mean divides by their number.
            parts[number] = tuple(all_gather_with_grad(scale_gradient(x, len(batches))) for x in rows)
            image, *text = (torch.cat(kind) for kind in zip(*parts, strict=True))
            yield self._loss(similarity(image, *text) if text else image, scale, ignore), scale

    def _rows(self, model, batch: Batch, everyone: Captions | None):
        """This rank's rows of the cosine matrix if images are conditioned on `everyone`, else its image and caption
        features.

        The last value is the logit scale.
        """
        if everyone is not None:
            features = model(batch.images, everyone, "all")
            return pair_similarity(features.conditioned, features.captions.text), features.logit_scale
        features = model(batch.images, Captions(batch.knowledge, batch.text))
        return features.conditioned, features.captions.text, features.logit_scale

    def _loss(self, cosines: torch.Tensor, scale: torch.Tensor, ignore: torch.Tensor) -> torch.Tensor:
        if self.stage == 2:
            return losses.triplet_loss(cosines, self.margin, ignore)
        loss = losses.contrastive_loss(cosines, scale, ignore)
        return loss + losses.triplet_loss(cosines, self.margin, ignore) if self.combined else loss

    def _without_some_knowledge(self, batches: Sequence[Batch], step: int) -> list[Batch]:
        """Applies knowledge dropout, drawn for the global batch so that the number of processes and batches doesn't
        matter."""
        size, k = batches[0].knowledge.mask.shape
        drawn = np.random.default_rng([self.seed, step, 2]).random((len(batches), world_size(), size, k))
        out = []
        for batch, part in zip(batches, drawn, strict=True):
            kept = torch.from_numpy(part[rank()] >= self.knowledge_dropout)
            out.append(replace(batch, knowledge=batch.knowledge.keep(kept.to(batch.knowledge.mask.device))))
        return out

    def _contrastive(self, model, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        early, base = batch.images, batch.base
        if base is None:
            frozen = model(early)
            early, base = frozen.early, frozen.base
        # Gather the frozen tokens of all ranks, because negatives for texts are images of the global batch.
        early, base = all_gather(early), all_gather(base)
        text, ids = all_gather(batch.text), all_gather(batch.image_ids)
        knowledge = batch.knowledge.map(all_gather)
        size, total = len(batch.text), len(text)
        m = min(self.negatives, total - 1)
        own = torch.arange(rank() * size, (rank() + 1) * size, device=text.device)
        cosines, forbidden = similarity(base, text), ids[:, None] == ids[None, :]
        texts_of_image = self._draw(cosines, forbidden, own, m, step, direction=0)
        images_of_text = self._draw(cosines.T, forbidden, own, m, step, direction=1)
        # Rows that this rank encodes: all of them or, with many ranks, its own and those it has drawn.
        images = texts = torch.arange(total, device=text.device)
        mine, drawn_texts, drawn_images = own, texts_of_image.columns.flatten(), images_of_text.columns.flatten()
        if total > size + size * m:
            images, texts = torch.cat([mine, drawn_images]), torch.cat([mine, drawn_texts])
            mine = torch.arange(size, device=text.device)
            drawn_texts = drawn_images = size + torch.arange(size * m, device=text.device)
        # Pairs in three groups: (own image, own caption), (own image, drawn captions), (drawn images, own caption).
        repeated = mine.repeat_interleave(m)
        image_index = torch.cat([mine, repeated, drawn_images])
        text_index = torch.cat([mine, drawn_texts, repeated])
        plain = mine if self.stage == 1 else None
        features = model(early[images], Captions(knowledge[texts], text[texts]), (image_index, text_index), plain)
        scores = pair_similarity(features.conditioned, features.captions.text[text_index])
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
            image, text = (all_gather_with_grad(x) for x in (features.plain, features.captions.text[mine]))
            loss = loss + losses.contrastive_loss(
                similarity(image, text), features.logit_scale, losses.same_image_mask(ids)
            )
        return loss, features.logit_scale

    def _draw(self, cosines, forbidden, own, m, step, direction):
        rows, columns = cosines.shape
        noise = gumbel_noise(rows, columns, self.seed, step, direction).to(cosines.device)
        return draw_negatives(cosines[own], forbidden[own], noise[own], m, self.sampling_scale)


def scale_gradient(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Returns the same values with a gradient `factor` times as large."""
    return x if factor == 1 else x.detach() + factor * (x - x.detach())
