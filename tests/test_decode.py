"""Decoding of photos in all commands: orientation, sample formats, transparency, file formats."""

import io
import json
import struct
import timeit
import zlib
from functools import partial
from random import Random

import numpy as np
import pytest
import simplejpeg
import torch
from open_clip.transform import image_transform
from PIL import Image, features
from support.commands import arguments
from support.drawn_data import draw
from support.photos import encoded
from support.repository import ROOT, launcher

import amp
from amp.data.conversion.make import make_shards
from amp.data.images.decode import decode_rgb
from amp.data.images.file import Resize, open_photo, read_image
from amp.data.images.formats import DECODER_OF, PHOTO_SUFFIXES, UnreadableImageError, unreadable_reason
from amp.data.images.headers import jpeg_size
from amp.data.pixels import RandomCrop
from amp.data.split import ShardSplit

needs_avif = pytest.mark.skipif(not features.check("avif"), reason="needs Pillow with AVIF")
UPRIGHT = np.random.default_rng(0).integers(0, 255, (29, 45, 3), dtype=np.uint8)


# Orientation


def stored(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """An upright picture as a camera stores it for an EXIF orientation (tag 274)."""
    if orientation >= 5:  # the first stored row is a left or right side
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 6, 7):  # the first row is bottom, bottom, right, right
        pixels = pixels[::-1]
    if orientation in (2, 3, 7, 8):  # the first column is right, right, bottom, bottom
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def tagged(pixels: np.ndarray, format: str, orientation: int, description: str = "", **options) -> bytes:
    """An image file of an upright picture, stored and tagged like a camera does."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    if description:
        exif[0x010E] = description
        exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    return encoded(Image.fromarray(stored(pixels, orientation)), format, exif=exif.tobytes(), **options)


def test_a_photo_is_upright_whatever_way_it_is_stored():
    for orientation in range(1, 9):
        for format, options in (
            ("PNG", {}),
            ("WEBP", {"lossless": True}),
            ("TIFF", {}),
            ("TIFF", {"compression": "tiff_lzw"}),
        ):
            content = tagged(UPRIGHT, format, orientation, **options)
            assert np.array_equal(decode_rgb(content), UPRIGHT), (orientation, format, options)
        xmp = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
        lossless = encoded(Image.fromarray(stored(UPRIGHT, orientation)), "WEBP", lossless=True, xmp=xmp)
        assert np.array_equal(decode_rgb(lossless), UPRIGHT), (orientation, "XMP")


def test_a_jpeg_is_turned_without_being_opened_by_pillow():
    """Every way to store the orientation in a JPEG, compared with the pixels of the file without orientation."""
    for orientation in range(1, 9):
        for description in ("", "x" * 500):
            content = tagged(UPRIGHT, "JPEG", orientation, description, quality=95, icc_profile=bytes(70_000))
            plain = simplejpeg.decode_jpeg(content)  # ignores the orientation
            assert np.array_equal(stored(decode_rgb(content), orientation), plain), (orientation, description)
            assert jpeg_size(content) == UPRIGHT.shape[:2], (orientation, description)
        note = f'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="{orientation}"/>'.encode()
        whole = encoded(Image.fromarray(stored(UPRIGHT, orientation)), "JPEG")
        place = 4 + int.from_bytes(whole[4:6], "big")  # after the first segment, with the padding that libjpeg allows
        content = whole[:place] + b"\xff\xff\xff\xe1" + (2 + len(note)).to_bytes(2, "big") + note + whole[place:]
        plain = simplejpeg.decode_jpeg(whole)
        assert np.array_equal(stored(decode_rgb(content), orientation), plain), (orientation, "XMP")


def test_smaller_decoding_has_the_layout_of_the_upright_photo():
    """Each quarter of the photo has its own colour, and the sides are not multiples of the scale factor."""
    pixels = np.zeros((50, 94, 3), np.uint8)
    pixels[:25, :47], pixels[:25, 47:], pixels[25:, :47] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    for orientation in range(1, 9):
        content = tagged(pixels, "JPEG", orientation, quality=95)
        for shrink in (2, 4, 8):
            small = decode_rgb(content, shrink)
            assert small.shape == (-(-50 // shrink), -(-94 // shrink), 3)
            corners = small[[0, 0, -1, -1], [0, -1, 0, -1]].astype(int)
            assert np.abs(corners - [(250, 0, 0), (0, 250, 0), (0, 0, 250), (0, 0, 0)]).max() < 12


def test_odd_orientations_leave_the_pixels_as_they_are():
    for orientation in (0, 9, 60_000):
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert np.array_equal(decode_rgb(encoded(Image.fromarray(UPRIGHT), "PNG", exif=exif)), UPRIGHT)
    whole = encoded(Image.fromarray(UPRIGHT), "JPEG")
    for exif in (b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0" + bytes(range(256))):
        content = encoded(Image.fromarray(UPRIGHT), "JPEG", exif=exif)
        assert np.array_equal(decode_rgb(content), decode_rgb(whole)) and jpeg_size(content) == (29, 45)


@pytest.fixture(scope="module")
def phone(tmp_path_factory):
    """16 drawn photos, upright and as phones store them in all orientations, and shards of both."""
    root = tmp_path_factory.mktemp("phone")
    for kind in ("upright", "stored"):
        (root / kind).mkdir()
        lines = []
        for number in range(16):
            pixels = np.asarray(draw(number).resize((176, 144)))
            orientation = 1 + number % 8 if kind == "stored" else 1
            (root / kind / f"{number:02d}.png").write_bytes(tagged(pixels, "PNG", orientation))
            lines.append({"image": f"{number:02d}.png", "caption": f"A dog chases ball {number}", "split": "test"})
        (root / f"{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        make_shards(str(root / f"{kind}.jsonl"), str(root / kind), str(root / f"{kind} shards"), workers=1)
        make_shards(str(root / f"{kind}.jsonl"), str(root / kind), str(root / f"{kind} resized"), workers=1, resize=48)
    return root


def test_all_paths_see_the_same_array(phone, clip_folder, tmp_path):
    """Evaluation, training, search, choice and resizing see the pixels of the upright photo, bit for bit."""
    splits = [ShardSplit(phone / f"{kind} shards", "test") for kind in ("upright", "stored")]
    crops = [RandomCrop.of(image_transform(32, is_train=True), scaled=scaled) for scaled in (False, True)]
    for number in range(16):
        name = splits[0].record(number)["filename"]
        with Image.open(phone / "upright" / name) as image:
            pixels = np.asarray(image)
        for split, kind in zip(splits, ("upright", "stored"), strict=True):
            assert split.record(number)["filename"] == name
            assert np.array_equal(np.asarray(split.image(number)), pixels)
            assert np.array_equal(np.asarray(open_photo(phone / kind / name)), pixels)
        for crop in crops:
            first, second = (s.decoded(number, partial(crop, random=Random(number))) for s in splits)
            assert torch.equal(first, second)
        for resize in (Resize(48), Resize(40, "squash")):
            first, second = (read_image(phone / kind / name, resize) for kind in ("upright", "stored"))
            assert first == second
            with Image.open(io.BytesIO(second[0])) as image:
                assert 0x0112 not in image.getexif()  # otherwise it would be rotated twice
    first, second = ((phone / f"{kind} resized" / "test-000000.tar").read_bytes() for kind in ("upright", "stored"))
    assert first == second
    model, _, preprocess = amp.create_model_and_transforms(clip_folder)
    features = []
    for kind in ("upright", "stored"):
        search = amp.Retriever(amp.Reranker(model.eval(), preprocess), tmp_path / kind)
        search.update(phone / kind, workers=0)
        features.append(np.array(search.index.features))
    assert np.array_equal(*features)


def test_evaluation_gives_the_same_figures(phone, clip_folder, tmp_path, fresh_accelerate):
    rows = []
    for kind in ("upright", "stored"):
        launcher("amp/commands/evaluate.py").main(
            arguments(
                {
                    "config": ROOT / "launchers/configs/flickr8k.yaml",
                    "model.name": clip_folder,
                    "model.pretrained": "null",
                    "shards": phone / f"{kind} shards",
                    "cache": tmp_path / "cache",
                    "workers": "0",
                    "split": "test",
                    "out": tmp_path / f"{kind}.json",
                }
            )
        )
        rows.append(json.loads((tmp_path / f"{kind}.json").read_text())["rows"])
    assert rows[0][0]["t2i"]["recall"] == rows[1][0]["t2i"]["recall"]
    assert rows[0][0]["i2t"]["recall"] == rows[1][0]["i2t"]["recall"]


def test_features_stored_by_another_way_of_seeing_are_not_used(phone, clip_folder, monkeypatch):
    from amp.data import frozen_features

    model, _, preprocess = amp.create_model_and_transforms(clip_folder)
    split = ShardSplit(phone / "stored shards", "test")
    now = frozen_features.features_folders("cache", split, model, preprocess, "float32")
    monkeypatch.setattr(frozen_features, "DECODING_VERSION", frozen_features.DECODING_VERSION - 1)
    assert frozen_features.features_folders("cache", split, model, preprocess, "float32") != now


# Samples


def tiff(
    pixels: np.ndarray | bytes,
    size: tuple[int, int],
    bits: int,
    sample_format: int = 1,
    photometric: int = 1,
    order: str = "<",
    extra: int | None = None,
) -> bytes:
    """An uncompressed TIFF, written by hand because Pillow writes only a few sample formats."""
    content = pixels if isinstance(pixels, bytes) else pixels.tobytes()
    channels = 1 if isinstance(pixels, bytes) or pixels.ndim == 2 else pixels.shape[2]
    tags = [
        (256, 3, [size[0]]),
        (257, 3, [size[1]]),
        (258, 3, [bits] * channels),
        (259, 3, [1]),
        (262, 3, [photometric]),
        (273, 4, [8]),
        (277, 3, [channels]),
        (278, 3, [size[1]]),
        (279, 4, [len(content)]),
        (339, 3, [sample_format] * channels),
    ]
    if extra is not None:
        tags.insert(-1, (338, 3, [extra]))
    content += bytes(len(content) % 2)
    start, later, entries = 8 + len(content), b"", b""
    far = start + 2 + 12 * len(tags) + 4
    for tag, kind, values in tags:
        packed = struct.pack(f"{order}{len(values)}{'H' if kind == 3 else 'I'}", *values)
        place = packed.ljust(4, b"\0")
        if len(packed) > 4:
            place, later = struct.pack(f"{order}I", far + len(later)), later + packed
        entries += struct.pack(f"{order}HHI", tag, kind, len(values)) + place
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, start)
    return head + content + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + later


def grey_tiff(values, dtype: str, **options) -> bytes:
    kind = {"u": 1, "i": 2, "f": 3}[np.dtype(dtype).kind]
    pixels = np.array([values], dtype)
    return tiff(pixels, (len(values), 1), 8 * pixels.itemsize, kind, order=dtype[0], **options)


def grey_png(values, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG with one row of 16-bit grey pixels."""
    rows = b"\0" + np.array(values, ">u2").tobytes()
    header = struct.pack(">IIBBBBB", len(values), 1, 16, 0, 0, 0, 0)
    found = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(x)) + name + x + struct.pack(">I", zlib.crc32(name + x)) for name, x in found
    )


SIXTEEN = [0, 255, 256, 0x7FFF, 0x8000, 0xFFFF]
SIXTEEN_AS_8 = [0, 0, 1, 127, 128, 255]
SAMPLES = {
    "16 bits": (grey_tiff(SIXTEEN, "<u2"), SIXTEEN_AS_8),
    "16 bits, big-endian": (grey_tiff(SIXTEEN, ">u2"), SIXTEEN_AS_8),
    "16 bits, white is zero": (grey_tiff(SIXTEEN, "<u2", photometric=0), [255 - x for x in SIXTEEN_AS_8]),
    "16 bits, PNG": (grey_png(SIXTEEN), SIXTEEN_AS_8),
    "12 bits": (tiff(b"\x00\x0f\xff\x80\x07\xff", (4, 1), 12), [0, 255, 128, 127]),
    "32 bits": (grey_tiff([0, 2**24, 2**31 - 1, 2**31, 2**32 - 1], "<u4"), [0, 1, 127, 128, 255]),
    "floats": (grey_tiff([0, 0.25, 0.75, 1], "<f4"), [0, 64, 191, 255]),
    "floats, big-endian": (grey_tiff([0, 0.25, 0.75, 1], ">f4"), [0, 64, 191, 255]),
    "floats, white is zero": (grey_tiff([0, 0.25, 0.75, 1], "<f4", photometric=0), [255, 191, 64, 0]),
    "black": (grey_tiff([0, 0], "<u2"), [0, 0]),
    "8 bits, white is zero": (grey_tiff([0, 100, 255], "<u1", photometric=0), [255, 155, 0]),
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_grey_is_scaled_from_black_to_white(kind):
    content, expected = SAMPLES[kind]
    assert decode_rgb(content).tolist() == [[[x, x, x] for x in expected]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (grey_tiff([0, 100, -100], "<i1"), "signed"),
        (grey_tiff([0, 100, -100], "<i2"), "signed"),
        (grey_tiff([0, 100, 70_000], "<i4"), "signed"),
        (grey_tiff([0, 100, 255], "<u2"), "values up to 255, which would all be black because white is 65535"),
        (grey_png([0, 100, 255]), "values up to 255, which would all be black because white is"),
        (grey_tiff([0, 65_535], "<u4"), "which would all be black because white is"),
        (grey_tiff([0, 0.001], "<f4"), "which would all be black because white is"),
        (grey_tiff([0, 255], "<f4"), r"from 0 to 255, expected 0 \(black\) to 1 \(white\)"),
        (grey_tiff([-0.5, 0.5], "<f4"), "from -0.5 to 0.5"),
        (grey_tiff([0, np.nan], "<f4"), "from nan to nan"),
        (grey_tiff([0, np.inf], "<f4"), "from 0 to inf"),
        (grey_tiff([0, 1], "<f2"), "TIFF.*sample type"),
        (grey_tiff([0, 1], "<f8"), "TIFF.*sample type"),
        (tiff(np.ones((1, 1, 3), "<f4"), (1, 1), 32, 3, 2), "TIFF.*sample type"),
    ],
)
def test_samples_that_cannot_be_understood_are_refused_in_words(content, words, tmp_path):
    with pytest.raises(UnreadableImageError, match=words) as found:
        decode_rgb(content)
    assert "0x" not in str(found.value)
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    for check in ("structure", "decode"):  # conversion skips it with each kind of check
        with pytest.raises(UnreadableImageError, match=words):
            read_image(path, check=check)


def test_colours_of_16_bits_are_their_upper_8():
    values = np.array([[[0, 0x7FFF, 0xFFFF], [0x8000, 255, 256]]])
    expected = [[[0, 127, 255], [128, 0, 1]]]
    assert decode_rgb(tiff(values.astype("<u2"), (2, 1), 16, 1, 2)).tolist() == expected
    assert decode_rgb(tiff(values.astype(">u2"), (2, 1), 16, 1, 2, ">")).tolist() == expected


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        *(("YCbCr", "TIFF"), ("LAB", "TIFF"), ("CMYK", "TIFF"), ("CMYK", "JPEG"), ("P", "PNG"), ("P", "GIF")),
        *(("1", "PNG"), ("1", "TIFF"), ("L", "BMP")),
    ],
)
def test_other_modes_keep_their_colours(mode, format):
    """With a picture of primary colours, or of black and white for modes without colour."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    if mode in ("1", "L"):
        colours = [(0, 0, 0), (255, 255, 255)] * 2
    image = Image.new("RGB", (64, 16))
    for place, colour in enumerate(colours):
        image.paste(colour, (16 * place, 0, 16 * place + 16, 16))
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    found = decode_rgb(encoded(image.convert(mode), format))
    assert np.abs(found[8, 8::16].astype(int) - colours).max() <= (25 if mode == "LAB" else 4)


# Transparency


HALF = 128


def cut_out(hidden: tuple[int, int, int]) -> np.ndarray:
    """RGBA: one opaque pixel, one half transparent, and two fully transparent pixels that have a colour."""
    return np.array([[(10, 20, 30, 255), (10, 20, 30, HALF), (*hidden, 0), (*hidden, 0)]], np.uint8)


SEEN = [[10, 20, 30], [round((c * HALF + 255 * (255 - HALF)) / 255) for c in (10, 20, 30)], [255] * 3, [255] * 3]


@pytest.mark.parametrize("hidden", [(0, 0, 0), (200, 10, 90)])
def test_colours_that_are_not_seen_do_not_matter(hidden):
    """Every way to store transparency, compared with the picture on a white background."""
    rgba = cut_out(hidden)
    files = [
        encoded(Image.fromarray(rgba), "PNG"),
        encoded(Image.fromarray(rgba), "TIFF"),
        encoded(Image.fromarray(rgba), "WEBP", lossless=True, exact=True),
        tiff(rgba.astype("<u2") * 257, (4, 1), 16, 1, 2, extra=2),
    ]
    for content in files:
        assert np.abs(decode_rgb(content)[0].astype(int) - SEEN).max() <= 1
    grey = [[[x] * 3 for x in (10, SEEN[1][0], 255, 255)]]
    la = np.ascontiguousarray(rgba[..., [0, 3]])
    premultiplied = la.copy()
    premultiplied[..., 0] = [[10, 10 * HALF // 255, 0, 0]]
    for content in (
        encoded(Image.fromarray(la, "LA"), "PNG"),
        tiff(la, (4, 1), 8, extra=2),
        tiff(premultiplied, (4, 1), 8, extra=1),
    ):
        assert np.abs(decode_rgb(content).astype(int) - grey).max() <= 2


def test_transparent_palettes_and_key_colours():
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    white = [255, 255, 255]
    assert decode_rgb(encoded(palette, "PNG", transparency=bytes([255, 0, 255]))).tolist() == [
        [[10, 20, 30], white, [70, 80, 90]]
    ]
    assert decode_rgb(encoded(palette, "GIF", transparency=2)).tolist() == [[[10, 20, 30], [40, 50, 60], white]]
    key = Image.fromarray(np.array([[(10, 20, 30), (1, 2, 3)]], np.uint8))
    assert decode_rgb(encoded(key, "PNG", transparency=(1, 2, 3))).tolist() == [[[10, 20, 30], white]]
    grey = Image.fromarray(np.array([[7, 9]], np.uint8))
    assert decode_rgb(encoded(grey, "PNG", transparency=7)).tolist() == [[white, [9, 9, 9]]]
    deep = grey_png([0x8000, 0x8001, 0xFFFF], (b"tRNS", b"\x80\x00"))
    assert decode_rgb(deep).tolist() == [[white, [128] * 3, white]]  # 0x8001 has the same grey but isn't transparent
    rgb = bytearray(encoded(Image.new("RGB", (1, 1)), "PNG", transparency=(0, 0, 5)))
    header = b"IHDR" + rgb[16:24] + b"\x10" + rgb[25:29]  # the same in 16 bits
    rgb[12:29], rgb[29:33] = header, struct.pack(">I", zlib.crc32(header))
    with pytest.raises(UnreadableImageError, match="16 bits per channel with a transparent colour"):
        decode_rgb(bytes(rgb))


# Formats


def test_suffixes():
    assert {".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".tif", ".gif", ".bmp"} <= set(PHOTO_SUFFIXES)
    assert all(unreadable_reason(suffix) is None for suffix in PHOTO_SUFFIXES)
    assert all(suffix in PHOTO_SUFFIXES or unreadable_reason(suffix) for suffix in DECODER_OF)
    assert "JPEG 2000 is not supported" in unreadable_reason(".JP2") and "raw" in unreadable_reason(".nef")
    assert unreadable_reason(".txt") is unreadable_reason("") is None


def test_jfif_is_stored_as_jpg(tmp_path):
    draw(0).save(tmp_path / "a.JFIF", "JPEG")
    content = (tmp_path / "a.JFIF").read_bytes()
    assert read_image(tmp_path / "a.JFIF") == (content, "jpg")


@needs_avif
def test_avif_is_read_turned_and_put_on_white(tmp_path):
    pixels = np.asarray(draw(1).resize((88, 72)))
    content = tagged(pixels, "AVIF", 6, quality=100, subsampling="4:4:4")
    assert np.abs(decode_rgb(content).astype(int) - pixels).mean() < 2
    (tmp_path / "a.avif").write_bytes(content)
    assert read_image(tmp_path / "a.avif") == (content, "avif")
    clear = Image.new("RGBA", (16, 16), (200, 0, 0, 0))
    assert decode_rgb(encoded(clear, "AVIF", quality=100)).min() > 250


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)


def test_formats_that_are_not_read_are_named_by_their_content(monkeypatch):
    """The name may be wrong: photos of iPhones in HEIC are often called a.jpg."""
    for content, words in (
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(60), "JPEG 2000 is not supported"),
        (b"8BPS" + bytes(60), "a drawing program's format"),
        (b"", "0 bytes, not an image in one of the formats JPEG"),
        (b"<html>404</html>", "16 bytes, not an image in one of the formats JPEG, PNG, WEBP"),
    ):
        with pytest.raises(UnreadableImageError, match=words):
            decode_rgb(content)
    monkeypatch.setattr("amp.data.images.formats.find_spec", lambda name: None)  # as without pillow-heif
    assert 'pip install "open-clip-amp[heic]"' in unreadable_reason(".heic")
    with pytest.raises(UnreadableImageError, match=r'pip install "open-clip-amp\[heic\]"'):
        decode_rgb(HEIC)


def test_heic_is_read_where_its_package_is_installed():
    """All orientations. libheif already rotates the picture, so it must not be rotated again."""
    pytest.importorskip("pillow_heif")
    assert ".heic" in PHOTO_SUFFIXES
    decode_rgb(encoded(draw(0), "PNG"))  # the first call registers the decoder
    pixels = np.asarray(draw(1).resize((88, 72)))
    for orientation in range(1, 9):
        content = tagged(pixels, "HEIF", orientation, quality=-1)
        assert np.abs(decode_rgb(content).astype(int) - pixels).mean() < 3


def test_the_orientation_of_an_ordinary_jpeg_costs_microseconds():
    from amp.data.images.headers import _jpeg_orientation

    content = encoded(draw(0).resize((500, 375)), "JPEG")
    seconds = min(timeit.repeat(lambda: _jpeg_orientation(content), number=1000, repeat=3)) / 1000
    assert seconds < 1e-4  # 4e-6 on a quiet machine
