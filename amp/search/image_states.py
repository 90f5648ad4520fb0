"""What re-ranking needs of images: computed once per image, and packed to bytes that any database can keep."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from amp.data.images.formats import UnreadableImageError
from amp.errors import AmpError
from amp.model.clip import ActionAwareCLIP

StateType = Literal["fp16", "int8"]
"""How states are packed: with 2 bytes per number, or with 1 byte per number of tokens and 2 bytes per scale."""

_MAGIC = {"fp16": b"amp-f16\n", "int8": b"amp-i08\n"}
HEADER_BYTES = 16  # 8 of `_MAGIC`, 8 of the key


@dataclass(frozen=True)
class ImageStates:
    """States of N images: everything that scoring them under a caption needs.

    Attributes:
        base: The frozen CLIP's features (N, d), not normalized.
        parts: The interaction's encoding of the images, tensors with N rows (`Interaction.encode_images`).
    """

    base: torch.Tensor
    parts: tuple[torch.Tensor, ...]

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index) -> "ImageStates":
        """Selects images by a slice or an int64 or bool tensor."""
        return ImageStates(self.base[index], tuple(part[index] for part in self.parts))

    def to(self, device) -> "ImageStates":
        return ImageStates(self.base.to(device), tuple(part.to(device) for part in self.parts))

    @staticmethod
    def cat(states: Sequence["ImageStates"]) -> "ImageStates":
        """Concatenates the images of several states."""
        if len(states) == 1:
            return states[0]
        parts = zip(*(x.parts for x in states), strict=True)
        return ImageStates(torch.cat([x.base for x in states]), tuple(map(torch.cat, parts)))


class StatePacker:
    """Packs the states of a model's images to rows of bytes, and unpacks them.

    Each row starts with the packed type and a key of the model (adapter, base model and image transform), so a row of
    another model is recognized.

    Args:
        model: Model in eval mode.
        transform: The image transform, as text.

    Attributes:
        key: The model's key, 16 hexadecimal digits.
        image_size: Height and width of a preprocessed image.
        row_bytes: Bytes of one packed image, by type.
    """

    def __init__(self, model: ActionAwareCLIP, transform: str):
        digest = hashlib.sha256(f"{model.backbone.weights_hash()} {transform} {model.config}".encode())
        for name, tensor in sorted(model.adapter_state().items()):
            content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            digest.update(f"{name}{tuple(tensor.shape)}".encode() + content.tobytes())
        self.key = digest.hexdigest()[:16]
        self._key = bytes.fromhex(self.key)
        size = model.backbone.visual.image_size
        self.image_size: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)
        with torch.no_grad():
            seen = model(torch.zeros(1, 3, *self.image_size, device=model.logit_scale.device))
            parts = model(seen.early).images
        self._tensors = [(tuple(x.shape[1:]), x.dtype) for x in (seen.base, *parts)]
        self.row_bytes: dict[StateType, int] = {"fp16": HEADER_BYTES, "int8": HEADER_BYTES}
        for shape, _ in self._tensors:
            count = math.prod(shape)
            self.row_bytes["fp16"] += 2 * count
            self.row_bytes["int8"] += count + 2 * count // shape[-1] if len(shape) > 1 else 2 * count

    def pack(self, states: ImageStates, kind: StateType) -> np.ndarray:
        """Packs N images, uint8 (N, R).

        With `int8`, each token of each head has its own scale; features, which have only one axis, stay in fp16.

        Raises:
            AmpError: `kind` is unknown, or a number is too large for float16.
        """
        if kind not in get_args(StateType):
            raise AmpError(f"state type is {kind!r}, expected one of {', '.join(get_args(StateType))}")
        header = np.frombuffer(_MAGIC[kind] + self._key, dtype=np.uint8)
        columns = [np.tile(header, (len(states), 1))]
        for tensor in (states.base, *states.parts):
            array = tensor.detach().float().cpu().numpy()
            if kind == "int8" and array.ndim > 2:
                scale = (np.abs(array).max(axis=-1, keepdims=True) / 127).astype(np.float16)
                safe = np.where(scale > 0, scale, 1).astype(np.float32)
                columns.append(_bytes(np.clip(np.rint(array / safe), -127, 127).astype(np.int8)))
                array = scale
            with np.errstate(over="ignore"):
                half = array.astype(np.float16)
            if not np.isfinite(half).all():
                raise AmpError(
                    f"an image's state has a number of {np.abs(array).max():g}, expected at most 65504, the largest "
                    "float16; store the states of this model as int8, or not at all"
                )
            columns.append(_bytes(half))
        return np.concatenate(columns, axis=1)

    def unpack(self, rows: Sequence[bytes | np.ndarray]) -> ImageStates:
        """Unpacks N rows, which may be of both types, on the CPU.

        Raises:
            AmpError: A row belongs to another model.
            UnreadableImageError: A row is damaged.
        """
        arrays = [np.frombuffer(row, dtype=np.uint8) for row in rows]
        kinds = [self.check(row) for row in arrays]
        if len(set(kinds)) > 1:
            return ImageStates.cat([self.unpack([row]) for row in arrays])
        packed, kind = np.stack(arrays), kinds[0]
        start, tensors = HEADER_BYTES, []

        def take(shape: tuple[int, ...], dtype) -> torch.Tensor:
            nonlocal start
            stop = start + math.prod(shape) * np.dtype(dtype).itemsize
            part = np.ascontiguousarray(packed[:, start:stop]).view(dtype).reshape(len(packed), *shape)
            start = stop
            return torch.from_numpy(part)

        for shape, dtype in self._tensors:
            if kind == "int8" and len(shape) > 1:
                values = take(shape, np.int8).float()
                values *= take((*shape[:-1], 1), np.float16).float()
            else:
                values = take(shape, np.float16).float()
            tensors.append(values.to(dtype))
        return ImageStates(tensors[0], tuple(tensors[1:]))

    def check(self, row: bytes | np.ndarray) -> StateType:
        """Returns the type of a packed row.

        Raises:
            AmpError, UnreadableImageError: See `unpack`.
        """
        header = bytes(row[:HEADER_BYTES])
        kind = next((kind for kind in get_args(StateType) if header.startswith(_MAGIC[kind])), None)
        if kind is None or len(header) < HEADER_BYTES:
            raise UnreadableImageError("not a packed image state")
        if header[8:] != self._key:
            raise AmpError(
                f"an image state has the key {header[8:].hex()}, expected {self.key}: it was packed with another "
                "adapter, base model or image transform; pack the images again with this model"
            )
        if len(row) != self.row_bytes[kind]:
            raise UnreadableImageError(f"{len(row)} bytes, expected {self.row_bytes[kind]} of a packed image state")
        return kind


def is_packed(image) -> bool:
    """Whether an object is a packed state (and not, for example, the bytes of an image file)."""
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 1:
        image = image[:8].tobytes()
    return isinstance(image, bytes | bytearray | memoryview) and bytes(image[:8]) in _MAGIC.values()


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8)
