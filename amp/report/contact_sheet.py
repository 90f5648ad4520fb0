"""A contact sheet: the photos that a search found, with their scores and the rank changes by re-ranking."""

import os
from pathlib import Path

from PIL import Image

from amp.data.images.file import open_photo
from amp.errors import AmpError, printable
from amp.report.drawing import CARD, CARD_EDGE, CHIP, CHIP_INK, MUTED, RIGHT, WRONG, Page, line_height
from amp.report.fonts import wrap
from amp.search.retriever import Found, Hit
from amp.terminal import Terminal

COLUMNS, THUMB, GAP, MARGIN, LABEL = 4, 2.2, 0.15, 0.25, 0.5  # inches
WIDTH = COLUMNS * THUMB + (COLUMNS - 1) * GAP
TITLE, KNOWLEDGE = 18.0, 10.0  # points


def draw_contact_sheet(path: str | os.PathLike, found: Found) -> Path:
    """Draws the hits of a search as PNG, JPEG or WebP, by the suffix of `path`.

    Raises:
        AmpError: There is no hit, the suffix is unknown, the picture is too large, or the path can't be written.
    """
    if not found.hits:
        raise AmpError(f"{path}: no photo was found, expected at least one to draw")
    title = wrap(found.query, WIDTH, TITLE, 3, bold=True)
    slots = [" · ".join(filter(None, (t.subject, t.action, t.object))) for t in found.knowledge.triplets]
    chips = [wrap(text, WIDTH - 0.1, KNOWLEDGE, 1)[0] for text in slots]
    states = [line for state in found.knowledge.states for line in wrap(state, WIDTH, KNOWLEDGE, 2)]
    chip = 1.35 * line_height(KNOWLEDGE)
    head = line_height(TITLE) * len(title) + chip * len(chips) + line_height(KNOWLEDGE) * len(states) + 0.3
    rows = -(-len(found.hits) // COLUMNS)
    page = Page(WIDTH + 2 * MARGIN, 2 * MARGIN + head + rows * (THUMB + LABEL + GAP) - GAP)
    y = page.text(MARGIN, MARGIN, title, TITLE, bold=True) + 0.1
    y = page.text(MARGIN + 0.05, y, chips, KNOWLEDGE, CHIP_INK, tint=CHIP)
    page.text(MARGIN, y, states, KNOWLEDGE, MUTED)
    unreadable = []
    for number, hit in enumerate(found.hits):
        row, column = divmod(number, COLUMNS)
        x, y = MARGIN + column * (THUMB + GAP), MARGIN + head + row * (THUMB + LABEL + GAP)
        if not _draw_hit(page, x, y, number, hit):
            unreadable.append(str(hit.path))
    if unreadable:
        names = ", ".join(unreadable[:5]) + (", ..." if len(unreadable) > 5 else "")
        Terminal(True).say(printable(f"{len(unreadable):,} of the photos found can't be read for the picture: {names}"))
    return page.save(path)


def _draw_hit(page: Page, x: float, y: float, number: int, hit: Hit) -> bool:
    """Draws a hit; returns whether its photo could be read."""
    page.box(x, y, THUMB, THUMB + LABEL, CARD, CARD_EDGE)
    try:
        image, readable = open_photo(hit.path), True
    except Exception:  # removed since the search, or damaged since it was indexed
        image, readable = Image.new("RGB", (1, 1), CARD_EDGE), False
    page.photo(x + 0.05, y + 0.05, THUMB - 0.1, THUMB - 0.1, image)
    if not readable:
        page.text(x + 0.2, y + THUMB / 2, ["can't be read"], 11, MUTED)
    rose = hit.base_rank - number
    move, colour = (f"up {rose}", RIGHT) if rose > 0 else (f"down {-rose}", WRONG) if rose < 0 else ("same", MUTED)
    page.text(x + 0.1, y + THUMB + 0.02, [str(number + 1)], 11, bold=True)
    page.text(x + 0.45, y + THUMB + 0.02, [f"{hit.score:.3f}"], 10)
    page.text(x + THUMB - 0.1, y + THUMB + 0.02, [f"{move} (CLIP: {hit.base_rank + 1})"], 9, colour, right=True)
    page.text(x + 0.1, y + THUMB + 0.24, wrap(hit.path.name, THUMB - 0.2, 8.5, 1), 8.5, MUTED)
    return readable
