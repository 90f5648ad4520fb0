"""Converts images of any mode and bit depth to RGB with 8 bits per channel."""

import numpy as np
from PIL import Image

from amp.data.images.formats import UnreadableImageError

BACKGROUND = "white"
"""Background colour of transparent images. White, because img2dataset used white for the photos that open_clip's models
were trained on, and because web pages usually show such images on white."""

_SIGNED = 2  # a value of TIFF's tag SampleFormat


def to_rgb(file: Image.Image) -> Image.Image:
    """Decodes an image of any mode to RGB.

    Raises:
        UnreadableImageError: The meaning of the sample values is ambiguous.
    """
    modes = [str(entry[3]) for entry in getattr(file, "tile", ())]  # of the file, before it is decoded
    if file.format == "PNG" and file.mode == "RGB" and "transparency" in file.info and any("16" in m for m in modes):
        raise UnreadableImageError(
            "a PNG of 16 bits per channel with a transparent colour, which Pillow misreads; save it with 8 bits"
        )
    file.load()
    deep = file.mode in ("I", "F") or file.mode.startswith("I;16") or _sample_format(file) == _SIGNED
    image = _eight_bits(file) if deep else file
    if image.has_transparency_data:
        if image.mode == "La":  # loses its alpha when converted to any mode but LA
            image = image.convert("LA")
        image = image.convert("RGBA")
        rgb = Image.new("RGB", image.size, BACKGROUND)
        rgb.paste(image, mask=image)
        return rgb
    return image.convert("RGB")


def _sample_format(image: Image.Image) -> int:
    tags = getattr(image, "tag_v2", {})
    return tags.get(339, (1,))[0]


def _eight_bits(image: Image.Image) -> Image.Image:
    """Converts grey images of 12, 16 or 32 bits to mode L, or to LA if one value is transparent.

    Black is 0. White is the largest value of an unsigned integer type, or 1.0 for floats.
    """
    if _sample_format(image) == _SIGNED:
        raise UnreadableImageError("grey in signed integers, for which black is undefined; save it with 8 bits")
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "F":
        bits, white = 32, 1.0
    else:
        bits = tags.get(258, (16,))[0]  # an image without tags is a PNG, which older releases of Pillow open in mode I
        white = 2**bits - 1
        values = values.astype(np.uint32)  # Pillow has no unsigned 32-bit mode, so large values appear as negative
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= white:  # also catches NaN
        raise UnreadableImageError(
            f"grey values from {low:g} to {high:g}, expected 0 (black) to {white:g} (white); save it with 8 bits"
        )
    grey = np.rint(values * 255).astype(np.uint8) if image.mode == "F" else (values >> (bits - 8)).astype(np.uint8)
    if high > 0 and not grey.any():
        raise UnreadableImageError(
            f"grey values up to {high:g}, which would all be black because white is {white:g}; save it with 8 bits"
        )
    if tags.get(262) == 0:  # TIFF's WhiteIsZero, which Pillow applies only to 8-bit images
        grey = 255 - grey
    result = Image.fromarray(grey)
    if "transparency" in image.info:
        result.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return result
