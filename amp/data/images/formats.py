"""Photo formats: which ones this machine can read, and why others can't be read."""

from functools import cache
from importlib.util import find_spec

from PIL import Image

from amp.extras import pip_install

# Suffixes of supported photos, and Pillow's decoder for each. Pillow has many more decoders, some of which start other
# programs (EPS). Decoders go by the content of a file, so a PNG called a.jpg is also read.
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


# Suffixes of unsupported image formats. Such files in a folder of photos are reported to the user.
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
    suffix: f"{name} is not supported; convert it to JPEG or PNG"
    for name, suffixes in _OTHER_FORMATS.items()
    for suffix in suffixes.split()
}


def unreadable_reason(suffix: str) -> str | None:
    """Why photos with a suffix (with the dot, in any case) can't be read on this machine.

    Returns:
        The reason. None for supported photos (`PHOTO_SUFFIXES`) and for files that are not photos.
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
"""Suffixes of photos that can be read on this machine, in lower case with the dot."""


class UnreadableImageError(OSError):
    """An image that can't be used. The message is the reason, written for the user.

    Attributes:
        may_pass: Whether the problem may go away without a change of the file (permissions, a network disk).
    """

    def __init__(self, reason: str, may_pass: bool = False) -> None:
        super().__init__(reason)
        self.may_pass = may_pass


@cache
def decoders() -> tuple[str, ...]:
    """Pillow's names of the decoders in `DECODER_OF` that are installed."""
    Image.init()
    if find_spec("pillow_heif") is not None:
        from pillow_heif import register_heif_opener

        register_heif_opener(thumbnails=False)
    return tuple(name for name in dict.fromkeys(DECODER_OF.values()) if name in Image.OPEN)


_MAGIC = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG": ".png",
    b"WEBP": ".webp",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"\0\0\0\x0cjP  ": ".jp2",
    b"\xff\x4f\xff\x51": ".j2k",
    b"\0\0\0\x0cJXL ": ".jxl",
    b"\xff\x0a": ".jxl",
    b"8BPS": ".psd",
    **dict.fromkeys((b"ftypavif", b"ftypavis"), ".avif"),
    **dict.fromkeys((b"ftyphei", b"ftyphev", b"ftypmif1", b"ftypmsf1"), ".heic"),
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), ".tif"),
}


def suffix_of(content: bytes) -> str:
    """Usual suffix of an image file with this content, by its first bytes; "" if they are unknown."""
    starts = (content[:12], content[4:12] if content[4:8] == b"ftyp" else b"", content[8:12])
    return next((_MAGIC[magic] for magic in _MAGIC if any(start.startswith(magic) for start in starts)), "")


def why_unidentified(content: bytes) -> str:
    """Why no decoder reads a file, judged by its first bytes: an iPhone's HEIC file may be called a.jpg."""
    suffix = suffix_of(content)
    if suffix == ".tif":
        return "a TIFF that is damaged or has an unsupported sample type; save it with 8 bits per channel"
    return (
        unreadable_reason(suffix) or f"{len(content)} bytes, not an image in one of the formats {', '.join(decoders())}"
    )
