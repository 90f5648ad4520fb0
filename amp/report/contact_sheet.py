"""A contact sheet: the photos that a search found, with scores and what re-ranking did to their places."""

import os
from pathlib import Path

from PIL import Image, ImageDraw

from amp.data.images.file import open_photo
from amp.errors import AmpError, printable
from amp.report.drawing import (
    CARD,
    CARD_EDGE,
    CHIP,
    CHIP_INK,
    INK,
    MUTED,
    PAGE,
    RIGHT,
    WRONG,
    Font,
    draw_lines,
    draw_text,
    fill_rounded,
    fit_image,
    rounded_mask,
    save_picture,
    wrap,
)
from amp.search.retriever import Found, Hit
from amp.terminal import Terminal

COLUMNS, THUMB, GAP, MARGIN, CAPTION = 4, 260, 18, 30, 58
WIDTH = 2 * MARGIN + COLUMNS * THUMB + (COLUMNS - 1) * GAP


def draw_contact_sheet(path: str | os.PathLike, found: Found) -> Path:
    """Draws the hits of a search as PNG, JPEG or WebP, by the suffix of `path`.

    Raises:
        AmpError: There is no hit, the suffix is another one, or the path can't be written.
    """
    if not found.hits:
        raise AmpError(f"{path}: no photo was found, expected at least one to draw")
    title = wrap(found.query, Font(30, bold=True), WIDTH - 2 * MARGIN, 3)
    chips = [
        wrap(f"{t.subject} · {t.action}" + (f" · {t.object}" if t.object else ""), Font(18), 600, 1)[0]
        for t in found.knowledge.triplets
    ]
    states = [line for s in found.knowledge.states for line in wrap(s, Font(17), WIDTH - 2 * MARGIN, 2)]
    top = MARGIN + 40 * len(title) + (46 if chips else 8) + 24 * len(states) + 14
    rows = -(-len(found.hits) // COLUMNS)
    page = Image.new("RGB", (WIDTH, top + rows * (THUMB + CAPTION + GAP) + MARGIN), PAGE)
    draw = ImageDraw.Draw(page)
    y = draw_lines(draw, (MARGIN, MARGIN), title, INK, Font(30, bold=True), 40)
    x = MARGIN
    for chip in chips:
        width = round(Font(18).getlength(chip)) + 24
        if x + width > WIDTH - MARGIN:
            break
        fill_rounded(page, (x, y + 4, x + width, y + 34), 8, CHIP)
        draw_text(draw, (x + 12, y + 19), chip, CHIP_INK, Font(18))
        x += width + 8
    draw_lines(draw, (MARGIN, y + (46 if chips else 8)), states, MUTED, Font(17), 24)
    unreadable = []
    for number, hit in enumerate(found.hits):
        row, column = divmod(number, COLUMNS)
        at = (MARGIN + column * (THUMB + GAP), top + row * (THUMB + CAPTION + GAP))
        if not _photo(page, draw, at, number, hit):
            unreadable.append(str(hit.path))
    if unreadable:
        names = ", ".join(unreadable[:5]) + (", ..." if len(unreadable) > 5 else "")
        Terminal(True).say(printable(f"{len(unreadable):,} of the photos found can't be read for the picture: {names}"))
    return save_picture(path, page)


def _photo(page: Image.Image, draw: ImageDraw.ImageDraw, at: tuple[int, int], number: int, hit: Hit) -> bool:
    """Draws a hit; returns whether its photo could be read."""
    x, y = at
    box = (x, y, x + THUMB, y + THUMB + CAPTION)
    fill_rounded(page, box, 12, CARD_EDGE)
    fill_rounded(page, (x + 1, y + 1, box[2] - 1, box[3] - 1), 11, CARD)
    image = Image.new("RGB", (1, 1), CARD_EDGE)
    try:
        image, there = open_photo(hit.path), True
    except Exception:  # gone since the search, or damaged since it was indexed
        there = False
    size = (THUMB - 12, THUMB - 12)
    page.paste(fit_image(image, size), (x + 6, y + 6), rounded_mask(size, 8))
    if not there:
        draw_text(draw, (x + 20, y + THUMB // 2), "can't be read", MUTED, Font(18))
    rose = hit.base_rank - number
    move, colour = (f"up {rose}", RIGHT) if rose > 0 else (f"down {-rose}", WRONG) if rose < 0 else ("same", MUTED)
    line = y + THUMB + 14
    draw_text(draw, (x + 12, line), f"{number + 1}", INK, Font(19, bold=True))
    draw_text(draw, (x + 46, line), f"{hit.score:.3f}", INK, Font(18))
    draw_text(draw, (x + THUMB - 12, line), f"{move} (CLIP: {hit.base_rank + 1})", colour, Font(16), anchor="rm")
    name = wrap(hit.path.name, Font(15), THUMB - 24, 1)[0]
    draw_text(draw, (x + 12, line + 26), name, MUTED, Font(15))
    return there
