"""The parts of a model as modules on plain tensors, and their export with dynamic batch sizes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection, export

from amp.knowledge.tensors import Captions, KnowledgeBatch
from amp.knowledge.text import SLOT_TOKENS
from amp.model.clip import ActionAwareCLIP, EncodedCaptions
from amp.model.similarity import pair_similarity

Sizes = dict[int, Dim]
IMAGES, CAPTIONS, PAIRS = ({0: Dim(name, min=1, max=65_536)} for name in ("images", "captions", "pairs"))
CAPTION_INPUTS = ("triplet_tokens", "token_mask", "states", "mask", "text")


class ImageGraph(nn.Module):
    """What is computed once per image: the frozen CLIP's feature, and the interaction's encoding of the image."""

    def __init__(self, model: ActionAwareCLIP):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Encodes images.

        Args:
            pixels: Preprocessed images (B, 3, H, W).

        Returns:
            Features (B, d) for the first stage, and any number of tensors with B rows for `PairGraph`.
        """
        first = self.model(pixels)
        return first.base, *self.model(first.early).images


class TextGraph(nn.Module):
    """The frozen text tower, which encodes captions and the texts of their knowledge."""

    def __init__(self, model: ActionAwareCLIP):
        super().__init__()
        self.backbone = model.backbone

    def forward(self, tokens: Tensor) -> Tensor:
        """Encodes texts.

        Args:
            tokens: Token ids (B, T). T is the context length. If the tower is causal, padding after the longest text
                may be cut off, which saves time and changes nothing.

        Returns:
            Features (B, d), not normalized.
        """
        if self.backbone.cuts_padding:
            return self.backbone.encode_cut_text(tokens)
        return self.backbone.clip.encode_text(tokens)


class PairGraph(nn.Module):
    """The scores of pairs of an image and a caption, equal to those of `PairScorer`."""

    def __init__(self, model: ActionAwareCLIP):
        super().__init__()
        self.model = model

    def forward(
        self,
        triplet_tokens: Tensor,
        token_mask: Tensor,
        states: Tensor,
        mask: Tensor,
        text: Tensor,
        image_index: Tensor,
        caption_index: Tensor,
        *parts: Tensor,
    ) -> Tensor:
        """Scores P pairs of B images and C captions.

        Args:
            triplet_tokens, token_mask, states, mask: The tensors of a `KnowledgeBatch` of C captions.
            text: Features of the captions from `TextGraph`, (C, d).
            image_index, caption_index: The image and the caption of each pair, int64 (P,) each.
            *parts: Outputs of `ImageGraph` after the first, B rows each.

        Returns:
            Cosines of image and caption features, (P,).
        """
        knowledge = KnowledgeBatch(triplet_tokens, token_mask, states, mask)
        prompts, text = self.model(None, Captions(knowledge, text)).captions
        features = self.model(parts, EncodedCaptions(prompts, None), (image_index, caption_index)).conditioned
        return pair_similarity(features, text[caption_index])


def example_images(model: ActionAwareCLIP, count: int = 2) -> Tensor:
    """Black images (B, 3, H, W) on the model's device."""
    size = model.backbone.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.zeros(count, 3, height, width, device=model.logit_scale.device)


def example_captions(model: ActionAwareCLIP, count: int = 3) -> tuple[Tensor, ...]:
    """Values of `CAPTION_INPUTS` for C captions on the model's device."""
    device, triplets, width = model.logit_scale.device, model.config.max_triplets, model.backbone.embed_dim
    slots = (count, triplets, 3, SLOT_TOKENS)
    return (
        torch.zeros(*slots, dtype=torch.int64, device=device),
        torch.ones(*slots, dtype=torch.bool, device=device),
        torch.zeros(count, triplets, width, device=device),
        torch.ones(count, triplets, dtype=torch.bool, device=device),
        torch.zeros(count, width, device=device),
    )


def example_tokens(model: ActionAwareCLIP) -> tuple[Tensor, Sizes]:
    """Token ids of two texts on the model's device, and their dynamic dimensions."""
    length, device = model.backbone.context_length, model.logit_scale.device
    sizes = {0: Dim("texts", min=1, max=65_536)}
    if model.backbone.cuts_padding:
        # torch.export excludes the size of the tower's tables, although the graph works with it.
        length -= 1
        sizes[1] = Dim("tokens", min=1, max=length)
    return torch.zeros(2, length, dtype=torch.int64, device=device), sizes


def export_graph(module: nn.Module, inputs: Sequence[Tensor], sizes: Sequence[Sizes]) -> ExportedProgram:
    """Exports a module for inputs of any size.

    Args:
        module: Module to export.
        inputs: Example inputs, all different tensors.
        sizes: The dynamic dimensions of each input.
    """
    shapes = ShapesCollection()
    for tensor, size in zip(inputs, sizes, strict=True):
        shapes[tensor] = size
    with torch.no_grad():
        return export(module.eval(), tuple(inputs), dynamic_shapes=shapes)
