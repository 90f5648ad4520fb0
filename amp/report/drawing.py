"""Picture files, and a page of text, boxes and photos that Matplotlib draws."""

import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from amp.data.images.file import LARGEST_JPEG
from amp.errors import AmpError
from amp.files import write_atomically
from amp.report.fonts import plot_fonts

GROUND, CARD, CARD_EDGE, MAT = "#f3f5f8", "#ffffff", "#dfe4ea", "#eef1f5"
INK, MUTED, CHIP, CHIP_INK = "#1b2330", "#667180", "#e9eefb", "#33508f"
RIGHT, WRONG, RIGHT_TINT, WRONG_TINT = "#18864b", "#cf3a3f", "#e4f4eb", "#fbe9e9"
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
LARGEST = {"PNG": 65_535, "JPEG": LARGEST_JPEG, "WEBP": 16_383}  # pixels per side; Matplotlib's limit for PNG
DPI = 120


def picture_format(path: str | os.PathLike) -> str:
    """Returns Pillow's name of the format of a picture's suffix.

    Raises:
        AmpError: The suffix is not in `FORMATS`.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise AmpError(f"{path}: the suffix is {suffix!r}, expected one of {', '.join(FORMATS)}; use one of these")
    return FORMATS[suffix]


def check_size(path: str | os.PathLike, width: int, height: int) -> None:
    """Raises AmpError if a picture of `width` x `height` pixels is too large for the format of its suffix."""
    kind = picture_format(path)
    if max(width, height) > LARGEST[kind]:
        step = "show fewer photos" if kind == "PNG" else "use the suffix .png, or show fewer photos"
        raise AmpError(
            f"{path}: the picture has {width:,} x {height:,} pixels, expected at most {LARGEST[kind]:,} per side in a "
            f"{kind} file; {step}"
        )


def save_picture(path: str | os.PathLike, picture: Image.Image) -> Path:
    """Writes a picture in the format of its suffix.

    Raises:
        AmpError: The suffix is unknown, the picture is too large for its format, or the path can't be written.
    """
    check_size(path, *picture.size)
    out = io.BytesIO()
    picture.save(out, picture_format(path), quality=92)
    return write_atomically(path, out.getvalue())


class Page:
    """A page to draw on. Lengths are in inches, positions are (x, y) from the upper left corner, fonts in points.

    Args:
        width, height: Size of the page.
    """

    def __init__(self, width: float, height: float):
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(width, height), dpi=DPI, facecolor=GROUND)
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), autoscale_on=False)
        self.axes.set_axis_off()

    def box(self, x: float, y: float, width: float, height: float, face: str, edge: str = "none") -> None:
        """Fills a rectangle with round corners."""
        from matplotlib.patches import FancyBboxPatch

        style = "round,pad=0,rounding_size=0.06"
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, style, facecolor=face, edgecolor=edge, linewidth=0.8))

    def text(
        self,
        x: float,
        y: float,
        lines: Sequence[str],
        size: float,
        colour: str = INK,
        bold: bool = False,
        right: bool = False,
        tint: str | None = None,
    ) -> float:
        """Draws cleaned lines below each other. "$" and "\\" have no special meaning.

        Args:
            x, y: Upper left corner, or upper right corner with `right`.
            lines: Lines of `amp.report.fonts.wrap`.
            size: Font size.
            colour: Colour of the text.
            bold: Whether the text is bold.
            right: Whether lines are aligned to the right, so that they end at `x`.
            tint: Colour of a box around each line.

        Returns:
            The y below the last line.
        """
        style: dict[str, Any] = {
            "fontsize": size,
            "color": colour,
            "weight": "bold" if bold else "normal",
            "parse_math": False,
        }
        if tint is not None:
            style["bbox"] = {"boxstyle": "round,pad=0.3", "facecolor": tint, "edgecolor": "none"}
        for line in lines:
            baseline = y + 0.7 * line_height(size)
            self.axes.text(x, baseline, line, ha="right" if right else "left", family=plot_fonts(line), **style)
            y += line_height(size) * (1 if tint is None else 1.35)
        return y

    def photo(self, x: float, y: float, width: float, height: float, image: Image.Image, mat: str = MAT) -> None:
        """Draws a whole image, centred on a background of the given size."""
        self.box(x, y, width, height, mat)
        image = image.convert("RGB")
        image.thumbnail((round(DPI * width), round(DPI * height)), Image.Resampling.LANCZOS)
        scale = min(width / image.width, height / image.height)
        left, top = x + (width - scale * image.width) / 2, y + (height - scale * image.height) / 2
        extent = (left, left + scale * image.width, top + scale * image.height, top)
        self.axes.imshow(image, extent=extent, aspect="auto", zorder=2)

    def save(self, path: str | os.PathLike) -> Path:
        """Writes the page as PNG, JPEG or WebP, by the suffix.

        Raises:
            AmpError: As for `save_picture`.
        """
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(self.figure)
        check_size(path, *canvas.get_width_height())
        log = logging.getLogger("matplotlib.font_manager")
        level = log.level
        log.setLevel(logging.ERROR)  # no warning about fonts without a bold face, such as Chinese ones
        try:
            with rc_context({"text.hinting": "none"}):  # so that widths are those that `wrap` measured
                canvas.draw()
        finally:
            log.setLevel(level)
        pixels = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba(), "raw", "RGBA", 0, 1)
        return save_picture(path, pixels.convert("RGB"))


def line_height(size: float) -> float:
    """Height in inches of a line in a font of `size` points."""
    return 1.32 * size / 72
