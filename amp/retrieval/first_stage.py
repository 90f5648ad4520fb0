"""Pre-selection by the frozen CLIP: the top-k candidates of each query, and where its best positive stands."""

from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from amp.errors import AmpError, require
from amp.retrieval.metrics import KS, rank_of_best_positive, require_finite, stable_topk

# Scores held at once: 2^22 float32 are 16 MB, some 150 MB with the masks and sums of ranking.
CHUNK_SCORES = 1 << 22


@dataclass(frozen=True)
class Positives:
    """Which gallery items answer which query: those of the query's image, kept as labels so that no Q x G mask exists.

    Args:
        query_image: (Q,) int64, the image index of each query.
        gallery_image: (G,) int64, the image index of each gallery item.
    """

    query_image: Tensor
    gallery_image: Tensor

    def rows(self, start: int, stop: int) -> Tensor:
        """(stop - start, G) bool mask of the queries from start to stop."""
        return self.query_image[start:stop, None] == self.gallery_image

    def of(self, candidates: Tensor) -> Tensor:
        """(Q, k) bool mask of candidates given as (Q, k) gallery indices."""
        gallery_image = self.gallery_image.to(candidates.device)
        return gallery_image[candidates] == self.query_image.to(candidates.device)[:, None]

    def to(self, device: torch.device | str) -> "Positives":
        """The same labels on another device."""
        return Positives(self.query_image.to(device), self.gallery_image.to(device))


def t2i_positives(caption_image: Tensor, images: int) -> Positives:
    """Positives of text-to-image retrieval: every caption has one, its image.

    Args:
        caption_image: (C,) int64, the image index of each caption.
        images: Number of images in the gallery, I.

    Raises:
        AmpError: A caption names an image outside the gallery.
    """
    _check_caption_image(caption_image, images)
    return Positives(caption_image, torch.arange(images, device=caption_image.device))


def i2t_positives(caption_image: Tensor, images: int) -> Positives:
    """Positives of image-to-text retrieval: all captions of the image.

    Args:
        caption_image: (C,) int64, the image index of each caption.
        images: Number of query images, I.

    Raises:
        AmpError: A caption names an image outside the queries, or an image has no caption and could never be a hit.
    """
    _check_caption_image(caption_image, images)
    captions = torch.bincount(caption_image, minlength=images)
    if (captions == 0).any():
        bare = (captions == 0).nonzero()[:, 0].tolist()
        raise AmpError(
            f"{len(bare):,} of {images:,} images have no caption (first: image {bare[0]}), expected at least one each: "
            "without captions an image can't be a query of image-to-text retrieval. Leave these images out"
        )
    return Positives(torch.arange(images, device=caption_image.device), caption_image)


def _check_caption_image(caption_image: Tensor, images: int) -> None:
    if len(caption_image) == 0 or images == 0:
        raise AmpError(
            f"gallery of {images:,} images and {len(caption_image):,} captions, expected at least one of each. "
            "Look whether the split's name is right"
        )
    low, high = int(caption_image.min()), int(caption_image.max())
    if low < 0 or high >= images:
        raise AmpError(f"captions name images {low} to {high}, expected indices from 0 to {images - 1}")


@dataclass(frozen=True)
class FirstStage:
    """The frozen CLIP's answer to Q queries.

    Args:
        candidates: (Q, k) int64 gallery indices, best first, ties by gallery index.
        scores: (Q, k) float32 cosine similarities of the candidates.
        ranks: (Q,) int64, 0-based rank of the best positive in the WHOLE gallery, so k or more for a query without
            a positive among its candidates; the gallery's size where it isn't known (`faiss`).
    """

    candidates: Tensor
    scores: Tensor
    ranks: Tensor


@torch.no_grad()
def first_stage(query_features: Tensor, gallery_features: Tensor, positives: Positives, k: int) -> FirstStage:
    """Top-k of a full cosine ranking, in chunks of queries: memory grows with Q*k and G, never with Q*G.

    Scores are float32 whatever the features' type and any autocast around: bfloat16 scores tie in the hundreds.

    Args:
        query_features: (Q, d) features; they are L2-normalised here.
        gallery_features: (G, d) features on the same device; they are L2-normalised here.
        positives: The answers of the Q queries within the G items.
        k: Candidates to keep a query; the whole gallery if it holds fewer (`candidates.shape[1]` tells).

    Returns:
        FirstStage on the features' device.

    Raises:
        AmpError: k below 1, features that are not finite, or a query without any positive in the gallery.
        ValueError: Shapes don't fit.
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
        # Filled in place: small results kept between the chunks would scatter the heap (GB at COCO size).
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
            f"query {int((ranks == gallery).nonzero()[0])}), expected at least one each: they could never be a hit"
        )
    return FirstStage(candidates, best, ranks)


@torch.no_grad()
def faiss_first_stage(query_features: Tensor, gallery_features: Tensor, positives: Positives, k: int) -> FirstStage:
    """As `first_stage`, from faiss-cpu's exact inner-product index, which holds the gallery once and no row of scores.

    Equal candidates and scores but for ties, which Faiss breaks as it likes, and for the last bit of a dot product. An
    answer that is not among the k has the gallery's size as its rank.

    Raises:
        AmpError: As `first_stage`, faiss is not installed, or k is below the largest K of R@K.
    """
    faiss = usable_faiss(k)
    missing = ~torch.isin(positives.query_image, positives.gallery_image)
    if missing.any():
        raise AmpError(f"{int(missing.sum()):,} of {len(missing):,} queries have no positive in the gallery")
    features = []
    for name, x in (("query", query_features), ("gallery", gallery_features)):
        x = F.normalize(x.float(), dim=-1)
        require_finite(x, f"{name} features")
        features.append(np.ascontiguousarray(x.cpu().numpy()))
    query, gallery = features
    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(gallery)
    scores, candidates = (torch.from_numpy(x) for x in index.search(query, min(k, len(gallery))))
    order = candidates.argsort(dim=1)  # equal scores in the gallery's order
    order = order.gather(1, scores.gather(1, order).sort(dim=1, descending=True, stable=True).indices)
    scores, candidates = scores.gather(1, order), candidates.gather(1, order)
    hit = positives.to("cpu").of(candidates)
    ranks = torch.where(hit.any(1), hit.int().argmax(1), len(gallery))
    return FirstStage(*(x.to(query_features.device) for x in (candidates, scores, ranks)))


def usable_faiss(k: int) -> ModuleType:
    """The module faiss, for a first stage that keeps k candidates.

    Raises:
        AmpError: It is not installed, or k is below the largest K of R@K.
    """
    if k < max(KS):
        raise AmpError(f"top-k is {k} with the first stage 'faiss', expected at least {max(KS)}: it ranks no more")
    return require("faiss", "the first stage 'faiss'")


def first_stage_in_folds(
    query_features: Tensor,
    gallery_features: Tensor,
    positives: Positives,
    k: int,
    fold: Tensor,
    engine: Literal["exact", "faiss"] = "exact",
) -> FirstStage:
    """The first stage of each query within its own fold of the images, as COCO's five folds of 1,000 images.

    Args:
        query_features, gallery_features, positives, k: As for `first_stage`.
        fold: Of each image, int64 (I,).
        engine: `first_stage` or `faiss_first_stage`.

    Returns:
        Candidates are indices of the whole gallery, ranks are those within the fold.

    Raises:
        AmpError: As `first_stage`, or a fold is empty.
    """
    search = {"exact": first_stage, "faiss": faiss_first_stage}[engine]
    gallery_fold, query_fold = fold[positives.gallery_image], fold[positives.query_image]
    sizes = torch.bincount(gallery_fold)
    if (sizes == 0).any():
        raise AmpError(f"{len(sizes)} folds of {len(fold)} images leave one empty; ask for fewer folds")
    if len(sizes) == 1:
        return search(query_features, gallery_features, positives, k)
    k = min(k, int(sizes.min()))  # candidates are a rectangle
    queries = len(query_features)
    candidates = torch.empty(queries, k, dtype=torch.int64, device=query_features.device)
    scores = torch.empty(queries, k, device=query_features.device)
    ranks = torch.empty(queries, dtype=torch.int64, device=query_features.device)
    for number in query_fold.unique().tolist():
        rows, items = ((x == number).nonzero()[:, 0] for x in (query_fold, gallery_fold))
        within = Positives(positives.query_image[rows], positives.gallery_image[items])
        found = search(query_features[rows], gallery_features[items], within, k)
        candidates[rows], scores[rows] = items.to(found.candidates.device)[found.candidates], found.scores
        ranks[rows] = found.ranks
    return FirstStage(candidates, scores, ranks)
