"""Random crops of photos as a model's input, in half of the time of Pillow and torchvision's transform."""

import math
from random import Random

import torch
import torch.nn.functional as F
from torchvision.transforms import Compose, Normalize, RandomResizedCrop, ToTensor

from amp.data.images.decode import decode_rgb
from amp.data.images.headers import jpeg_size

TO_RGB = ("MaybeConvertMode", "_convert_to_rgb")  # open_clip's step, by the names that releases gave it


class RandomCrop:
    """What open_clip's training transform does, from a photo's bytes and with uint8 tensors instead of Pillow's images.

    The resized crop differs from Pillow's by one level of 255 at most, because of rounding. Boxes have the distribution
    of `torchvision.transforms.RandomResizedCrop`, from a generator that takes microseconds to seed.

    Args:
        crop: The random crop.
        normalize: Mean and deviation.
        scaled: Decode a photo at a half, quarter or eighth of its size where its crop is still as large as the model's
            input; the crop is then cut at multiples of 2, 4 or 8 pixels. Other pixels by 2 levels of 255 on average
            (docs/performance.md, "Stream"), a tenth of what the next random crop changes.
    """

    def __init__(self, crop: RandomResizedCrop, normalize: Normalize, scaled: bool):
        self.crop, self.scaled = crop, scaled
        self.mean, self.std = (torch.tensor(x)[:, None, None] for x in (normalize.mean, normalize.std))

    @classmethod
    def of(cls, transform, scaled: bool = False) -> "RandomCrop | None":
        """The same as `transform`, or None where it is anything but a random crop, scaled to mean and deviation."""
        steps = transform.transforms if isinstance(transform, Compose) else []
        if len(steps) != 4:
            return None
        crop, mode, tensor, normalize = steps
        known = (
            isinstance(crop, RandomResizedCrop) and isinstance(tensor, ToTensor) and isinstance(normalize, Normalize)
        )
        if not known or getattr(mode, "__name__", type(mode).__name__) not in TO_RGB:
            return None
        return cls(crop, normalize, scaled)

    def __call__(self, content: bytes, random: Random) -> torch.Tensor:
        """A photo to (3, S, S), still uint8: a quarter of the bytes on their way to the device.

        Raises:
            OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError: see `decode_rgb`.
        """
        crop, shrink = self.crop, 1
        size, pixels = jpeg_size(content) if self.scaled else None, None
        if size is None:
            pixels = decode_rgb(content)
            size = pixels.shape[:2]
        box = random_box(*size, crop.scale, crop.ratio, random)
        if pixels is None:
            most = min(box[2] // crop.size[0], box[3] // crop.size[1])
            shrink = max(n for n in (1, 2, 4, 8) if n <= max(1, most))
            pixels = decode_rgb(content, shrink)
        top, left, height, width = (x // shrink for x in box)
        # Cut out before torch sees it, which takes twice as long for a part of a larger image, and warns of Pillow's
        # arrays, which are read-only.
        part = torch.from_numpy(pixels[top : top + height, left : left + width].copy()).permute(2, 0, 1)
        return F.interpolate(part[None], crop.size, mode=crop.interpolation.value, antialias=True)[0]

    def normalized(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, S, S) on any device to a model's input, float32, as ToTensor and Normalize do it."""
        scale, shift = 1 / (255 * self.std), self.mean / self.std
        scale, shift = (x.to(images.device, non_blocking=True) for x in (scale, shift))
        result = torch.empty(images.shape, device=images.device)
        few = 4 if images.device.type == "cpu" else len(images)  # as many as stay in the processor's cache
        for source, target in zip(images.split(few), result.split(few), strict=True):
            target.copy_(source).mul_(scale).sub_(shift)
        return result


def random_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], random: Random
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop that takes a share of the area from `scale`, of an aspect from `ratio`
    (arXiv 1409.4842, sec. 6).

    Where ten draws don't fit into the photo, the largest crop of its centre that has an allowed ratio.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * random.uniform(*scale)
        aspect = math.exp(random.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - h) // 2, (width - w) // 2, h, w
