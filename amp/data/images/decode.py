"""Photo bytes to upright RGB pixels, for every part of the product. Imports no torch, which takes seconds."""

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
"""Part of the name of everything that is stored and depends on decoded pixels. Raise it when pixels change."""


def decode_rgb(content: bytes, shrink: int = 1) -> np.ndarray:
    """Upright pixels uint8 (H, W, 3) of a photo.

    The orientation that a camera notes (EXIF or XMP) is applied, `BACKGROUND` shows through transparent pixels, and
    samples of 12, 16 and 32 bits are scaled to 8 (docs/data.md, "Pixels"). Pixels of other photos are bit for bit those
    of Pillow's `convert("RGB")`: both decode JPEG with libjpeg-turbo. Calling it directly writes
    into the array at once. Pillow would pass the file in small pieces, and keep and convert an image of its own.

    Args:
        content: The bytes of the file.
        shrink: 2, 4 or 8 gives (ceil(H / shrink), ceil(W / shrink), 3): leaves out the frequencies that a photo of that
            size can't show, and rounds if it saves time. Only for photos whose size `jpeg_size` knows.

    Raises:
        OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError: see `opened`.
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
            pass  # damaged; Pillow may still make an image of it, or says what is wrong
    with opened(content) as image:
        rgb = to_rgb(image)
        return _turned(rgb if shrink == 1 else rgb.reduce(shrink), orientation_of(image))


@contextmanager
def opened(content: bytes) -> Iterator[ImageFile.ImageFile]:
    """A photo as Pillow opens it: not decoded, neither turned nor scaled.

    Only the decoders of `DECODER_OF` see it. What they raise on damaged data inside the `with` block, which is nearly
    anything, becomes an OSError. Warnings (odd EXIF data and the like) are not shown: the pixels are what counts.

    Raises:
        UnreadableImageError: Its format is not read.
        PIL.Image.DecompressionBombError: It has more pixels than Pillow warns of.
        OSError, ValueError, SyntaxError: It is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                image = Image.open(io.BytesIO(content), formats=decoders())
            except Image.DecompressionBombError as error:  # whose text names twice our limit
                seen = re.search(r"\d+", str(error))
                raise _bomb(f"{int(seen[0]):,}" if seen else "too many") from None
            except UnidentifiedImageError:  # whose text shows the address of an object
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
    """Refuses more pixels than Pillow warns of. Pillow itself allows twice as many."""
    (width, height), most = image.size, Image.MAX_IMAGE_PIXELS
    if most is not None and width * height > most:
        raise _bomb(f"{width} x {height}")


def _bomb(pixels: str) -> Image.DecompressionBombError:
    most = Image.MAX_IMAGE_PIXELS
    return Image.DecompressionBombError(
        f"{pixels} pixels, expected at most {most:,}: a decompression bomb, or a photo that must be made smaller"
    )
