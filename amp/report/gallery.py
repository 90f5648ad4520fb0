"""A picture of some retrievals before and after re-ranking, similar to Figure 5 of the paper."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from amp.errors import AmpError
from amp.report.drawing import (
    CARD,
    CARD_EDGE,
    CHIP,
    CHIP_INK,
    MAT,
    MUTED,
    RIGHT,
    RIGHT_TINT,
    WRONG,
    WRONG_TINT,
    Page,
    line_height,
)
from amp.report.fonts import wrap

# In inches. A card shows the query and two groups of `TOP` results; all widths are computed from these.
TOP = 3
MARGIN, PAD, GAP = 0.25, 0.2, 0.12
QUERY, THUMB, GROUP_GAP = 3.4, 1.4, 0.4
GROUP = TOP * THUMB + (TOP - 1) * GAP
GROUP_X = (PAD + QUERY + GROUP_GAP, PAD + QUERY + GROUP + 2 * GROUP_GAP)
CARD_WIDTH = GROUP_X[1] + GROUP + PAD
FRAME, HEADING, PHOTO = 0.05, 0.85, 1.9
MOST_TRIPLETS = 6
CAPTION, TRIPLET, SMALL = 12.0, 9.5, 9.5  # points


@dataclass(frozen=True)
class Result:
    """A retrieved image or caption.

    Attributes:
        shown: The image (any mode and size) or the caption.
        score: Score by which it was ranked.
        right: Whether it answers the query.
    """

    shown: Image.Image | str
    score: float
    right: bool


@dataclass(frozen=True)
class Retrieval:
    """A query and the first results of both rankings, best first; `TOP` of each are drawn.

    Attributes:
        query: A caption, whose results are images, or an image, whose results are captions.
        base: First results of the base model.
        reranked: First results after re-ranking.
        triplets: Knowledge of a caption as text, such as "girl, studies at, laptop".
    """

    query: Image.Image | str
    base: Sequence[Result]
    reranked: Sequence[Result]
    triplets: Sequence[str] = ()


def draw_gallery(
    path: str | os.PathLike,
    text_to_image: Sequence[Retrieval] = (),
    image_to_text: Sequence[Retrieval] = (),
    base_name: str = "base CLIP",
    reranked_name: str = "action-aware",
    t2i_note: str = "",
    i2t_note: str = "",
) -> Path:
    """Draws retrievals of both directions into one picture.

    Args:
        path: File of the picture (PNG, JPEG or WebP by its suffix). It is replaced atomically.
        text_to_image: Retrievals of caption queries, one card each.
        image_to_text: Retrievals of image queries, one card each.
        base_name: Heading of the left ranking.
        reranked_name: Heading of the right ranking.
        t2i_note: Small print below the title of the captions' cards, such as `amp.report.choice.outcome_note`.
        i2t_note: The same for the images' cards.

    Raises:
        AmpError: There is nothing to draw, the suffix is unknown, or the path can't be written.
    """
    if not text_to_image and not image_to_text:
        raise AmpError(
            f"{path}: no query to draw, expected at least one caption or image; check whether the test split is empty"
        )
    sections = [("Text to image", t2i_note, text_to_image), ("Image to text", i2t_note, image_to_text)]
    sections = [section for section in sections if section[2]]
    heights = [HEADING + sum(_height(x) + GAP for x in retrievals) for _, _, retrievals in sections]
    page, y = Page(CARD_WIDTH + 2 * MARGIN, 2 * MARGIN + sum(heights)), MARGIN
    for title, note, retrievals in sections:
        page.text(MARGIN, y, [title], 18, bold=True)
        page.text(MARGIN, y + 0.36, wrap(note, QUERY, SMALL, 2), SMALL, MUTED)
        for x, name in zip(GROUP_X, (base_name, reranked_name), strict=True):
            page.text(MARGIN + x, y + 0.42, wrap(name, GROUP, 13, 1, bold=True), 13, bold=True)
        y += HEADING
        for retrieval in retrievals:
            page.box(MARGIN, y, CARD_WIDTH, _height(retrieval), CARD, CARD_EDGE)
            _draw(page, y + PAD, retrieval)
            y += _height(retrieval) + GAP
    return page.save(path)


def _height(retrieval: Retrieval) -> float:
    """Height of a card: that of its query or of its results, whichever is higher."""
    if isinstance(retrieval.query, str):
        triplets = 1.35 * line_height(TRIPLET) * min(len(retrieval.triplets), MOST_TRIPLETS)
        query = line_height(CAPTION) * len(_caption(retrieval.query)) + 0.12 + triplets
        return 2 * PAD + max(0.4 + query, THUMB + 0.3)
    groups = (retrieval.base, retrieval.reranked)
    return 2 * PAD + max(0.4 + PHOTO, *(sum(_result_height(x) for x in group[:TOP]) for group in groups))


def _draw(page: Page, y: float, retrieval: Retrieval) -> None:
    """Draws the query, its outcome, and the results of both rankings."""
    groups = (retrieval.base, retrieval.reranked)
    before, after = (bool(group) and group[0].right for group in groups)
    verdict, ink, tint = {
        (False, True): ("fixed", RIGHT, RIGHT_TINT),
        (True, False): ("broken", WRONG, WRONG_TINT),
        (True, True): ("right before and after", MUTED, MAT),
        (False, False): ("wrong before and after", MUTED, MAT),
    }[before, after]
    left = MARGIN + PAD
    page.text(left + 0.05, y, [verdict], SMALL, ink, bold=True, tint=tint)
    if isinstance(retrieval.query, str):
        below = page.text(left, y + 0.38, _caption(retrieval.query), CAPTION) + 0.12
        triplets = [wrap(text, QUERY - 0.1, TRIPLET, 1)[0] for text in retrieval.triplets[:MOST_TRIPLETS]]
        page.text(left + 0.05, below, triplets, TRIPLET, CHIP_INK, tint=CHIP)
    else:
        page.photo(left, y + 0.38, QUERY, PHOTO, retrieval.query)
    for x, group in zip(GROUP_X, groups, strict=True):
        here = y
        for place, result in enumerate(group[:TOP]):
            colour, tint = (RIGHT, RIGHT_TINT) if result.right else (WRONG, WRONG_TINT)
            mark = "✓" if result.right else "✗"
            if isinstance(result.shown, str):
                height, at = _result_height(result), MARGIN + x
                page.box(at, here, GROUP, height - 0.08, tint)
                page.text(at + 0.1, here + 0.08, [mark], CAPTION, colour, bold=True)
                page.text(at + 0.35, here + 0.08, _result_lines(result), 11)
                page.text(at + GROUP - 0.1, here + 0.08, [f"{result.score:.3f}"], 10, colour, right=True)
                here += height
            else:
                at = MARGIN + x + place * (THUMB + GAP)
                page.box(at, y, THUMB, THUMB, colour)
                page.photo(at + FRAME, y + FRAME, THUMB - 2 * FRAME, THUMB - 2 * FRAME, result.shown)
                page.text(at, y + THUMB + 0.06, [f"{mark} {result.score:.3f}"], 11, colour)


def _caption(text: str) -> list[str]:
    return wrap(f"“{text}”", QUERY, CAPTION, 6)


def _result_lines(result: Result) -> list[str]:
    return wrap(str(result.shown), GROUP - 1.0, 11, 4)


def _result_height(result: Result) -> float:
    return line_height(11) * len(_result_lines(result)) + 0.24
