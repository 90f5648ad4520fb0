"""Exports the action-aware image encoder with torch.export, as a graph that runs without this package."""

import io
import os
from pathlib import Path

import torch
import torch.nn as nn

from amp.errors import AmpError
from amp.files import write_atomically
from amp.knowledge.tensors import Captions, KnowledgeBatch
from amp.model.clip import ActionAwareCLIP
from amp.publish.graphs import CAPTION_INPUTS, PAIRS, example_captions, example_images, export_graph

INPUTS = ("images", *CAPTION_INPUTS)


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
    inputs = (example_images(model, 2), *example_captions(model, 2))
    program = export_graph(ImageEncoder(model), inputs, [PAIRS] * len(inputs))
    if path is not None:
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        write_atomically(Path(path), buffer.getvalue())
    return program
