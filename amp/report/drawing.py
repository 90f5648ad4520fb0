"""Text and shapes for pictures that Pillow draws."""

import io
import os
import re
import unicodedata
from bisect import bisect_right
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from amp.data.images.file import LARGEST_JPEG
from amp.errors import AmpError
from amp.files import write_atomically
from amp.terminal import Terminal

PAGE, CARD, CARD_EDGE, MAT = "#f3f5f8", "#ffffff", "#dfe4ea", "#eef1f5"
INK, MUTED, CHIP, CHIP_INK = "#1b2330", "#667180", "#e9eefb", "#33508f"
RIGHT, WRONG, RIGHT_TINT, WRONG_TINT = "#18864b", "#cf3a3f", "#e4f4eb", "#fbe9e9"
LONGEST_TEXT = 1500  # characters that are measured at all; drawing ends at a line count long before
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
LARGEST = {"JPEG": LARGEST_JPEG, "WEBP": 16_383}  # pixels per side that a format can hold; PNG holds any picture


# Files


def picture_format(path: str | os.PathLike) -> str:
    """Pillow's name of the format that a picture's suffix asks for.

    Raises:
        AmpError: It is none of `FORMATS`.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise AmpError(f"{path}: the suffix is {suffix!r}, expected one of {', '.join(FORMATS)}; give such a name")
    return FORMATS[suffix]


def save_picture(path: str | os.PathLike, picture: Image.Image) -> Path:
    """Writes a picture in the format of its suffix.

    Raises:
        AmpError: Another suffix, a picture that is too large for its format, or a path that can't be written.
    """
    kind, out = picture_format(path), io.BytesIO()
    if kind in LARGEST and max(picture.size) > LARGEST[kind]:
        raise AmpError(
            f"{path}: the picture has {picture.width:,} x {picture.height:,} pixels, expected at most "
            f"{LARGEST[kind]:,} per side in a {kind} file; give a name that ends in .png, or show fewer photos"
        )
    picture.save(out, kind, quality=92)
    return write_atomically(path, out.getvalue())


# Text


@dataclass(frozen=True)
class Font:
    """DejaVu Sans of a size in pixels; characters that it lacks, such as Chinese, come from the machine's fonts."""

    size: int
    bold: bool = False

    def pieces(self, text: str) -> list[tuple[str, ImageFont.FreeTypeFont]]:
        """The text cut into pieces, each with the font that has its characters."""
        grouped = groupby(text, key=lambda letter: _file_with(letter, self.bold) or _dejavu(self.bold))
        return [("".join(letters), _open_font(file, self.size)) for file, letters in grouped]

    def getlength(self, text: str) -> float:
        """Width of a line in pixels."""
        return sum(font.getlength(piece) for piece, font in self.pieces(text))


def draw_text(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, ink: str, font: Font, anchor: str = "lm"
) -> None:
    """Draws a line of text. The anchor is Pillow's: "l" or "r" (left, right), then "m" or "a" (middle, top)."""
    x, y = at
    if anchor[0] == "r":
        x -= font.getlength(text)
    ascent, descent = _open_font(_dejavu(font.bold), font.size).getmetrics()
    y += ascent if anchor[1] == "a" else (ascent - descent) // 2
    for piece, part in font.pieces(text):
        draw.text((x, y), piece, ink, part, anchor="ls")  # all pieces on one baseline
        x += part.getlength(piece)


def clean(text: str) -> str:
    """One line of characters that can be drawn.

    Controls and lone surrogates become U+FFFD. A character that no font of the machine has is written as its code, an
    emoji as its name; the first time, a line on stderr says so.
    """
    letters = []
    for letter in unicodedata.normalize("NFC", " ".join(str(text)[:LONGEST_TEXT].split())):
        if letter in _JOINERS:
            continue
        if not letter.isprintable():
            letter = "\N{REPLACEMENT CHARACTER}"
        elif _file_with(letter) is None:
            _say_missing(letter)
            name = unicodedata.name(letter, "").lower()
            letter = f"[{name}]" if name and unicodedata.category(letter) == "So" else _code(letter)
        letters.append(letter)
    return "".join(letters)


def plot_fonts(text: str) -> list[str]:
    """Names of the fonts that Matplotlib needs to draw a cleaned text, DejaVu Sans first."""
    from matplotlib.font_manager import FontProperties, fontManager

    files = dict.fromkeys(filter(None, map(_file_with, text)))
    for file in files:
        fontManager.addfont(file)
    return list(dict.fromkeys(["DejaVu Sans", *(FontProperties(fname=file).get_name() for file in files)]))


# What joins or varies emoji and shows nothing by itself: joiners, variation selectors, skin colours, tags of flags.
_RANGES = ((0x200C, 0x200E), (0xFE00, 0xFE10), (0x1F3FB, 0x1F400), (0xE0020, 0xE0080), (0xE0100, 0xE01F0))
_JOINERS = {chr(code) for begin, end in _RANGES for code in range(begin, end)}
_missing: set[str] = set()


def _code(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def _say_missing(letter: str) -> None:
    if not _missing:
        Terminal(True).say(
            f"no font of this machine has {_code(letter)} ({unicodedata.name(letter, 'no name')}); pictures show its "
            "code; install a font that has it, such as fonts-noto-cjk for Chinese, Japanese and Korean"
        )
    _missing.add(letter)


@lru_cache
def _dejavu(bold: bool) -> str:
    # Matplotlib carries DejaVu, which covers Latin, Greek, Cyrillic and more, on machines that have no font at all.
    from matplotlib import get_data_path

    return str(Path(get_data_path(), "fonts", "ttf", f"DejaVuSans{'-Bold' if bold else ''}.ttf"))


@lru_cache
def _open_font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


@cache
def _file_with(letter: str, bold: bool = False) -> str | None:
    """The font file that a character is drawn with; None where no font has it."""
    for file in (_dejavu(bold), _dejavu(False)):
        if ord(letter) in _codes(file):
            return file
    for file in _other_fonts():
        # Fonts of coloured pictures may list characters without an outline.
        if ord(letter) in _codes(file) and _open_font(file, 40).getmask(letter).getbbox():
            return file
    return None


@cache
def _other_fonts() -> list[str]:
    """Files of the machine's fonts, upright ones of normal weight first."""
    from matplotlib.font_manager import findSystemFonts

    odd = re.compile(r"bold|italic|oblique|thin|light|black|medium|condensed|mono|serif", re.IGNORECASE)
    files = [file for file in findSystemFonts() if "lastresort" not in file.lower()]  # which has boxes for everything
    return sorted(files, key=lambda file: (len(odd.findall(Path(file).name)), file))


@cache
def _codes(file: str) -> np.ndarray:
    """The characters that a font file has, as numbers; none of one that can't be read or has pictures of one size."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(file)
        return np.fromiter(font.get_charmap() if font.scalable else (), dtype=np.int64)
    except (RuntimeError, OSError):
        return np.empty(0, dtype=np.int64)


def wrap(text: str, font: Font, width: int, max_lines: int) -> list[str]:
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


def draw_lines(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: list[str], ink: str, font: Font, spacing: int
) -> int:
    """Draws lines below each other; returns the y below the last."""
    x, y = at
    for line in lines:
        draw_text(draw, (x, y + spacing // 2), line, ink, font)
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
