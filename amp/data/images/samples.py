"""Samples of any mode and depth to RGB of 8 bits."""

import numpy as np
from PIL import Image, ImageFile

from amp.data.images.formats import UnreadableImageError

BACKGROUND = "white"
"""Shows through a transparent picture. White, because img2dataset put white under the photos that open_clip's models
were trained on, and because pages that show cut-outs are white."""

_SIGNED = 2  # a value of TIFF's tag SampleFormat


def to_rgb(file: ImageFile.ImageFile) -> Image.Image:
    """Decodes an image of any mode to RGB.

    Raises:
        UnreadableImageError: Its samples could only be interpreted by guessing.
    """
    if file.format == "PNG" and file.mode == "RGB" and "transparency" in file.info and "16" in str(file.tile[0][3]):
        raise UnreadableImageError(
            "a PNG of 16 bits with a transparent colour, which Pillow misreads; save it with 8 bits"
        )
    file.load()
    deep = file.mode in ("I", "F") or file.mode.startswith("I;16") or _sample_format(file) == _SIGNED
    image = _eight_bits(file) if deep else file
    if image.has_transparency_data:
        if image.mode == "La":  # which only becomes LA without losing its alpha
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
    """Grey of 12, 16 or 32 bits in L, or in LA where one value is transparent.

    Black is 0; white is the largest value of an unsigned integer type, and 1.0 of floats.
    """
    if _sample_format(image) == _SIGNED:
        raise UnreadableImageError("grey of signed integers, which don't tell what is black; save it with 8 bits")
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "F":
        bits, white = 32, 1.0
    else:
        bits = tags.get(258, (16,))[0]  # without tags it is a PNG, which older releases of Pillow give in mode I
        white = 2**bits - 1
        values = values.astype(np.uint32)  # Pillow has no unsigned 32 bits: negative values were large ones
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= white:  # also where one is not a number
        raise UnreadableImageError(
            f"grey values from {low:g} to {high:g}, expected 0 (black) to {white:g} (white); save it with 8 bits"
        )
    grey = np.rint(values * 255).astype(np.uint8) if image.mode == "F" else (values >> (bits - 8)).astype(np.uint8)
    if high > 0 and not grey.any():
        raise UnreadableImageError(
            f"grey values up to {high:g}, all of which are black where white is {white:g}; save it with 8 bits"
        )
    if tags.get(262) == 0:  # white is zero, which Pillow applies to 8 bits only
        grey = 255 - grey
    result = Image.fromarray(grey)
    if "transparency" in image.info:
        result.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return result
