"""Images in the forms that callers have: paths, encoded bytes, Pillow images, arrays and tensors."""

import os
from typing import Any

import numpy as np
import torch
from PIL import Image

from amp.data.images.decode import decode_rgb
from amp.data.images.file import open_photo
from amp.data.images.formats import UnreadableImageError
from amp.data.images.headers import UPRIGHT, orientation_of
from amp.data.images.samples import to_rgb

FORMS = "a path, the bytes of an image file, a Pillow image, or uint8 pixels (H, W, 3)"


def read_rgb(image: Any) -> Image.Image:
    """Reads an image in any form, upright and in RGB.

    Args:
        image: A path, the bytes of an image file, a Pillow image, an array uint8 (H, W, 3), or a tensor uint8
            (3, H, W).

    Raises:
        UnreadableImageError: The image is missing, damaged, too large, or in another form.
    """
    try:
        if isinstance(image, str | os.PathLike):
            return open_photo(image)
        if isinstance(image, bytes | bytearray | memoryview):
            return Image.fromarray(decode_rgb(bytes(image)))
        if isinstance(image, Image.Image):
            turn = UPRIGHT.get(orientation_of(image))
            return to_rgb(image) if turn is None else to_rgb(image).transpose(turn)
    except UnreadableImageError:
        raise
    except Exception as error:  # Pillow's decoders raise almost any exception on damaged data
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableImageError(f"can't be read ({reason})") from None
    pixels = image.permute(1, 2, 0).cpu().numpy() if isinstance(image, torch.Tensor) and image.ndim == 3 else image
    if isinstance(pixels, np.ndarray) and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(pixels))
    seen = f"{type(image).__name__}{f' {image.dtype} {tuple(image.shape)}' if hasattr(image, 'shape') else ''}"
    raise UnreadableImageError(f"{seen}, expected {FORMS}")
