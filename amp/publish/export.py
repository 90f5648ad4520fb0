"""The action-aware image encoder as a graph that runs without this package: torch.export."""

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
    """Images, each with the knowledge of one caption, to action-aware features: tensors in, a tensor out.

    Args:
        model: A model whose images see knowledge.

    Raises:
        AmpError: The model is a control.
    """

    def __init__(self, model: ActionAwareCLIP):
        super().__init__()
        if not model.interaction.conditioned:
            raise AmpError("this model's images see no knowledge, expected an action-aware adapter, not a control")
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
        """Images (B, 3, H, W), a `KnowledgeBatch` of B captions as its four tensors, and the captions' frozen features
        (B, d), which only `readout` reads, to features (B, d), not normalised."""
        knowledge = KnowledgeBatch(triplet_tokens, token_mask, states, mask)
        return self.model(images, Captions(knowledge, text)).conditioned


def export_image_encoder(model: ActionAwareCLIP, path: str | os.PathLike | None = None) -> torch.export.ExportedProgram:
    """Exports `ImageEncoder` for any number of images.

    Args:
        model: Model in eval mode, on the device that the graph is for.
        path: ``.pt2`` file for `torch.export.load`; None writes none.

    Returns:
        The program; its inputs are named as in `INPUTS`.

    Raises:
        AmpError: The model is a control, or the path can't be written.
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
