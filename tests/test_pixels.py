"""Training pixels: the decoder compared with Pillow for all kinds of JPEG, the random crop with open_clip's."""

import io
from random import Random

import numpy as np
import pytest
import simplejpeg
import torch
from open_clip.transform import image_transform
from PIL import Image, ImageFilter
from support.photos import encoded
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

from amp.data.images.decode import decode_rgb
from amp.data.images.file import is_whole
from amp.data.images.headers import jpeg_size
from amp.data.pixels import RandomCrop, random_box


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth noise, because neighbouring pixels of photos are similar."""
    noise = np.random.default_rng(seed).integers(0, 255, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def by_pillow(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


@pytest.mark.parametrize(
    ("mode", "size", "options"),
    [
        ("RGB", (1, 1), {"quality": 90}),
        ("RGB", (64, 48), {"quality": 90}),
        ("RGB", (15, 17), {"quality": 30, "subsampling": "4:2:0"}),
        ("RGB", (131, 77), {"subsampling": "4:2:2"}),
        ("RGB", (15, 17), {"subsampling": "4:4:4"}),
        ("RGB", (131, 77), {"progressive": True}),
        ("RGB", (131, 77), {"quality": 75, "optimize": True, "restart_marker_blocks": 2}),
        ("L", (15, 17), {"quality": 90}),
        ("L", (131, 77), {"progressive": True}),
    ],
)
def test_jpeg_pixels_are_pillows_bit_for_bit(mode, size, options):
    content = encoded(picture(*size, mode), **options)
    assert jpeg_size(content) == (size[1], size[0])
    assert np.array_equal(decode_rgb(content), np.asarray(by_pillow(content)))


@pytest.mark.parametrize(
    ("format", "mode"),
    [("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P"), ("GIF", "P"), ("WEBP", "RGB"), ("BMP", "RGB"), ("TIFF", "RGB")],
)
def test_everything_else_is_left_to_pillow(format, mode):
    content = encoded(picture(40, 30, mode), format)
    assert jpeg_size(content) is None
    assert np.array_equal(decode_rgb(content), np.asarray(by_pillow(content)))


def test_a_damaged_jpeg_is_an_image_where_pillow_makes_one_of_it():
    content, mended = encoded(picture(64, 48)), 0
    for place in range(len(content) - 300, len(content) - 2):
        flipped = content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]
        try:
            simplejpeg.decode_jpeg(flipped)
        except ValueError:
            mended += 1
            assert np.array_equal(decode_rgb(flipped), np.asarray(by_pillow(flipped)))
            assert np.array_equal(decode_rgb(flipped, 2), np.asarray(by_pillow(flipped).reduce(2)))
    assert mended > 0
    for shrink in (1, 2):
        with pytest.raises(OSError, match="truncated"):
            decode_rgb(content[: len(content) // 2], shrink)


def test_bombs_are_pillows_to_refuse(monkeypatch):
    content = encoded(picture(64, 48))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 // 2 - 1)
    with pytest.raises(Image.DecompressionBombError):
        decode_rgb(content)


def test_shrinking_is_an_average_of_the_pixels():
    content = encoded(picture(128, 96).filter(ImageFilter.GaussianBlur(3)), quality=95, subsampling="4:4:4")
    whole = torch.from_numpy(decode_rgb(content)).permute(2, 0, 1)[None].float()
    for shrink in (2, 4, 8):
        small = torch.from_numpy(decode_rgb(content, shrink)).permute(2, 0, 1)[None].float()
        assert small.shape[2:] == (96 // shrink, 128 // shrink)
        assert (small - torch.nn.functional.avg_pool2d(whole, shrink)).abs().mean() < 1.0


def test_what_is_whole():
    jpeg, png = encoded(picture(64, 48)), encoded(picture(64, 48), "PNG")
    assert is_whole(jpeg) and is_whole(png) and is_whole(jpeg + b"\0" * 100)
    thumbnail = encoded(picture(16, 12))
    assert is_whole(encoded(picture(64, 48), exif=b"Exif\0\0" + thumbnail))
    for content in (
        jpeg[:-2],
        jpeg[:200],
        b"",
        b"\xff\xd8",
        png[:-4],
        png[:40] + b"x" + png[41:],
        b"GIF89a",
        encoded(picture(64, 48), exif=b"Exif\0\0" + thumbnail)[:-100],
    ):
        try:
            assert not is_whole(content)
        except (OSError, SyntaxError):
            assert content.startswith(b"\x89PNG")  # Pillow reports the error


def test_normalized_by_hand():
    transform = RandomCrop.of(image_transform(8, is_train=True, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0)))
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(7, 3, 2, 2)
    expected = torch.tensor([-1.0, (0.2 - 0.25) / 0.25, 1.0]).view(1, 3, 1, 1).expand(7, 3, 2, 2)
    torch.testing.assert_close(transform.normalized(images), expected)


def test_a_random_crop_is_pillows_crop_of_the_same_box():
    reference = image_transform(24, is_train=True)
    transform, content = RandomCrop.of(reference), encoded(picture(90, 70))
    for seed in range(10):
        top, left, height, width = random_box(70, 90, (0.9, 1.0), (3 / 4, 4 / 3), Random(seed))
        box = (left, top, left + width, top + height)
        expected = by_pillow(content).crop(box).resize((24, 24), Image.Resampling.BICUBIC)
        difference = transform(content, Random(seed)).int() - TF.pil_to_tensor(expected).int()
        assert difference.abs().max() <= 1


@pytest.mark.parametrize(("width", "height"), [(90, 70), (300, 40)])
def test_random_boxes_have_torchvisions_distribution(width, height):
    """Means over 4,000 draws. A photo of 300 x 40 has no box of an allowed ratio at this scale and gets the centre."""
    scale, ratio = (0.5, 1.0), (3 / 4, 4 / 3)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(4000)]).float()
    ours = torch.tensor([random_box(height, width, scale, ratio, Random(n)) for n in range(4000)]).float()
    assert (ours[:, 0] >= 0).all() and (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] >= 0).all() and (ours[:, 1] + ours[:, 3] <= width).all()
    torch.testing.assert_close(ours.mean(dim=0), theirs.mean(dim=0), rtol=0.03, atol=0.5)
    torch.testing.assert_close(ours.std(dim=0), theirs.std(dim=0), rtol=0.08, atol=0.3)


def test_a_scaled_crop_shows_the_same_place():
    """It uses the same box as the exact crop, and is closer to it than a crop two pixels away."""
    reference, content = (
        image_transform(24, is_train=True),
        encoded(picture(25, 20).resize((200, 160), Image.Resampling.BICUBIC)),
    )
    exact, scaled = (RandomCrop.of(reference, scaled) for scaled in (False, True))
    for seed in range(10):
        image = exact(content, Random(seed)).float()
        error = (scaled(content, Random(seed)).float() - image).abs().mean()
        top, left, height, width = random_box(160, 200, (0.9, 1.0), (3 / 4, 4 / 3), Random(seed))
        box = (left + 8, top + 8, left + width + 8, top + height + 8)
        moved = TF.pil_to_tensor(by_pillow(content).crop(box).resize((24, 24), Image.Resampling.BICUBIC)).float()
        assert 0 < error < 0.5 * (moved - image).abs().mean()


def test_small_photos_are_not_shrunk():
    reference, content = image_transform(24, is_train=True), encoded(picture(47, 47))
    exact, scaled = (RandomCrop.of(reference, scaled) for scaled in (False, True))
    assert torch.equal(exact(content, Random(3)), scaled(content, Random(3)))


def test_other_transforms_are_left_alone():
    """Without a random crop Pillow decodes the photo, as in evaluation and for stored features."""
    jitter = {"color_jitter": (0.1,) * 4, "color_jitter_prob": 0.5}
    assert RandomCrop.of(image_transform(24, is_train=True, aug_cfg=jitter)) is None
    for mode in ("shortest", "squash", "longest"):
        assert RandomCrop.of(image_transform(24, is_train=False, resize_mode=mode)) is None
    assert RandomCrop.of(lambda image: image) is None
