"""Random crops of photos as model input, in half the time of the transform by Pillow and torchvision."""

import math
from random import Random

import torch
import torch.nn.functional as F
from torchvision.transforms import Compose, Normalize, RandomResizedCrop, ToTensor

from amp.data.images.decode import decode_rgb
from amp.data.images.headers import jpeg_size

TO_RGB = ("MaybeConvertMode", "_convert_to_rgb")  # names of open_clip's conversion step in different releases


class RandomCrop:
    """open_clip's training transform, computed from a photo's bytes and with uint8 tensors instead of Pillow images.

    The resized crop differs from that of Pillow by at most one of 255 levels (rounding). Boxes have the distribution
    of `torchvision.transforms.RandomResizedCrop`, but come from a generator that can be seeded in microseconds.

    Args:
        crop: The random crop.
        normalize: Mean and standard deviation.
        scaled: Whether to decode a photo at a half, quarter or eighth of its size if its crop is then still as large as
            the model's input. The box of the crop is rounded down to multiples of 2, 4 or 8 pixels. Pixels differ by 2
            of 255 levels on average (docs/performance.md, "Stream"), a tenth of the difference between two random
            crops.
    """

    def __init__(self, crop: RandomResizedCrop, normalize: Normalize, scaled: bool):
        self.crop, self.scaled = crop, scaled
        self.mean, self.std = (torch.tensor(x)[:, None, None] for x in (normalize.mean, normalize.std))

    @classmethod
    def of(cls, transform, scaled: bool = False) -> "RandomCrop | None":
        """The equivalent of `transform`; None unless it is a random crop with normalization, as open_clip makes it."""
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
        """Crops and resizes a photo.

        Returns:
            Pixels uint8 (3, S, S), not normalized: a quarter of the bytes to be copied to the device.

        Raises:
            OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError: See `decode_rgb`.
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
        # Copy the crop in NumPy: torch would take twice as long for a part of a larger image, and it warns about
        # Pillow's read-only arrays.
        part = torch.from_numpy(pixels[top : top + height, left : left + width].copy()).permute(2, 0, 1)
        return F.interpolate(part[None], crop.size, mode=crop.interpolation.value, antialias=True)[0]

    def normalized(self, images: torch.Tensor) -> torch.Tensor:
        """Converts uint8 images (B, 3, S, S) on any device to float32 model input, like ToTensor and Normalize."""
        scale, shift = 1 / (255 * self.std), self.mean / self.std
        scale, shift = (x.to(images.device, non_blocking=True) for x in (scale, shift))
        result = torch.empty(images.shape, device=images.device)
        few = 4 if images.device.type == "cpu" else len(images)  # as many images as fit into the CPU's cache
        for source, target in zip(images.split(few), result.split(few), strict=True):
            target.copy_(source).mul_(scale).sub_(shift)
        return result


def random_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], random: Random
) -> tuple[int, int, int, int]:
    """A random crop box as in arXiv 1409.4842, sec. 6.

    If ten draws don't fit into the photo, the box is the largest centre crop with an allowed aspect ratio.

    Args:
        height, width: Size of the photo.
        scale: Range of the crop's fraction of the area.
        ratio: Range of the crop's aspect ratio, width / height.
        random: Random generator.

    Returns:
        Top, left, height and width.
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
