"""Image files: valid ones, ones with a false size in the header, broken ones, and unusual but valid ones."""

import io
import struct
import zlib
from functools import cache

from PIL import Image

PNG = b"\x89PNG\r\n\x1a\n"


def encoded(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    """The bytes of an image file."""
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of any declared size with correct checksums and hardly any pixel data."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return PNG + b"".join(_chunk(name, content) for name, content in parts)


def whole_png(width: int, height: int) -> bytes:
    """A complete PNG with one bit per pixel, whose pixels compress to almost nothing."""
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes((1 + (width + 7) // 8) * height))), (b"IEND", b"")]
    return PNG + b"".join(_chunk(name, content) for name, content in parts)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def jpeg(width: int, height: int) -> bytes:
    """A JPEG file with a false size in its header."""
    content = bytearray(encoded(Image.new("RGB", (16, 16)), "JPEG"))
    content[(at := content.index(b"\xff\xc0")) + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def webp(width: int, height: int) -> bytes:
    """A WebP file with a false size in its header."""
    body = encoded(Image.new("RGB", (16, 16)), "WEBP")[12:]
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    chunks = b"WEBPVP8X" + struct.pack("<II", 10, 0) + size + body
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


def gif(width: int, height: int) -> bytes:
    """A GIF file whose screen and only frame have this size."""
    content = bytearray(encoded(Image.new("P", (16, 16)), "GIF"))
    at = content.index(b"\x2c", 13)
    content[6:10] = content[at + 5 : at + 9] = struct.pack("<HH", width, height)
    return bytes(content)


def bmp(width: int, height: int) -> bytes:
    """A BMP file with a false size in its header."""
    content = bytearray(encoded(Image.new("RGB", (16, 16)), "BMP"))
    content[18:26] = struct.pack("<ii", width, height)
    return bytes(content)


def tiff(width: int, height: int) -> bytes:
    """A TIFF file with a false size in its header."""
    content = encoded(Image.new("RGB", (16, 16)), "TIFF")
    for tag, value in ((256, width), (257, height)):
        at = (
            content.index(struct.pack("<HH", tag, 4))
            if struct.pack("<HH", tag, 4) in content
            else content.index(struct.pack("<HH", tag, 3))
        )
        content = content[:at] + struct.pack("<HHII", tag, 4, 1, value) + content[at + 12 :]
    return content


def avif(width: int, height: int) -> bytes:
    """An AVIF file with a false size in its header."""
    content = encoded(Image.new("RGB", (16, 16)), "AVIF")
    at = content.index(b"ispe") + 8
    return content[:at] + struct.pack(">II", width, height) + content[at + 8 :]


@cache
def bad_images() -> dict[str, bytes]:
    """Bad images by file name. None may reach a model, and none may prevent the use of other files in its folder."""
    whole = Image.effect_noise((48, 36), 60).convert("RGB")
    orientations = struct.pack("<2sHIH", b"II", 42, 8, 60_000) + b"\x12\x01\x03\x00\xff\xff\xff\x7f\x06\x00\x00\x00" * 9
    return {
        "png bomb.png": png(60_000, 60_000),
        "png a bit too large.png": whole_png(13_000, 7_000),
        "png text bomb.png": png(16, 16, (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80_000_000)))),
        "jpeg bomb.jpg": jpeg(65_500, 65_500),
        "webp bomb.webp": webp(16_383, 16_383),
        "gif bomb.gif": gif(65_535, 65_535),
        "bmp bomb.bmp": bmp(60_000, 60_000),
        "tiff bomb.tif": tiff(200_000, 200_000),
        "avif bomb.jpg": avif(16_000, 16_000),
        "empty.jpg": b"",
        "one byte.png": b"\x89",
        "text.jpg": b"<html><script>alert(1)</script></html>",
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch canary) (w) file\n",
        "svg.png": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "half.jpg": encoded(whole, "JPEG")[:400],
        "exif alone.jpg": b"\xff\xd8\xff\xe1\xff\xff" + b"Exif\0\0" + orientations,
        "zip.webp": b"PK\x05\x06" + bytes(18),
    }


@cache
def odd_images() -> dict[str, bytes]:
    """Unusual but valid images by file name. They are used, but only their first frame."""
    first, second = (Image.new("RGB", (48, 36), colour) for colour in ("red", "blue"))
    exif = Image.Exif()
    exif[0x010E] = "=cmd|' /C calc'!A0 <script>alert(1)</script>" * 100
    animated = {"save_all": True, "append_images": [second] * 20}
    return {
        "a png in truth.jpg": encoded(first, "PNG"),
        "a jpeg in truth.png": encoded(first, "JPEG"),
        "a zip behind it.jpg": encoded(first, "JPEG") + b"PK\x05\x06" + bytes(18),
        "a page behind it.png": encoded(first, "PNG") + b"<script>alert(1)</script>",
        "much exif.jpg": encoded(first, "JPEG", exif=exif),
        "animated.gif": encoded(first, "GIF", **animated),
        "animated.webp": encoded(first, "WEBP", **animated),
        "pages.tif": encoded(first, "TIFF", **animated),
    }
