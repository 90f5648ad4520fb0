"""Reads image files: checked, and optionally resized, for a shard; or decoded for display."""

from __future__ import annotations

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from amp.data.images.decode import decode_rgb, opened
from amp.data.images.formats import UnreadableImageError
from amp.data.images.headers import SCAN, jpeg_header, segments
from amp.errors import AmpError

JPEG_ALIASES = (".jpe", ".jfif", ".jif", ".mpo")  # stored as .jpg, which readers of shards expect
LARGEST_JPEG = 65_500  # maximum pixels per side that libjpeg can write
MAX_FILE_BYTES = 1 << 29
"""Maximum size of an image file: 512 MiB, more than any photo of an accepted size needs."""

Check = Literal["structure", "decode"]
"""How damaged files are found; see `read_image`."""


@dataclass(frozen=True, slots=True)
class Resize:
    """How images are resized before they are stored.

    Attributes:
        size: Target size in pixels, 1 to 8192.
        mode: `"shortest"` resizes the shorter side to `size` and keeps the aspect ratio; smaller images stay unchanged.
            `"squash"` resizes every image to `size` x `size`.
        quality: JPEG quality, 1 to 95 on Pillow's scale.
    """

    size: int
    mode: Literal["shortest", "squash"] = "shortest"
    quality: int = 95

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 8192:
            raise AmpError(f"resize is {self.size}; expected 1 to 8192 pixels")
        if self.mode not in ("shortest", "squash"):
            raise AmpError(f"resize mode is {self.mode!r}; expected 'shortest' or 'squash'")
        if not 1 <= self.quality <= 95:
            raise AmpError(f"resize quality is {self.quality}; expected 1 to 95 (Pillow's JPEG scale)")

    def target(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of an image after resizing."""
        if self.mode == "squash":
            return self.size, self.size
        scale = self.size / min(width, height)
        if scale >= 1:
            return width, height
        return max(self.size, round(width * scale)), max(self.size, round(height * scale))


def read_limited(path: str | os.PathLike) -> bytes:
    """Reads a regular file of at most `MAX_FILE_BYTES`.

    Raises:
        OSError: The file can't be read.
        UnreadableImageError: It is a pipe or a device, which may never end, or it is too large.
    """
    # Non-blocking, because opening a pipe would hang.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise UnreadableImageError("a pipe or a device; expected a regular file")
        if found.st_size > MAX_FILE_BYTES:
            raise UnreadableImageError(f"{found.st_size} bytes, expected at most {MAX_FILE_BYTES}")
        return file.read(MAX_FILE_BYTES)


def is_whole(content: bytes) -> bool:
    """Whether the structure of a JPEG or PNG file is complete; False for other formats and doubtful files.

    A JPEG needs all segments, a size that Pillow accepts, and an end marker after its scan. A PNG needs all chunks with
    correct checksums.

    Raises:
        OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError: A damaged PNG; see `opened`.
    """
    if content.startswith(b"\x89PNG"):
        with opened(content) as image:
            clear = content[24] < 16  # bits per sample; a PNG of 16 bits may be unsupported
            image.verify()
        return clear and content.rstrip(b"\0").endswith(b"IEND\xaeB`\x82")
    if jpeg_header(content) is None:
        return False
    for marker, _, end in segments(content):
        if marker == SCAN:  # reaches to the end of the file; the end marker of a thumbnail is in an earlier segment
            return content.rfind(b"\xff\xd9", max(end, len(content) - 65536)) >= 0
    return False


def read_image(path: Path, resize: Resize | None = None, check: Check = "decode") -> tuple[bytes, str]:
    """Reads an image file, checks it, and resizes it if needed.

    Args:
        path: The file.
        resize: How to resize the image; None keeps its size.
        check: `decode` decodes every file. `structure` decodes a file only if `is_whole` is False for it, which takes
            about a thirtieth of the time per photo, but misses damage inside the pixel data.

    Returns:
        The bytes to store and their extension (lower case, no dot). The bytes are those of the file, unless its size
        changes: then they are a JPEG of the pixels from `decode_rgb`, upright and without EXIF data.

    Raises:
        UnreadableImageError: The file is unreadable, damaged, truncated, of an unsupported format, a decompression
            bomb, or too narrow to be resized.
    """
    try:
        content = read_limited(path)
    except UnreadableImageError:
        raise
    except OSError as error:
        raise UnreadableImageError(f"can't be read ({error.strerror})", may_pass=True) from None
    return checked_image(content, path.suffix, resize, check)


def checked_image(content: bytes, suffix: str, resize: Resize | None, check: Check) -> tuple[bytes, str]:
    """Checks the content of an image file, and resizes it if needed.

    Args:
        content: The bytes of the file.
        suffix: Suffix of its name, with the dot.
        resize, check: See `read_image`.

    Returns:
        See `read_image`.

    Raises:
        UnreadableImageError: See `read_image`.
    """
    suffix = suffix.lower()
    extension = "jpg" if suffix in JPEG_ALIASES else suffix[1:]
    try:
        if resize is None and check == "structure" and is_whole(content):
            return content, extension
        with opened(content) as image:
            image.verify()
        rgb = Image.fromarray(decode_rgb(content))  # decodes all pixels, as training will
    except UnreadableImageError:
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"refused as a decompression bomb: {error}") from None
    except Exception as error:  # Pillow's decoders raise almost any exception on damaged data
        raise UnreadableImageError(f"damaged ({type(error).__name__}: {error})") from None
    if resize is None or resize.target(*rgb.size) == rgb.size:
        return content, extension
    width, height = resize.target(*rgb.size)
    if max(width, height) > LARGEST_JPEG:
        raise UnreadableImageError(
            f"{width} x {height} pixels after resizing, expected at most {LARGEST_JPEG} per side"
        )
    buffer = io.BytesIO()
    rgb = rgb.resize(resize.target(*rgb.size), Image.Resampling.BICUBIC)
    rgb.save(buffer, "JPEG", quality=resize.quality, subsampling=0)
    return buffer.getvalue(), "jpg"


def open_photo(path: str | os.PathLike) -> Image.Image:
    """Opens a photo as `decode_rgb` decodes it: upright and in RGB.

    Raises:
        OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError: The file can't be read or decoded.
    """
    return Image.fromarray(decode_rgb(read_limited(path)))
