"""First-stage mining: finds training images that the frozen CLIP confuses, as re-ranking will see them."""

import torch
import torch.nn.functional as F

CHUNK = 4_096


@torch.no_grad()
def confusable(base: torch.Tensor, text: torch.Tensor, owner: torch.Tensor, k: int) -> torch.Tensor:
    """For each image, the k other images that the frozen CLIP most easily confuses with it, most similar first.

    Similarity is what retrieval would compare: image i with the mean of j's captions, plus image j with the mean of i's
    captions. Memory grows with I x `CHUNK`.

    Args:
        base: The frozen CLIP's image features (I, d).
        text: The frozen CLIP's caption features (C, d).
        owner: Index of each caption's image, int64 (C,).
        k: Neighbours to keep; all others if there are fewer.

    Returns:
        Indices of images, int64 (I, min(k, I - 1)).
    """
    base = F.normalize(base.float(), dim=-1)
    captions = torch.zeros_like(base).index_add_(0, owner, F.normalize(text.float(), dim=-1))
    captions = captions / torch.bincount(owner, minlength=len(base)).clamp(min=1).unsqueeze(1)
    k = min(k, len(base) - 1)
    found = torch.empty(len(base), k, dtype=torch.int64)
    for start in range(0, len(base), CHUNK):
        rows = slice(start, start + CHUNK)
        close = base[rows] @ captions.T + captions[rows] @ base.T
        close[torch.arange(len(close)), torch.arange(start, start + len(close))] = float("-inf")
        found[rows] = close.topk(k, dim=1).indices.cpu()
    return found
