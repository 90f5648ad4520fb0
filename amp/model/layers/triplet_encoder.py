"""Action triplet prompts: encodes the words of K triplets as K prompt features (paper, eq. 4-5)."""

import torch
import torch.nn as nn

from amp.model.layers.transformer_block import TransformerBlock


class TripletEncoder(nn.Module):
    """Slot means of frozen token embeddings, concatenated and mixed by a small transformer (eq. 4-5).

    The K triplets of a caption are a set: there is no positional embedding, so permuting them permutes the output.
    The three slots of one triplet keep their order, since each has its own part of the projection.

    Args:
        width: Channels of CLIP's token embedding, d_t.
        layers: Transformer layers (our choice: 2).
        heads: Attention heads (our choice: 8).
    """

    def __init__(self, width: int, layers: int = 2, heads: int = 8):
        super().__init__()
        # Our addition: token embeddings of a trained CLIP have a scale of about 0.01, so the bias would dominate them.
        self.norm = nn.LayerNorm(3 * width)
        self.project = nn.Linear(3 * width, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(layers))
        self.null = nn.Parameter(0.02 * torch.randn(width))

    def forward(self, embedded: torch.Tensor, token_mask: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Encodes the triplets of C captions.

        Args:
            embedded: Token embeddings (C, K, 3, S, d_t).
            token_mask: Which of the S tokens of a slot exist, bool (C, K, 3, S). A slot without tokens becomes a zero
                vector.
            mask: Which of the K triplets exist, bool (C, K). A caption without triplets gets the learned null token.

        Returns:
            Prompt features p_t (C, K, d_t). Rows where `mask` is False are undefined, except row 0 with a null token.
        """
        present = token_mask.unsqueeze(-1).to(embedded.dtype)
        slots = (embedded * present).sum(dim=-2) / present.sum(dim=-2).clamp(min=1)
        prompts, mask = with_null(self.project(self.norm(slots.flatten(-2))), mask, self.null)
        padding = ~mask
        for block in self.blocks:
            prompts = block(prompts, padding)
        return prompts


def with_null(prompts: torch.Tensor, mask: torch.Tensor, null: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Puts a learned null token into row 0 of captions that have no prompt.

    This way no softmax sees only masked keys. The null token is also part of every graph (with a zero gradient if no
    caption is empty), so distributed training has no unused parameters.

    Args:
        prompts: Prompts of C captions (C, K, D).
        mask: Which prompts exist, bool (C, K).
        null: The null token (D,).

    Returns:
        Prompts (C, K, D), and mask (C, K) with at least one True per row.
    """
    first = null_rows(mask)
    return torch.where(first.unsqueeze(-1), null.to(prompts.dtype), prompts), mask | first


def null_rows(mask: torch.Tensor) -> torch.Tensor:
    """Where `with_null` puts the null token: row 0 of captions without any prompt, bool (C, K)."""
    first = torch.zeros_like(mask)
    first[:, 0] = ~mask.any(dim=1)
    return first
