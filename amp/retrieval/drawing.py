"""Text and shapes for pictures that Pillow draws."""

from bisect import bisect_right
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

PAGE, CARD, CARD_EDGE, MAT = "#f3f5f8", "#ffffff", "#dfe4ea", "#eef1f5"
INK, MUTED, CHIP, CHIP_INK = "#1b2330", "#667180", "#e9eefb", "#33508f"
RIGHT, WRONG, RIGHT_TINT, WRONG_TINT = "#18864b", "#cf3a3f", "#e4f4eb", "#fbe9e9"
LONGEST_TEXT = 1500  # characters that are measured at all; drawing ends at a line count long before


# Text


@lru_cache
def font_of(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans of a size in pixels."""
    # Matplotlib carries DejaVu, which covers Latin, Greek, Cyrillic and more, on machines that have no font at all.
    from matplotlib import get_data_path

    return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", f"DejaVuSans{'-Bold' if bold else ''}.ttf"), size)


def clean(text: str) -> str:
    """One line of printable characters; others (controls, lone surrogates) become U+FFFD."""
    text = " ".join(str(text)[:LONGEST_TEXT].split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """Lines within `width` pixels: broken at spaces, inside words that are wider, cut by an ellipsis at `max_lines`."""
    lines, line = [], ""
    for word in clean(text).split(" "):
        longer = f"{line} {word}" if line else word
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        while len(word) > 1 and font.getlength(word) > width:
            # Bisection: measuring every prefix of a very long word would take seconds.
            cut = 1 + bisect_right(range(2, len(word)), float(width), key=lambda n: font.getlength(word[:n]))
            lines.append(word[:cut])
            word = word[cut:]
        line = word
    lines.append(line)
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and font.getlength(f"{last}…") > width:
            last = last[:-1]
        lines = [*lines[: max_lines - 1], f"{last.rstrip()}…"]
    return lines


def draw_lines(draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: list[str], ink: str, font, spacing: int) -> int:
    """Draws lines below each other; returns the y below the last."""
    x, y = at
    for line in lines:
        draw.text((x, y + spacing // 2), line, ink, font, anchor="lm")
        y += spacing
    return y


# Shapes; PIL draws without anti-aliasing, so masks are drawn four times as large and shrunk.


@lru_cache(maxsize=256)
def rounded_mask(size: tuple[int, int], radius: int) -> Image.Image:
    """A filled rectangle with round corners, mode L."""
    large = Image.new("L", (4 * size[0], 4 * size[1]), 0)
    ImageDraw.Draw(large).rounded_rectangle((0, 0, large.width - 1, large.height - 1), 4 * radius, 255)
    return large.resize(size, Image.Resampling.BOX)


def fill_rounded(image: Image.Image, box: tuple[int, int, int, int], radius: int, colour: str) -> None:
    """Fills a box (left, top, right, bottom) with round corners."""
    image.paste(colour, box, rounded_mask((box[2] - box[0], box[3] - box[1]), radius))


def stamp(image: Image.Image, right: bool, size: int, at: tuple[int, int]) -> None:
    """Puts a check or a cross on a disc with a white rim."""
    unit = 4 * size / 100
    badge = Image.new("RGB", (4 * size, 4 * size), "white")
    draw = ImageDraw.Draw(badge)
    draw.ellipse([unit * v for v in (8, 8, 92, 92)], RIGHT if right else WRONG)
    strokes = [[(30, 52), (44, 66), (71, 37)]] if right else [[(35, 35), (65, 65)], [(65, 35), (35, 65)]]
    half = unit * 5
    for stroke in strokes:
        points = [(unit * x, unit * y) for x, y in stroke]
        draw.line(points, "white", round(2 * half), joint="curve")
        for x, y in points:
            draw.ellipse((x - half, y - half, x + half, y + half), "white")
    image.paste(badge.resize((size, size), Image.Resampling.BOX), at, rounded_mask((size, size), size // 2))


def fit_image(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The whole of an RGB image within `size`, centred on a mat."""
    fit = Image.new("RGB", size, MAT)
    # Small drawings keep their pixels sharp: enlarged by a whole number first, then shrunk smoothly to the size.
    scale = min(size[0] / image.width, size[1] / image.height)
    if scale > 1:
        times = int(scale) + 1
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    image = ImageOps.contain(image, size, Image.Resampling.LANCZOS)
    fit.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return fit
