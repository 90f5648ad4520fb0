"""Photo bytes to upright RGB pixels, for every part of the product; without torch, which takes seconds to import."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from amp.extras import pip_install

DECODING_VERSION = 2
"""Part of the name of everything that is stored and depends on decoded pixels. Raise it when pixels change."""

# What shows through a transparent picture. White, because the photos that CLIPs of open_clip were trained on had white
# put under them by img2dataset, and because pages that show cut-outs are white.
BACKGROUND = "white"

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
        return f"HEIC needs the package pillow-heif; {pip_install('pillow_heif')}"
    return _NOT_READ.get(suffix)


def _reads_avif() -> bool:
    try:
        from PIL import AvifImagePlugin
    except ImportError:  # Pillow before 11.3
        return False
    return AvifImagePlugin.SUPPORTED


PHOTO_SUFFIXES = tuple(suffix for suffix in DECODER_OF if unreadable_reason(suffix) is None)
"""Suffixes of the photos that can be read on this machine, in lower case with the dot."""


class UnreadableImageError(OSError):
    """An image that can't be used. The message is the reason, to be shown as it is.

    Attributes:
        may_pass: Whether the reason lies outside the file's content (permissions, a network disk).
    """

    def __init__(self, reason: str, may_pass: bool = False) -> None:
        super().__init__(reason)
        self.may_pass = may_pass


def decode_rgb(content: bytes, shrink: int = 1) -> np.ndarray:
    """Upright pixels uint8 (H, W, 3) of a photo.

    The orientation that a camera notes (EXIF or XMP) is applied, `BACKGROUND` shows through transparent pixels, and
    samples of 12, 16 and 32 bits are scaled to 8 (docs/data.md, "Pixels"). Pixels of other photos are bit for bit those
    of Pillow's `convert("RGB")`: both decode JPEG with libjpeg-turbo. Called without Pillow in between it writes into
    the array at once, where Pillow hands it the file in small pieces, and keeps and converts an image of its own.

    Args:
        content: The bytes of the file.
        shrink: 2, 4 or 8 leaves out the frequencies that a photo so much smaller can't show, rounds where it saves
            time, and gives (ceil(H / shrink), ceil(W / shrink), 3). Only where `jpeg_size` knows the size.

    Raises:
        OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError: see `opened`.
    """
    header = _jpeg_header(content)
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
            return pixels if orientation not in _UPRIGHT else _turned(Image.fromarray(pixels), orientation)
        except ValueError:
            pass  # damaged; Pillow may still make an image of it, or says what is wrong
    with opened(content) as image:
        rgb = _to_rgb(image)
        return _turned(rgb if shrink == 1 else rgb.reduce(shrink), _orientation(image))


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
                image = Image.open(io.BytesIO(content), formats=_decoders())
            except Image.DecompressionBombError as error:  # whose text names twice our limit
                seen = re.search(r"\d+", str(error))
                raise _bomb(f"{int(seen[0]):,}" if seen else "too many") from None
            except UnidentifiedImageError:  # whose text shows the address of an object
                raise UnreadableImageError(_why_unidentified(content)) from None
            with image:
                _refuse_bomb(image)
                yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


@cache
def _decoders() -> tuple[str, ...]:
    """Pillow's names of the decoders of `DECODER_OF` that this machine has."""
    Image.init()
    if find_spec("pillow_heif") is not None:
        from pillow_heif import register_heif_opener

        register_heif_opener(thumbnails=False)
    return tuple(name for name in dict.fromkeys(DECODER_OF.values()) if name in Image.OPEN)


def _refuse_bomb(image: Image.Image) -> None:
    """Refuses more pixels than Pillow warns of; by itself it takes twice as many."""
    (width, height), most = image.size, Image.MAX_IMAGE_PIXELS
    if most is not None and width * height > most:
        raise _bomb(f"{width} x {height}")


def _bomb(pixels: str) -> Image.DecompressionBombError:
    most = Image.MAX_IMAGE_PIXELS
    return Image.DecompressionBombError(
        f"{pixels} pixels, expected at most {most:,}: a decompression bomb, or a photo that must be made smaller"
    )


_MAGIC = {
    b"\0\0\0\x0cjP  ": ".jp2",
    b"\xff\x4f\xff\x51": ".j2k",
    b"\0\0\0\x0cJXL ": ".jxl",
    b"\xff\x0a": ".jxl",
    b"8BPS": ".psd",
    **dict.fromkeys((b"ftypavif", b"ftypavis"), ".avif"),
    **dict.fromkeys((b"ftyphei", b"ftyphev", b"ftypmif1", b"ftypmsf1"), ".heic"),
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), ".tif"),
}


def _why_unidentified(content: bytes) -> str:
    """Why no decoder takes a file, by its first bytes; an iPhone's HEIC may well be called a.jpg."""
    head = content[:12]
    suffix = next((_MAGIC[magic] for magic in _MAGIC if head.startswith(magic) or head[4:].startswith(magic)), "")
    if suffix == ".tif":
        return "a damaged TIFF, or one of a sample type that is not read; save it with 8 bits per channel"
    return unreadable_reason(suffix) or f"{len(content)} bytes, not an image of {', '.join(_decoders())}"


# Orientation

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _turned(image: Image.Image, orientation: int) -> np.ndarray:
    return np.asarray(image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image)


def _orientation(image: Image.Image) -> int:
    """The orientation that a decoded image still needs, 1 to 8, as `PIL.ImageOps.exif_transpose` finds it; 1 where the
    data is damaged."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # nearly anything, as decoders; the pixels are whole
        return 1
    return found if found in _UPRIGHT else 1


def _jpeg_orientation(content: bytes) -> int:
    """The same of a JPEG that nothing has opened: 5 microseconds where it is 1, ten times as long elsewhere."""
    info: dict[str | tuple[int, int], bytes] = {}
    for marker, start, end in _segments(content):
        if marker == 0xE1:  # as Pillow reads it
            if content.startswith(b"Exif\0\0", start):
                info["exif"] = info["exif"] + content[start + 6 : end] if "exif" in info else content[start:end]
            elif content.startswith(b"http://ns.adobe.com/xap/1.0/\0", start):
                info["xmp"] = content[start + 29 : end]
    if not info or not (_may_turn(info.get("exif", b"")) or b"Orientation" in info.get("xmp", b"")):
        return 1
    image = Image.Image()
    image.info = info
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _orientation(image)


_ONE = {  # EXIF's tag of the orientation and the usual rest of an entry that says 1, by byte order
    b"II": (b"\x12\x01", b"\3\0\1\0\0\0\1\0"),
    b"MM": (b"\x01\x12", b"\0\3\0\0\0\1\0\1"),
}


def _may_turn(exif: bytes) -> bool:
    """False where the orientation surely is 1: no tag or the usual one. So Pillow seldom has to read all tags."""
    if exif[6:8] not in _ONE:
        return bool(exif)
    tag, rest = _ONE[exif[6:8]]
    place = exif.find(tag)
    while place >= 0:
        if not exif.startswith(rest, place + 2):
            return True
        place = exif.find(tag, place + 2)
    return False


# Samples


def _to_rgb(file: ImageFile.ImageFile) -> Image.Image:
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


_SIGNED = 2  # a value of TIFF's tag SampleFormat


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


# Headers


def _jpeg_header(content: bytes) -> tuple[int, int, int] | None:
    """Stored height, stored width and orientation of a JPEG in grey or YCbCr; None of anything else, and of what Pillow
    would take for a decompression bomb."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    most = Image.MAX_IMAGE_PIXELS
    known = colorspace in ("YCbCr", "Gray") and (most is None or height * width <= most)
    return (height, width, _jpeg_orientation(content)) if known else None


_SCAN = 0xDA


def _segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of the content of each segment of a JPEG, up to the one before its scan."""
    place, last = 2, len(content) - 4
    while place <= last and content[place] == 0xFF:
        marker = content[place + 1]
        if marker == 0xFF:  # filling
            place += 1
            continue
        end = place + 2 + (content[place + 2] << 8) + content[place + 3]
        yield marker, place + 4, end
        if marker == _SCAN:
            return
        place = end


def jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Height and width of an upright JPEG in grey or YCbCr; None of anything else."""
    header = _jpeg_header(content)
    if header is None:
        return None
    height, width, orientation = header
    return (width, height) if orientation >= 5 else (height, width)


def is_whole(content: bytes) -> bool:
    """Whether a JPEG has all its segments, a frame of a size that Pillow takes, and its end behind its scan; or a PNG
    all its chunks, each with the right checksum. False of other formats, and where in doubt.

    Raises:
        OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError: A PNG that is not whole; see `opened`.
    """
    if content.startswith(b"\x89PNG"):
        with opened(content) as image:
            clear = content[24] < 16  # bits of a sample; deeper ones may have to be refused
            image.verify()
        return clear and content.rstrip(b"\0").endswith(b"IEND\xaeB`\x82")
    if _jpeg_header(content) is None:
        return False
    for marker, _, end in _segments(content):
        if marker == _SCAN:  # runs to the end of the file; a thumbnail's end lies in an earlier segment
            return content.rfind(b"\xff\xd9", max(end, len(content) - 65536)) >= 0
    return False
