"""Formats of photos: which ones this machine reads, and why others are not read."""

from functools import cache
from importlib.util import find_spec

from PIL import Image

from amp.extras import pip_install

# Suffixes of photos that can be read, and Pillow's decoder for each. Pillow knows many more, some of which start other
# programs (EPS). Decoders look at the content of a file, so a PNG called a.jpg is read, too.
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


# Suffixes of photos and pictures that are not read, by format. They are named when a folder is listed.
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
        One sentence. None if it can be read (it is one of `PHOTO_SUFFIXES`), and for files that are no photos.
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
    """An image that can't be used. The message is the reason, fit to be shown.

    Attributes:
        may_pass: Whether the reason lies outside the file's content (permissions, a network disk).
    """

    def __init__(self, reason: str, may_pass: bool = False) -> None:
        super().__init__(reason)
        self.may_pass = may_pass


@cache
def decoders() -> tuple[str, ...]:
    """Pillow's names of the decoders of `DECODER_OF` that this machine has."""
    Image.init()
    if find_spec("pillow_heif") is not None:
        from pillow_heif import register_heif_opener

        register_heif_opener(thumbnails=False)
    return tuple(name for name in dict.fromkeys(DECODER_OF.values()) if name in Image.OPEN)


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


def why_unidentified(content: bytes) -> str:
    """Why no decoder reads a file, by its first bytes. An iPhone's HEIC may be called a.jpg."""
    head = content[:12]
    suffix = next((_MAGIC[magic] for magic in _MAGIC if head.startswith(magic) or head[4:].startswith(magic)), "")
    if suffix == ".tif":
        return "a damaged TIFF, or one of a sample type that is not read; save it with 8 bits per channel"
    return unreadable_reason(suffix) or f"{len(content)} bytes, not an image of {', '.join(decoders())}"
