"""Pre-selection by the frozen CLIP: the top-k candidates of each query, and the rank of its best positive."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from amp.errors import AmpError
from amp.retrieval.metrics import rank_of_best_positive, require_finite, stable_topk

# Scores in memory at once: 2^22 float32 are 16 MB, or about 150 MB with the masks and sums of the ranking.
CHUNK_SCORES = 1 << 22


@dataclass(frozen=True)
class Positives:
    """The positives of each query: the gallery items of the query's image.

    Stored as image labels, which avoids a mask of Q x G.

    Args:
        query_image: (Q,) int64, the image index of each query.
        gallery_image: (G,) int64, the image index of each gallery item.
    """

    query_image: Tensor
    gallery_image: Tensor

    def rows(self, start: int, stop: int) -> Tensor:
        """Mask of the positives of queries start to stop, bool (stop - start, G)."""
        return self.query_image[start:stop, None] == self.gallery_image

    def of(self, candidates: Tensor) -> Tensor:
        """Mask of the positives among candidates, bool (Q, k); `candidates` are gallery indices (Q, k)."""
        gallery_image = self.gallery_image.to(candidates.device)
        return gallery_image[candidates] == self.query_image.to(candidates.device)[:, None]

    def to(self, device: torch.device | str) -> "Positives":
        """The same labels on another device."""
        return Positives(self.query_image.to(device), self.gallery_image.to(device))


def t2i_positives(caption_image: Tensor, images: int) -> Positives:
    """Positives of text-to-image retrieval: the image of each caption.

    Args:
        caption_image: (C,) int64, the image index of each caption.
        images: Number of images in the gallery, I.

    Raises:
        AmpError: There is no caption or image, or a caption's image index is out of range.
    """
    _check_caption_image(caption_image, images)
    return Positives(caption_image, torch.arange(images, device=caption_image.device))


def i2t_positives(caption_image: Tensor, images: int) -> Positives:
    """Positives of image-to-text retrieval: all captions of the image.

    Args:
        caption_image: (C,) int64, the image index of each caption.
        images: Number of query images, I.

    Raises:
        AmpError: There is no caption or image, a caption's image index is out of range, or an image has no caption.
    """
    _check_caption_image(caption_image, images)
    captions = torch.bincount(caption_image, minlength=images)
    if (captions == 0).any():
        bare = (captions == 0).nonzero()[:, 0].tolist()
        raise AmpError(
            f"{len(bare):,} of {images:,} images have no caption (first: image {bare[0]}); expected at least one per "
            "image, because an image without captions can't be a query; leave these images out"
        )
    return Positives(torch.arange(images, device=caption_image.device), caption_image)


def _check_caption_image(caption_image: Tensor, images: int) -> None:
    if len(caption_image) == 0 or images == 0:
        raise AmpError(
            f"gallery of {images:,} images and {len(caption_image):,} captions; expected at least one of each; "
            "check the name of the split"
        )
    low, high = int(caption_image.min()), int(caption_image.max())
    if low < 0 or high >= images:
        raise AmpError(f"captions have image indices {low} to {high}; expected indices from 0 to {images - 1}")


@dataclass(frozen=True)
class FirstStage:
    """The frozen CLIP's ranking for Q queries.

    Args:
        candidates: (Q, k) int64 gallery indices, best first, ties by gallery index.
        scores: (Q, k) float32 cosine similarities of the candidates.
        ranks: (Q,) int64, 0-based rank of the best positive in the whole gallery: k or more if no candidate is a
            positive.
    """

    candidates: Tensor
    scores: Tensor
    ranks: Tensor


@torch.no_grad()
def first_stage(query_features: Tensor, gallery_features: Tensor, positives: Positives, k: int) -> FirstStage:
    """Ranks the gallery by cosine similarity and keeps the top k.

    Queries are processed in chunks, so memory grows with Q * k and G, but not with Q * G. Scores are always float32,
    even under autocast, because hundreds of bfloat16 scores would tie.

    Args:
        query_features: (Q, d) features, L2-normalized here.
        gallery_features: (G, d) features on the same device, L2-normalized here.
        positives: The positives of the Q queries among the G items.
        k: Number of candidates per query; limited to G.

    Returns:
        FirstStage on the features' device.

    Raises:
        AmpError: k is below 1, a feature is not finite, or a query has no positive in the gallery.
        ValueError: The shapes don't match.
    """
    if k < 1:
        raise AmpError(f"top-k of the first stage is {k}, expected at least 1 (paper: 20)")
    expected = (len(positives.query_image), len(positives.gallery_image))
    if (len(query_features), len(gallery_features)) != expected:
        raise ValueError(f"features of {(len(query_features), len(gallery_features))} items, positives of {expected}")
    device = query_features.device
    with torch.autocast(device.type, enabled=False):
        query_features = F.normalize(query_features.float(), dim=-1)
        gallery_features = F.normalize(gallery_features.float(), dim=-1)
        require_finite(query_features, "query features")
        require_finite(gallery_features, "gallery features")
        positives = positives.to(device)
        gallery = len(gallery_features)
        k = min(k, gallery)
        chunk = max(1, CHUNK_SCORES // gallery)
        # Filled in place. Keeping a small result per chunk would fragment the heap (by gigabytes for COCO).
        queries = len(query_features)
        candidates = torch.empty(queries, k, dtype=torch.int64, device=device)
        best = torch.empty(queries, k, device=device)
        ranks = torch.empty(queries, dtype=torch.int64, device=device)
        for start in range(0, queries, chunk):
            stop = min(start + chunk, queries)
            scores = query_features[start:stop] @ gallery_features.T
            best[start:stop], candidates[start:stop] = stable_topk(scores, k)
            ranks[start:stop] = rank_of_best_positive(scores, positives.rows(start, stop))
    if (ranks == gallery).any():
        raise AmpError(
            f"{int((ranks == gallery).sum()):,} of {len(ranks):,} queries have no positive in the gallery (first: "
            f"query {int((ranks == gallery).nonzero()[0])}); expected at least one per query"
        )
    return FirstStage(candidates, best, ranks)


def first_stage_in_folds(
    query_features: Tensor,
    gallery_features: Tensor,
    positives: Positives,
    k: int,
    fold: Tensor,
) -> FirstStage:
    """Like `first_stage`, but each query searches only its own fold of the images, such as COCO's five folds of 1,000.

    Args:
        query_features, gallery_features, positives, k: See `first_stage`.
        fold: Fold of each image, int64 (I,).

    Returns:
        FirstStage with candidates as indices of the whole gallery and ranks within the fold.

    Raises:
        AmpError: See `first_stage`; or a fold is empty.
    """
    gallery_fold, query_fold = fold[positives.gallery_image], fold[positives.query_image]
    sizes = torch.bincount(gallery_fold)
    if (sizes == 0).any():
        raise AmpError(f"{len(sizes)} folds of {len(fold)} images, of which one is empty; use fewer folds")
    if len(sizes) == 1:
        return first_stage(query_features, gallery_features, positives, k)
    k = min(k, int(sizes.min()))  # all queries need the same number of candidates
    queries = len(query_features)
    candidates = torch.empty(queries, k, dtype=torch.int64, device=query_features.device)
    scores = torch.empty(queries, k, device=query_features.device)
    ranks = torch.empty(queries, dtype=torch.int64, device=query_features.device)
    for number in query_fold.unique().tolist():
        rows, items = ((x == number).nonzero()[:, 0] for x in (query_fold, gallery_fold))
        within = Positives(positives.query_image[rows], positives.gallery_image[items])
        found = first_stage(query_features[rows], gallery_features[items], within, k)
        candidates[rows], scores[rows] = items.to(found.candidates.device)[found.candidates], found.scores
        ranks[rows] = found.ranks
    return FirstStage(candidates, scores, ranks)
