"""Text in pictures: characters that can be drawn, the fonts that have them, and lines within a width."""

import re
import unicodedata
from functools import cache
from pathlib import Path

from amp.terminal import Terminal

LONGEST_TEXT = 1500  # maximum number of characters that are read; far fewer are drawn
# Characters that join or vary emoji and are invisible: joiners, variation selectors, skin colours, flag tags.
_RANGES = ((0x200C, 0x200E), (0xFE00, 0xFE10), (0x1F3FB, 0x1F400), (0xE0020, 0xE0080), (0xE0100, 0xE01F0))
_JOINERS = {chr(code) for begin, end in _RANGES for code in range(begin, end)}
_missing: set[str] = set()


def clean(text: str) -> str:
    """Returns the text as one line of characters that can be drawn.

    Control characters and lone surrogates become U+FFFD. A character that no installed font has is replaced by its
    code, and an emoji by its name. The first replacement prints a warning on stderr.
    """
    letters = []
    for letter in unicodedata.normalize("NFC", " ".join(str(text)[:LONGEST_TEXT].split())):
        if letter in _JOINERS:
            continue
        if not letter.isprintable():
            letter = "\N{REPLACEMENT CHARACTER}"
        elif _glyph(letter) is None:
            _say_missing(letter)
            name = unicodedata.name(letter, "").lower()
            letter = f"[{name}]" if name and unicodedata.category(letter) == "So" else _code(letter)
        letters.append(letter)
    return "".join(letters)


def plot_fonts(text: str) -> list[str]:
    """Names of the fonts that Matplotlib needs to draw a cleaned text, DejaVu Sans first."""
    files = dict.fromkeys(glyph[0] for letter in text if (glyph := _glyph(letter)))
    return list(dict.fromkeys(["DejaVu Sans", *map(_family, files)]))


def wrap(text: str, width: float, size: float, most: int, bold: bool = False) -> list[str]:
    """Cleans the text and wraps it at spaces, and inside words that are too wide. An ellipsis marks omitted text.

    Args:
        text: Any text.
        width: Width of a line in inches.
        size: Font size in points.
        most: Maximum number of lines.
        bold: Whether the text is drawn bold.
    """
    limit = 72 * width / size  # in em

    def fits(line: str) -> bool:
        return sum(glyph[1] for letter in line if (glyph := _glyph(letter, bold))) <= limit

    lines, line = [], ""
    for word in clean(text).split(" "):
        if fits(longer := f"{line} {word}" if line else word):
            line = longer
            continue
        if line:
            lines.append(line)
        line = ""
        for letter in word:
            if line and not fits(line + letter):
                lines.append(line)
                line = ""
            line += letter
        if len(lines) > most:
            break
    lines.append(line)
    if len(lines) > most:
        last = lines[most - 1]
        while last and not fits(f"{last}…"):
            last = last[:-1]
        lines = [*lines[: most - 1], f"{last.rstrip()}…"]
    return lines


def _code(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def _say_missing(letter: str) -> None:
    if not _missing:
        Terminal(True).say(
            f"no font of this machine has {_code(letter)} ({unicodedata.name(letter, 'no name')}); pictures show its "
            "code; install a font that has it, such as fonts-noto-cjk for Chinese, Japanese and Korean"
        )
    _missing.add(letter)


@cache
def _glyph(letter: str, bold: bool = False) -> tuple[str, float] | None:
    """The font file that has a character, and the character's width in em; None if no font has it."""
    from matplotlib import get_data_path

    # DejaVu comes with Matplotlib and covers Latin, Greek, Cyrillic, Arabic and more, so no font must be installed.
    own = [str(Path(get_data_path(), "fonts", "ttf", f"DejaVuSans{end}.ttf")) for end in (("-Bold",) * bold + ("",))]
    for find in (lambda: own, _other_fonts):
        for file in find():
            font = _open_font(file)
            if font is not None and font.get_char_index(ord(letter)):
                glyph = font.load_char(ord(letter))
                if file in own or glyph.width:  # colour emoji fonts list characters that have no outline
                    return file, glyph.linearHoriAdvance / 65536 / 100
    return None


@cache
def _other_fonts() -> list[str]:
    """Files of the installed fonts, upright ones of normal weight first."""
    from matplotlib.font_manager import findSystemFonts

    odd = re.compile(r"bold|italic|oblique|thin|light|black|medium|condensed|mono|serif", re.IGNORECASE)
    files = [file for file in findSystemFonts() if "lastresort" not in file.lower()]  # it has a box for every character
    return sorted(files, key=lambda file: (len(odd.findall(Path(file).name)), file))


@cache
def _open_font(file: str):
    """Opens a font at 100 pixels per em; None if it can't be read or is not scalable."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(file)
        if not font.scalable:
            return None
        font.set_size(100, 72)
    except (RuntimeError, OSError):
        return None
    return font


@cache
def _family(file: str) -> str:
    """The name by which Matplotlib finds a font file."""
    from matplotlib.font_manager import FontProperties, fontManager

    fontManager.addfont(file)
    return FontProperties(fname=file).get_name()
