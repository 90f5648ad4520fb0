"""Photo bytes to pixels; without torch, which costs a process that only looks at files seconds."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import numpy as np
import simplejpeg
from PIL import Image

# Suffixes of the photos that can be read, and the decoder of Pillow that reads each. Pillow knows many more, some of
# which start other programs (EPS). Decoders look at a file's content: a PNG called a.jpg is read, too.
DECODER_OF = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo"), "JPEG"),
    **dict.fromkeys((".png", ".apng"), "PNG"),
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    ".avif": "AVIF",
    **dict.fromkeys((".heic", ".heif", ".hif"), "HEIF"),
}

# Suffixes of photos and pictures that are not read, by what they are. A folder's listing names them.
_OTHER_FORMATS = {
    "JPEG 2000": ".jp2 .j2k .j2c .jpc .jpf .jpx .jph",
    "JPEG XL": ".jxl",
    "JPEG XR": ".jxr .wdp .hdp",
    "a camera's raw format": ".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef "
    ".raf .raw .rw2 .rwl .sr2 .srf .srw .x3f",
    "a drawing program's format": ".psd .psb .xcf .kra .svg .svgz .eps .ai",
    "an image format without a reader here": ".exr .hdr .pfm .tga .pcx .ppm .pgm .pbm .pnm .dib .dds .qoi .fits .dcm",
}
_NOT_READ = {
    suffix: f"{name} is not read; convert it to JPEG or PNG"
    for name, suffixes in _OTHER_FORMATS.items()
    for suffix in suffixes.split()
}


def unreadable_reason(suffix: str) -> str | None:
    """Why a photo can't be read on this machine, by the suffix of its name (with the dot, in any case).

    Returns:
        One sentence; None where it can be read (it is one of `PHOTO_SUFFIXES`), and for files that are no photos.
    """
    suffix = suffix.lower()
    if DECODER_OF.get(suffix) == "AVIF" and not _reads_avif():
        return "AVIF needs Pillow 11.3 or newer; run pip install --upgrade pillow"
    if DECODER_OF.get(suffix) == "HEIF" and find_spec("pillow_heif") is None:
        return "HEIC needs the package pillow-heif; run pip install pillow-heif"
    return _NOT_READ.get(suffix)


def _reads_avif() -> bool:
    try:
        from PIL import AvifImagePlugin
    except ImportError:  # Pillow before 11.3
        return False
    return AvifImagePlugin.SUPPORTED


PHOTO_SUFFIXES = tuple(suffix for suffix in DECODER_OF if unreadable_reason(suffix) is None)
"""Suffixes of the photos that can be read on this machine, in lower case with the dot."""

PILLOW_FORMATS = tuple(dict.fromkeys(DECODER_OF[suffix] for suffix in PHOTO_SUFFIXES))
"""The decoders that may look at a photo."""


def decode_rgb(content: bytes, shrink: int = 1) -> np.ndarray:
    """Pixels uint8 (H, W, 3) of a photo, bit for bit those of Pillow's `convert("RGB")`; no EXIF data is applied.

    Both decode JPEG with libjpeg-turbo. Called without Pillow in between it writes into the array at once, where Pillow
    hands it the file in small pieces, and keeps and converts an image of its own.

    Args:
        content: Of the file.
        shrink: 2, 4 or 8 leaves out the frequencies that a photo so much smaller can't show, rounds where it saves
            time, and gives (ceil(H / shrink), ceil(W / shrink), 3). Only where `jpeg_size` knows the size.

    Raises:
        OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError: see `decoding`.
    """
    size = jpeg_size(content)
    if size is not None:
        try:
            if shrink == 1:
                return simplejpeg.decode_jpeg(content)
            height, width = (-(-x // shrink) for x in size)
            return simplejpeg.decode_jpeg(
                content, min_height=height, min_width=width, fastdct=True, fastupsample=True
            )  # fmt: skip
        except ValueError:
            pass  # damaged; Pillow may still make an image of it, or says what is wrong
    with decoding(), Image.open(io.BytesIO(content), formats=PILLOW_FORMATS) as image:
        refuse_bomb(image)
        return np.asarray(image.convert("RGB").reduce(shrink))


@contextmanager
def decoding() -> Iterator[None]:
    """Turns what Pillow's decoders raise on damaged data, which is nearly anything, into an OSError.

    Raises:
        OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError: These pass as they are.
    """
    try:
        yield
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def refuse_bomb(image: Image.Image) -> None:
    """Refuses an image, opened but not decoded, of more pixels than Pillow warns of; by itself it takes twice as many.

    Raises:
        PIL.Image.DecompressionBombError: With its size.
    """
    (width, height), most = image.size, Image.MAX_IMAGE_PIXELS
    if most is not None and width * height > most:
        raise Image.DecompressionBombError(
            f"{width} x {height} pixels, expected at most {most:,}: a decompression bomb"
        )


def jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG in grey or YCbCr; None of anything else, and of what Pillow would take for a
    decompression bomb."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    known = colorspace in ("YCbCr", "Gray") and height * width <= Image.MAX_IMAGE_PIXELS
    return (height, width) if known else None


def is_whole(content: bytes) -> bool:
    """Whether a JPEG has all its segments, a frame of a size that Pillow takes, and its end behind its scan; or a PNG
    all its chunks, each with the right checksum. False of other formats, and where in doubt.

    Raises:
        OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError: A PNG that is not whole; see `decoding`.
    """
    if content.startswith(b"\x89PNG"):
        with decoding(), Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            refuse_bomb(image)
            image.verify()
        return content.rstrip(b"\0").endswith(b"IEND\xaeB`\x82")
    size = jpeg_size(content)
    if size is None:
        return False
    place = 2
    while content[place : place + 1] == b"\xff" and place + 4 <= len(content):
        marker, length = content[place + 1], int.from_bytes(content[place + 2 : place + 4], "big")
        place += 2 + length
        if marker == 0xDA:  # the scan follows, and runs to the end; a thumbnail's end lies in an earlier segment
            return content.rfind(b"\xff\xd9", max(place, len(content) - 65536)) >= 0
    return False
