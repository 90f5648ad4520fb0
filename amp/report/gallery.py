"""A picture of some retrievals, before and after re-ranking, in the manner of the paper's Figure 5.

Drawing knows nothing of models or datasets: it takes images, strings, scores and marks.
"""

import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from amp.errors import AmpError
from amp.report.drawing import (
    CARD,
    CARD_EDGE,
    CHIP,
    CHIP_INK,
    INK,
    MAT,
    MUTED,
    PAGE,
    RIGHT,
    RIGHT_TINT,
    WRONG,
    WRONG_TINT,
    Font,
    clean,
    draw_lines,
    draw_text,
    fill_rounded,
    fit_image,
    rounded_mask,
    save_picture,
    stamp,
    wrap,
)

# Pixels. A card is text, then two groups of TOP hits; all widths follow from these.
TOP = 3
MARGIN, PAD, GAP = 28, 26, 14
TEXT_WIDTH, THUMB, GROUP_GAP = 410, 168, 46
GROUP_WIDTH = TOP * THUMB + (TOP - 1) * GAP
GROUP_X = (PAD + TEXT_WIDTH + GROUP_GAP, PAD + TEXT_WIDTH + GROUP_WIDTH + 2 * GROUP_GAP)
CARD_WIDTH = GROUP_X[1] + GROUP_WIDTH + PAD
FRAME, RADIUS, BADGE = 6, 12, 34
QUERY_HEIGHT = 230  # of the query image in an image-to-text card


@dataclass(frozen=True)
class ImageHit:
    """A retrieved image.

    Args:
        image: Any mode and size.
        score: The score it was ranked by.
        right: Whether it answers the query.
    """

    image: Image.Image
    score: float
    right: bool


@dataclass(frozen=True)
class CaptionHit:
    """A retrieved caption.

    Args:
        caption: Its text.
        score: The score it was ranked by.
        right: Whether it answers the query.
    """

    caption: str
    score: float
    right: bool


@dataclass(frozen=True)
class TextToImage:
    """A caption and the first images of both rankings, best first; `TOP` of each are drawn.

    Args:
        caption: The query.
        triplets: Its knowledge as text, e.g. "girl, studies at, laptop".
        base: First images of the base model.
        reranked: First images after re-ranking.
    """

    caption: str
    triplets: Sequence[str]
    base: Sequence[ImageHit]
    reranked: Sequence[ImageHit]


@dataclass(frozen=True)
class ImageToText:
    """An image and the first captions of both rankings, best first; `TOP` of each are drawn.

    Args:
        image: The query.
        base: First captions of the base model.
        reranked: First captions after re-ranking.
    """

    image: Image.Image
    base: Sequence[CaptionHit]
    reranked: Sequence[CaptionHit]


def choose_queries(
    base_ranks: Sequence[int],
    reranked_ranks: Sequence[int],
    count: int,
    groups: Sequence[Hashable] | None = None,
) -> list[int]:
    """Queries worth showing: those that re-ranking mended most, and as the last one the one that it broke worst.

    Mended is a first place won, broken a first place lost. With nothing broken the place goes to a query that
    fell without holding the first place; if none fell either, to one more of the others. Places that mended queries
    leave free go to queries that rose, then to those that stood still, then to the rest. Ties go to the lower index.

    Args:
        base_ranks: (Q,) 0-based rank of each query's best positive by the base model.
        reranked_ranks: (Q,) the same after re-ranking.
        count: How many to choose; fewer if there are fewer queries.
        groups: (Q,) labels, of which none is shown twice while others are left (the image of each caption, say).

    Returns:
        Distinct query indices, in the order of showing.
    """
    base, new = [int(r) for r in base_ranks], [int(r) for r in reranked_ranks]
    if len(base) != len(new) or (groups is not None and len(groups) != len(base)):
        raise ValueError(f"{len(base)} base ranks, {len(new)} re-ranked ranks and the groups differ in number")
    if count < 1:
        return []

    def worth(q: int) -> tuple:
        kind = 0 if new[q] == 0 < base[q] else 1 if new[q] < base[q] else 2 if new[q] == base[q] else 3
        return kind, new[q] - base[q], new[q], q

    by_worth = sorted(range(len(base)), key=worth)
    fallen = [q for q in range(len(base)) if new[q] > base[q]]
    worst = min(fallen, key=lambda q: (base[q] > 0, base[q] - new[q], q), default=None)
    last = [worst] if worst is not None and count > 1 else []
    label = list(range(len(base))) if groups is None else list(groups)
    chosen: list[int] = []
    seen = {label[q] for q in last}
    for repeats in (False, True):
        for q in by_worth:
            if len(chosen) + len(last) < count and q not in chosen + last and (repeats or label[q] not in seen):
                chosen.append(q)
                seen.add(label[q])
    return chosen + last


def outcome_note(base_ranks: Sequence[int], reranked_ranks: Sequence[int]) -> str:
    """How often re-ranking won and lost the first place over all queries, to stand beside the chosen few."""
    pairs = [(int(b), int(n)) for b, n in zip(base_ranks, reranked_ranks, strict=True)]
    mended = sum(new == 0 < base for base, new in pairs)
    broken = sum(base == 0 < new for base, new in pairs)
    return f"of all {len(pairs):,} queries, re-ranking mended {mended:,} and broke {broken:,} (first place won, lost)"


def draw_gallery(
    path: str | os.PathLike,
    text_to_image: Sequence[TextToImage] = (),
    image_to_text: Sequence[ImageToText] = (),
    base_name: str = "base CLIP",
    reranked_name: str = "action-aware",
    t2i_note: str = "",
    i2t_note: str = "",
) -> Path:
    """Draws both directions into one picture.

    Args:
        path: File of the picture, PNG, JPEG or WebP by its suffix; written under a temporary name, then renamed.
        text_to_image: Caption queries, a card each.
        image_to_text: Image queries, a card each.
        base_name: Heading of the left ranking.
        reranked_name: Heading of the right ranking.
        t2i_note: Small print beside the heading of the caption queries (`outcome_note`).
        i2t_note: The same for the image queries.

    Raises:
        AmpError: There is nothing to draw, the suffix is another one, or the path can't be written.
    """
    if not text_to_image and not image_to_text:
        raise AmpError(
            f"{path}: no query to draw, expected a caption or an image at least; look for an empty test split"
        )
    blocks = []
    sections = (
        ("Text to image", t2i_note, [_text_card(example) for example in text_to_image]),
        ("Image to text", i2t_note, [_image_card(example) for example in image_to_text]),
    )
    for title, note, cards in sections:
        if cards:
            blocks += [_heading(title, note, base_name, reranked_name), *cards]
    height = 2 * MARGIN + sum(block.height + GAP for block in blocks) - GAP
    page = Image.new("RGB", (CARD_WIDTH + 2 * MARGIN, height), PAGE)
    y = MARGIN
    for block in blocks:
        page.paste(block, (MARGIN, y))
        y += block.height + GAP
    return save_picture(path, page)


# Blocks


def _heading(title: str, note: str, base_name: str, reranked_name: str) -> Image.Image:
    """Title and small print of a section, and above the groups the names of the two rankings."""
    lines = wrap(note, Font(17), TEXT_WIDTH, 2)
    block = Image.new("RGB", (CARD_WIDTH, 100), PAGE)
    draw = ImageDraw.Draw(block)
    draw_text(draw, (PAD, 10), title, INK, Font(30, bold=True), anchor="la")
    draw_lines(draw, (PAD, 53), lines, MUTED, Font(17), 22)
    for x, name in zip(GROUP_X, (base_name, reranked_name), strict=True):
        line = wrap(name, Font(23, bold=True), GROUP_WIDTH, 1)[0]
        draw_text(draw, (x, 53), line, INK, Font(23, bold=True), anchor="la")
        draw.line((x, 92, x + GROUP_WIDTH, 92), "#c3cad4", 2)
    return block


def _text_card(example: TextToImage) -> Image.Image:
    """A caption with its triplets, and two groups of images."""
    caption = wrap(f"“{clean(example.caption)}”", Font(22), TEXT_WIDTH, 6)
    chips, chips_height = _place_chips(example.triplets)
    card, draw = _card(max(44 + 29 * len(caption) + 14 + chips_height, THUMB + 34))
    _verdict(card, draw, (PAD, PAD), example.base, example.reranked)
    top = draw_lines(draw, (PAD, PAD + 44), caption, INK, Font(22), 29) + 14
    for x, y, width, text in chips:
        fill_rounded(card, (PAD + x, top + y, PAD + x + width, top + y + 28), 8, CHIP)
        draw_text(draw, (PAD + x + 12, top + y + 14), text, CHIP_INK, Font(17))
    for x, hits in zip(GROUP_X, (example.base, example.reranked), strict=True):
        for hit in hits[:TOP]:
            colour = RIGHT if hit.right else WRONG
            box = (x, PAD, x + THUMB, PAD + THUMB)
            fill_rounded(card, box, RADIUS, colour)
            inner = THUMB - 2 * FRAME
            mask = rounded_mask((inner, inner), RADIUS - FRAME)
            card.paste(fit_image(hit.image, (inner, inner)), (x + FRAME, PAD + FRAME), mask)
            stamp(card, hit.right, BADGE, (x + THUMB - BADGE + 6, PAD + THUMB - BADGE + 6))
            draw_text(draw, (x + 4, PAD + THUMB + 21), f"{hit.score:.3f}", colour, Font(18))
            x += THUMB + GAP
    return card


def _place_chips(triplets: Sequence[str]) -> tuple[list[tuple[int, int, int, str]], int]:
    """Lays triplets out in lines: (x, y, width, text) of each from the corner of the first, and the height of all."""
    x, y, chips = 0, 0, []
    for triplet in triplets:
        text = wrap(triplet, Font(17), TEXT_WIDTH - 24, 1)[0]
        width = round(Font(17).getlength(text)) + 24
        if x and x + width > TEXT_WIDTH:
            x, y = 0, y + 34
        chips.append((x, y, width, text))
        x += width + 6
    return chips, y + 28 if chips else 0


def _image_card(example: ImageToText) -> Image.Image:
    """An image, and two groups of captions."""
    text_width = GROUP_WIDTH - 116  # between badge and score
    groups = [
        [(hit, wrap(hit.caption, Font(19), text_width, 4)) for hit in hits[:TOP]]
        for hits in (example.base, example.reranked)
    ]
    heights = [sum(26 * len(lines) + 20 + 10 for _, lines in group) - 10 for group in groups if group]
    card, draw = _card(max([44 + QUERY_HEIGHT, *heights]))
    _verdict(card, draw, (PAD, PAD), example.base, example.reranked)
    scale = min(TEXT_WIDTH / example.image.width, QUERY_HEIGHT / example.image.height)
    size = (max(1, round(example.image.width * scale)), max(1, round(example.image.height * scale)))
    x, y = PAD, PAD + 44
    fill_rounded(card, (x - 1, y - 1, x + size[0] + 1, y + size[1] + 1), 11, CARD_EDGE)
    card.paste(fit_image(example.image, size), (x, y), rounded_mask(size, 10))
    for x, group in zip(GROUP_X, groups, strict=True):
        y = PAD
        for hit, lines in group:
            colour, tint = (RIGHT, RIGHT_TINT) if hit.right else (WRONG, WRONG_TINT)
            bottom = y + 26 * len(lines) + 20
            fill_rounded(card, (x, y, x + GROUP_WIDTH, bottom), 8, tint)
            stamp(card, hit.right, 26, (x + 10, y + 10))
            draw_lines(draw, (x + 46, y + 10), lines, INK, Font(19), 26)
            draw_text(draw, (x + GROUP_WIDTH - 12, y + 23), f"{hit.score:.3f}", colour, Font(17), anchor="rm")
            y = bottom + 10
    return card


def _card(content_height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty card with room for content of that height."""
    height = content_height + 2 * PAD
    card = Image.new("RGB", (CARD_WIDTH, height), PAGE)
    fill_rounded(card, (0, 0, CARD_WIDTH, height), 16, CARD_EDGE)
    fill_rounded(card, (1, 1, CARD_WIDTH - 1, height - 1), 15, CARD)
    return card, ImageDraw.Draw(card)


def _verdict(card: Image.Image, draw: ImageDraw.ImageDraw, at: tuple[int, int], base: Sequence, new: Sequence) -> None:
    """A pill that says what re-ranking did to the first place."""
    before, after = bool(base) and base[0].right, bool(new) and new[0].right
    text, ink, tint = {
        (False, True): ("mended", RIGHT, RIGHT_TINT),
        (True, False): ("broken", WRONG, WRONG_TINT),
        (True, True): ("right before and after", MUTED, MAT),
        (False, False): ("wrong before and after", MUTED, MAT),
    }[before, after]
    width = round(Font(16, bold=True).getlength(text)) + 26
    fill_rounded(card, (*at, at[0] + width, at[1] + 28), 14, tint)
    draw_text(draw, (at[0] + 13, at[1] + 14), text, ink, Font(16, bold=True))
