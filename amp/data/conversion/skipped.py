"""Checks how much was left out of the shards, and lists it for the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from amp.data.captions.base import CAPTION_KINDS, SKIP_KINDS, CaptionedImage, Skip
from amp.errors import AmpError, too_many_skipped


def check_skipped(skipped: list[Skip], kept: list[CaptionedImage], allowed: float, file: str) -> None:
    """Checks that at most the fraction `allowed` of the images, and of the captions, is left out.

    Raises:
        AmpError: More is left out.
    """
    images, captions = sum(skip.kind not in CAPTION_KINDS for skip in skipped), sum(skip.captions for skip in skipped)
    lost = {
        "images": (images, images + len(kept)),
        "captions": (captions, captions + sum(len(image.captions) for image in kept)),
    }
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(skip.kind for skip in skipped).items())
    reasons = [f"{skip.file or '(no file)'}: {skip.reason}" for skip in skipped]
    note = f"no manifest was written; {kinds}"
    if message := too_many_skipped(file, lost, "--max_skipped", allowed, reasons, note):
        raise AmpError(message)


def by_kind(skipped: Iterable[Skip]) -> dict[str, list[dict[str, Any]]]:
    """The manifest's `skipped` entry. Every kind is present; its list is empty if nothing of this kind was skipped."""
    kinds: dict[str, list[dict[str, Any]]] = {kind: [] for kind in SKIP_KINDS}
    for skip in skipped:
        kinds[skip.kind].append(skip.to_dict())
    return kinds
