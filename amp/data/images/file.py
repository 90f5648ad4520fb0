"""Image files that others made: checked and read for a shard, untouched or resized; or opened to be shown."""

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

JPEG_ALIASES = (".jpe", ".jfif", ".jif", ".mpo")  # stored as jpg, which readers of shards expect
LARGEST_JPEG = 65_500  # pixels per side that libjpeg writes
MAX_FILE_BYTES = 1 << 29
"""Maximum bytes of an image file: half a gigabyte, more than any image that isn't a decompression bomb needs."""

Check = Literal["structure", "decode"]
"""How a damaged file is found; see `read_image`."""


@dataclass(frozen=True, slots=True)
class Resize:
    """How images are made smaller before they are stored.

    Attributes:
        size: Pixels of the shorter side.
        mode: ``"shortest"`` makes the shorter side `size` and keeps the aspect ratio; smaller images stay untouched.
            ``"squash"`` makes every image `size` x `size`.
        quality: Quality of the JPEG, 1 to 95 on Pillow's scale.
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
    """The bytes of a regular file of at most `MAX_FILE_BYTES`.

    Raises:
        OSError: It can't be read.
        UnreadableImageError: It is a pipe or a device, which may never end, or too large.
    """
    # Not blocking, or a pipe put here after the folder was looked at would hang.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise UnreadableImageError("not a file, but a pipe or a device")
        if found.st_size > MAX_FILE_BYTES:
            raise UnreadableImageError(f"{found.st_size} bytes, expected at most {MAX_FILE_BYTES}")
        return file.read(MAX_FILE_BYTES)


def is_whole(content: bytes) -> bool:
    """Whether the structure of a JPEG or PNG is complete; False for other formats, and if in doubt.

    A JPEG must have all segments, a frame of a size that Pillow reads, and its end after its scan; a PNG all chunks,
    each with the right checksum.

    Raises:
        OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError: A PNG that is not whole; see `opened`.
    """
    if content.startswith(b"\x89PNG"):
        with opened(content) as image:
            clear = content[24] < 16  # bits of a sample; deeper ones may have to be refused
            image.verify()
        return clear and content.rstrip(b"\0").endswith(b"IEND\xaeB`\x82")
    if jpeg_header(content) is None:
        return False
    for marker, _, end in segments(content):
        if marker == SCAN:  # runs to the end of the file; a thumbnail's end lies in an earlier segment
            return content.rfind(b"\xff\xd9", max(end, len(content) - 65536)) >= 0
    return False


def read_image(path: Path, resize: Resize | None = None, check: Check = "decode") -> tuple[bytes, str]:
    """The bytes to store and their extension (lower case, no dot) of a file that is whole.

    These are the file's own bytes, unless `resize` changes the size of the image. Then it is a JPEG of the pixels that
    `decode_rgb` gives: upright and without EXIF data.

    Args:
        path: The file.
        resize: How to make it smaller.
        check: ``decode`` decodes every file. ``structure`` decodes only files whose structure (`is_whole`) is unknown
            or damaged, which takes about a thirtieth of the time per photo. It misses damage inside the pixels' data.

    Raises:
        UnreadableImageError: Unreadable, damaged, cut short, of another format, a decompression bomb, or too narrow to
            be resized.
    """
    try:
        content = read_limited(path)
    except UnreadableImageError:
        raise
    except OSError as error:
        raise UnreadableImageError(f"can't be read ({error.strerror})", may_pass=True) from None
    suffix = path.suffix.lower()
    extension = "jpg" if suffix in JPEG_ALIASES else suffix[1:]
    try:
        if resize is None and check == "structure" and is_whole(content):
            return content, extension
        with opened(content) as image:
            image.verify()
        rgb = Image.fromarray(decode_rgb(content))  # all pixels, as training will ask for them
    except UnreadableImageError:
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"refused as a decompression bomb: {error}") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
        raise UnreadableImageError(f"damaged ({type(error).__name__}: {error})") from None
    if resize is None or resize.target(*rgb.size) == rgb.size:
        return content, extension
    width, height = resize.target(*rgb.size)
    if max(width, height) > LARGEST_JPEG:
        raise UnreadableImageError(f"{width} x {height} pixels when resized, expected at most {LARGEST_JPEG} a side")
    buffer = io.BytesIO()
    rgb = rgb.resize(resize.target(*rgb.size), Image.Resampling.BICUBIC)
    rgb.save(buffer, "JPEG", quality=resize.quality, subsampling=0)
    return buffer.getvalue(), "jpg"


def open_photo(path: str | os.PathLike) -> Image.Image:
    """Opens a photo as `decode_rgb` decodes it: upright and in RGB.

    Raises:
        OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError: It can't be read, or is no such photo.
    """
    return Image.fromarray(decode_rgb(read_limited(path)))
