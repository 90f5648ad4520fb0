"""Exports the action-aware image encoder with torch.export, as a graph that runs without this package."""

import io
import os
from pathlib import Path

import torch
import torch.nn as nn

from amp.errors import AmpError
from amp.files import write_atomically
from amp.knowledge.tensors import Captions, KnowledgeBatch
from amp.knowledge.text import SLOT_TOKENS
from amp.model.clip import ActionAwareCLIP

INPUTS = ("images", "triplet_tokens", "token_mask", "states", "mask", "text")


class ImageEncoder(nn.Module):
    """Encodes images, each with the knowledge of one caption, to action-aware features.

    All inputs and outputs are tensors, as torch.export requires.

    Args:
        model: Model that conditions images on knowledge.

    Raises:
        AmpError: The model does not condition images on knowledge.
    """

    def __init__(self, model: ActionAwareCLIP):
        super().__init__()
        if not model.interaction.conditioned:
            raise AmpError(
                "this model does not condition images on knowledge, expected an action-aware adapter, not a control"
            )
        self.model = model

    def forward(
        self,
        images: torch.Tensor,
        triplet_tokens: torch.Tensor,
        token_mask: torch.Tensor,
        states: torch.Tensor,
        mask: torch.Tensor,
        text: torch.Tensor,
    ) -> torch.Tensor:
        """Encodes images under knowledge.

        Args:
            images: Images, (B, 3, H, W).
            triplet_tokens, token_mask, states, mask: The tensors of a `KnowledgeBatch` of B captions.
            text: Frozen features of the captions, (B, d). Only `readout` uses them.

        Returns:
            Features, (B, d), not normalized.
        """
        knowledge = KnowledgeBatch(triplet_tokens, token_mask, states, mask)
        return self.model(images, Captions(knowledge, text)).conditioned


def export_image_encoder(model: ActionAwareCLIP, path: str | os.PathLike | None = None) -> torch.export.ExportedProgram:
    """Exports `ImageEncoder` with a dynamic batch size.

    Args:
        model: Model in eval mode, on the device on which the graph will run.
        path: `.pt2` file to write, for `torch.export.load`; None writes no file.

    Returns:
        The exported program. Its inputs have the names in `INPUTS`.

    Raises:
        AmpError: The model does not condition images on knowledge, or the path can't be written.
    """
    encoder, backbone, config = ImageEncoder(model).eval(), model.backbone, model.config
    device, size = model.logit_scale.device, backbone.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    rows, slots = 2, (config.max_triplets, 3, SLOT_TOKENS)
    example = (
        torch.zeros(rows, 3, height, width, device=device),
        torch.zeros(rows, *slots, dtype=torch.int64, device=device),
        torch.ones(rows, *slots, dtype=torch.bool, device=device),
        torch.zeros(rows, config.max_triplets, backbone.embed_dim, device=device),
        torch.ones(rows, config.max_triplets, dtype=torch.bool, device=device),
        torch.zeros(rows, backbone.embed_dim, device=device),
    )
    batch = torch.export.Dim("batch", min=1, max=65_536)
    with torch.no_grad():
        program = torch.export.export(encoder, example, dynamic_shapes=tuple({0: batch} for _ in example))
    if path is not None:
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        write_atomically(Path(path), buffer.getvalue())
    return program
