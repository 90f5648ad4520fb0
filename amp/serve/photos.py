"""Photos of the index as they are shown in a browser."""

import io
from collections.abc import Callable
from functools import lru_cache

from PIL import Image

from amp.data.images.decode import decode_rgb
from amp.data.images.file import read_limited
from amp.data.images.formats import UnreadableImageError
from amp.data.images.headers import jpeg_size
from amp.report.attention import model_view
from amp.search.index import PhotoIndex

SIZES = (16, 2048)
"""Smallest and largest size of a picture in pixels."""
_KEPT, _QUALITY = 1_000, 85  # some 20 KB each at the size of a thumbnail


class Photos:
    """Reads photos of an index as JPEG files, and keeps small ones in memory.

    Args:
        index: The index.
        preprocess_cfg: How the model's photos are resized; see `model_view`.
    """

    def __init__(self, index: PhotoIndex, preprocess_cfg: dict):
        self.index, self.preprocess_cfg = index, preprocess_cfg
        self._small = lru_cache(_KEPT)(self._jpeg)

    def tag(self, number: int) -> str:
        """Identifies the content of a photo.

        Raises:
            UnreadableImageError: The photo is gone or has changed.
        """
        self.index.check_there(number)
        size, mtime, digest = self.index.stamps[self.index.names[number]]
        return digest or f"{size}-{mtime}"

    def jpeg(self, number: int, size: int, crop: bool) -> bytes:
        """A photo as a JPEG file.

        Args:
            number: Number of the photo in the index.
            size: Maximum width and height; with `crop`, width and height.
            crop: Show the part that the model sees.

        Raises:
            UnreadableImageError: The photo is gone, has changed or can't be decoded.
        """
        make = self._small if size <= 512 else self._jpeg
        return make(number, size, crop, self.tag(number))

    def _jpeg(self, number: int, size: int, crop: bool, tag: str) -> bytes:
        try:
            image = _opened(read_limited(self.index.path(number)), size)
        except Exception as error:  # decoders raise almost any exception on damaged data
            raise UnreadableImageError(f"can't be read ({getattr(error, 'strerror', None) or error})") from None
        if crop:
            view: Callable[[Image.Image], Image.Image] = model_view(self.preprocess_cfg, size)
            image = view(image)
        else:
            image.thumbnail((size, size), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=_QUALITY)
        return buffer.getvalue()


def _opened(content: bytes, size: int) -> Image.Image:
    """Decodes a photo; a JPEG at a reduced size if its shorter side still has `size` pixels."""
    shape = jpeg_size(content)
    shrink = 1 if shape is None else max(n for n in (1, 2, 4, 8) if n == 1 or min(shape) // n >= size)
    return Image.fromarray(decode_rgb(content, shrink))
