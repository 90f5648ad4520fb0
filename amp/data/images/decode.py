"""Decodes photos to upright RGB pixels, for the whole package. Does not import torch, which takes seconds."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, UnidentifiedImageError

from amp.data.images.formats import UnreadableImageError, decoders, why_unidentified
from amp.data.images.headers import UPRIGHT, jpeg_header, orientation_of
from amp.data.images.samples import to_rgb

DECODING_VERSION = 2
"""Part of the name of all stored data that depends on decoded pixels. Raise it when decoded pixels change."""


def decode_rgb(content: bytes, shrink: int = 1) -> np.ndarray:
    """Decodes a photo to upright pixels.

    The orientation in the EXIF or XMP data is applied, transparent pixels are put on `BACKGROUND`, and samples of 12,
    16 and 32 bits are scaled to 8 bits (docs/data.md, "Pixels"). All other pixels are identical to those of Pillow's
    `convert("RGB")`, since both decode JPEG with libjpeg-turbo. Calling libjpeg-turbo directly is faster: it decodes
    straight into the array, while Pillow reads the file in small pieces and converts an intermediate image.

    Args:
        content: The bytes of the file.
        shrink: 1, 2, 4 or 8. The result has the size (ceil(H / shrink), ceil(W / shrink)). Above 1, a JPEG is decoded
            without the frequencies that this size can't show, and with faster, less exact arithmetic. Allowed above 1
            only for photos whose size `jpeg_size` returns.

    Returns:
        Pixels uint8 (H, W, 3).

    Raises:
        OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError: See `opened`.
    """
    header = jpeg_header(content)
    if header is not None:
        height, width, orientation = header
        try:
            if shrink == 1:
                pixels = simplejpeg.decode_jpeg(content)
            else:
                height, width = -(-height // shrink), -(-width // shrink)
                pixels = simplejpeg.decode_jpeg(
                    content, min_height=height, min_width=width, fastdct=True, fastupsample=True
                )
            return pixels if orientation not in UPRIGHT else _turned(Image.fromarray(pixels), orientation)
        except ValueError:
            pass  # damaged; Pillow may still decode it, or reports what is wrong
    with opened(content) as image:
        rgb = to_rgb(image)
        return _turned(rgb if shrink == 1 else rgb.reduce(shrink), orientation_of(image))


@contextmanager
def opened(content: bytes) -> Iterator[ImageFile.ImageFile]:
    """Opens a photo with Pillow, without decoding, rotating or scaling it.

    Only the decoders in `DECODER_OF` are tried. On damaged data they raise almost any exception; inside the `with`
    block, unusual ones are turned into an OSError. Warnings during opening, for example about EXIF data, are hidden
    because they don't affect the pixels.

    Raises:
        UnreadableImageError: The format is not supported.
        PIL.Image.DecompressionBombError: The photo has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
        OSError, ValueError, SyntaxError: The photo is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                image = Image.open(io.BytesIO(content), formats=decoders())
            except Image.DecompressionBombError as error:  # its text names twice our limit
                seen = re.search(r"\d+", str(error))
                raise _bomb(f"{int(seen[0]):,}" if seen else "too many") from None
            except UnidentifiedImageError:  # its text contains the memory address of an object
                raise UnreadableImageError(why_unidentified(content)) from None
            with image:
                _refuse_bomb(image)
                yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _turned(image: Image.Image, orientation: int) -> np.ndarray:
    return np.asarray(image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image)


def _refuse_bomb(image: Image.Image) -> None:
    """Raises DecompressionBombError above `MAX_IMAGE_PIXELS`. Pillow only warns there, and raises at twice as many."""
    (width, height), limit = image.size, Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise _bomb(f"{width} x {height}")


def _bomb(pixels: str) -> Image.DecompressionBombError:
    limit = Image.MAX_IMAGE_PIXELS
    return Image.DecompressionBombError(
        f"{pixels} pixels, expected at most {limit:,}: a decompression bomb, or a photo that must be resized first"
    )
