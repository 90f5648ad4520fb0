"""First-stage mining: which training images the frozen CLIP confuses, the distribution that re-ranking sees."""

import torch
import torch.nn.functional as F

CHUNK = 4_096


@torch.no_grad()
def confusable(base: torch.Tensor, text: torch.Tensor, owner: torch.Tensor, k: int) -> torch.Tensor:
    """For each image the k others that the frozen CLIP takes most easily for it, best first.

    Images i and j are as close as the mean of what retrieval would compare: image i with j's captions and image j with
    i's captions. Memory grows with I x `CHUNK`.

    Args:
        base: The frozen CLIP's image features (I, d).
        text: Its caption features (C, d).
        owner: The image of each caption, int64 (C,).
        k: Neighbours to keep; all others where there are fewer.

    Returns:
        int64 (I, min(k, I - 1)).
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
