"""Losses (eq. 10-11), draw probabilities of negatives and confusable images, computed pair by pair."""

import math


def contrastive(cosines, scale, image_ids):
    """Eq. 10, averaged over both directions. Other pairs of the same image are excluded from the sums."""
    n, total = len(cosines), 0.0
    for i in range(n):
        others = [j for j in range(n) if j == i or image_ids[j] != image_ids[i]]
        for row in ([cosines[i][j] for j in others], [cosines[j][i] for j in others]):
            total -= math.log(math.exp(scale * cosines[i][i]) / sum(math.exp(scale * c) for c in row)) / (2 * n)
    return total


def triplet(cosines, margin, image_ids):
    """Eq. 11 with d = 1 - cos, averaged over both directions. The loss of an image without negatives is zero."""
    n, total = len(cosines), 0.0
    for i in range(n):
        others = [j for j in range(n) if image_ids[j] != image_ids[i]]
        for row in ([cosines[i][j] for j in others], [cosines[j][i] for j in others]):
            nearest = min((1 - c for c in row), default=math.inf)
            total += max(0.0, margin + (1 - cosines[i][i]) - nearest) / (2 * n)
    return total


def sampled_contrastive(own, others, log_weights, scale):
    """Eq. 10 of one row over drawn negatives, weighted by the number of negatives that each represents."""
    total = math.exp(scale * own)
    total += sum(math.exp(w) * math.exp(scale * c) for w, c in zip(log_weights, others, strict=True))
    return -math.log(math.exp(scale * own) / total)


def sampled_triplet(own, others, log_weights, margin):
    """Eq. 11 of one row over drawn negatives. Negatives with a log weight of -inf are ignored."""
    nearest = max((c for c, w in zip(others, log_weights, strict=True) if w > -math.inf), default=-math.inf)
    return max(0.0, margin + nearest - own)


def draw_probabilities(cosines, forbidden, scale, uniform=0.1):
    """Probability that each column is the first negative drawn."""
    weight = [0.0 if no else math.exp(scale * c) for c, no in zip(cosines, forbidden, strict=True)]
    share = uniform / sum(not no for no in forbidden)
    return [0.0 if no else (1 - uniform) * w / sum(weight) + share for w, no in zip(weight, forbidden, strict=True)]


def confusable(base, text, owner, k):
    """The k most confusable images of each image, by the mean cosine of either image with the other's captions.

    Args:
        base: Normalized image features.
        text: Normalized caption features.
        owner: The image of each caption.
        k: Number of images.
    """

    def mean_cosine(image, of):
        found = [float(base[image] @ text[c]) for c in range(len(text)) if owner[c] == of]
        return sum(found) / len(found)

    closest = []
    for i in range(len(base)):
        close = {j: mean_cosine(j, i) + mean_cosine(i, j) for j in range(len(base)) if j != i}
        closest.append(sorted(close, key=close.get, reverse=True)[:k])
    return closest
