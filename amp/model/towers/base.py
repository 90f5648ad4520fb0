"""The interface of a frozen CLIP: the few calls that prompting needs, and the text tower.

The files of this folder are the only ones that touch open_clip's internals (here `token_embedding` and the text tower's
tables) and timm's, so a change upstream is fixed here.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn as nn
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.timm_model import TimmModel
from open_clip.transformer import (
    TextTransformer,
    VisionTransformer,
    text_global_pool,
)
from torch.utils.checkpoint import checkpoint

from amp.errors import AmpError

CHOOSE = "Choose another model, for example ViT-B-16, ViT-B-16-SigLIP or EVA02-B-16"


class Backbone(nn.Module, ABC):
    """A frozen CLIP, always in eval mode: the text tower, and the interface of the image tower; `make_backbone` builds
    the class that fits. The model given is kept, frozen, and its temperature made a vector of one.

    Args:
        clip: A model of `open_clip.create_model` with a native text transformer or a Hugging Face text tower; the three
            widths (vision, text, joint) may all differ.

    Attributes:
        vision_width, vision_heads, num_layers: Channels d_v, attention heads and blocks L of the image tower.
        grid_size, patch_size: Patches down and across an image, and pixels down and across a patch.
        num_patches: M.
        num_prefix: Tokens in front of the patches, F: the class token and registers; none in SigLIP.
        text_width: Channels of the token embedding, d_t.
        embed_dim: Joint width, d.
        context_length: Of the text tower's positions.

    Raises:
        AmpError: The text tower has no token embedding that this project knows.
    """

    clip: CLIP | CustomTextCLIP
    vision_width: int
    vision_heads: int
    num_layers: int
    grid_size: tuple[int, int]
    patch_size: tuple[int, int]
    num_prefix: int
    embed_dim: int

    def __init__(self, clip: CLIP | CustomTextCLIP):
        super().__init__()
        self.clip = clip
        if not isinstance(self._text, CLIP | TextTransformer | HFTextEncoder):
            raise AmpError(
                f"text tower is {type(self._text).__name__}, expected open_clip's native TextTransformer or its "
                "HFTextEncoder, whose token embedding the triplet encoder reads (eq. 4). Choose a model whose text_cfg "
                "has width and layers and no text_arch, or hf_model_name"
            )
        self.text_width: int = self._token_embedding.weight.shape[1]
        self.context_length: int = clip.context_length
        for name in ("logit_scale", "logit_bias"):
            value = getattr(clip, name, None)
            if isinstance(value, nn.Parameter) and value.ndim == 0:
                # DeepSpeed can't send parameters without dimensions; open_clip loads and multiplies either shape.
                setattr(clip, name, nn.Parameter(value.detach().reshape(1)))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in eval mode: CLIP is frozen in both stages (paper, sec. 3.4)."""
        return super().train(False)

    @property
    def visual(self) -> VisionTransformer | TimmModel:
        return self.clip.visual

    @property
    def num_tokens(self) -> int:
        """Tokens of an image without visual prompts, F + M."""
        return self.num_prefix + self.num_patches

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    @property
    def device(self) -> torch.device:
        return self.clip.logit_scale.device

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Type of the vision blocks' weights, in which tokens enter them."""

    @property
    @abstractmethod
    def quick_gelu(self) -> bool:
        """Whether the image tower computes OpenAI's approximation of GELU."""

    @property
    @abstractmethod
    def masks_tokens(self) -> bool:
        """Whether single tokens can be taken out of the image blocks' attention."""

    @property
    @abstractmethod
    def keeps_patches(self) -> bool:
        """Whether `pooled` returns the patches as the last block left them, but for a norm; the readout asks them."""

    @property
    @abstractmethod
    def pooled_width(self) -> int:
        """Channels of what `project` takes."""

    @property
    @abstractmethod
    def _layers(self) -> Sequence[nn.Module]:
        """The image tower's blocks."""

    # -- image tower ------------------------------------------------------------------------------------------------

    @abstractmethod
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) to what enters block 0, class token and the like before the patches, (B, F + M, d_v)."""

    @abstractmethod
    def blocks(self, tokens: torch.Tensor, start: int, stop: int, recompute: bool = False) -> torch.Tensor:
        """Runs blocks `start` to `stop - 1` on tokens (B, T, d_v); `recompute` trades memory for a second forward."""

    @abstractmethod
    def prompted_block(
        self,
        index: int,
        tokens: torch.Tensor,
        recompute: bool = False,
        absent: torch.Tensor | None = None,
        all_tokens: bool = False,
    ) -> torch.Tensor:
        """Runs one block on tokens (B, T, d_v); the last one may return the class token alone, (B, 1, d_v).

        Args:
            index: Of the block.
            tokens: What enters it: the F + M tokens of an image, then any number of prompts.
            recompute: Trades memory for a second forward.
            absent: Which tokens nobody attends to, bool (B, T); needs `masks_tokens`.
            all_tokens: The last block returns them all.
        """

    @staticmethod
    def _run(block, tokens: torch.Tensor, recompute: bool) -> torch.Tensor:
        if recompute and torch.is_grad_enabled():
            return checkpoint(block, tokens, use_reentrant=False)
        return block(tokens)

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens after the last block (B, T, d_v) to features (B, d), not normalised.

        Tokens behind the M patches (visual prompts) are cut off first: average and attention pooling must not see them.
        """
        return self.project(self.pooled(tokens)[0])

    @abstractmethod
    def pooled(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens after the last block (B, T, d_v) to what CLIP projects (B, d_v), and the patches (B, M, d_v)."""

    @abstractmethod
    def project(self, pooled: torch.Tensor) -> torch.Tensor:
        """CLIP's projection into the joint space, (B, d_v) -> (B, d)."""

    # -- text tower -------------------------------------------------------------------------------------------------

    @property
    def _text(self) -> CLIP | TextTransformer | HFTextEncoder:
        return self.clip if isinstance(self.clip, CLIP) else self.clip.text

    @property
    def _token_embedding(self) -> nn.Embedding:
        if isinstance(self._text, HFTextEncoder):
            return self._text.transformer.get_input_embeddings()
        return self._text.token_embedding

    @property
    def causal_text(self) -> bool:
        """Whether a text token sees only those before it, so that padding after the end changes nothing."""
        return getattr(self._text, "attn_mask", None) is not None and getattr(self._text, "cls_emb", None) is None

    def embed_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """Vocabulary embedding of token ids, any shape (...) -> (..., d_t); WordEmb_CLIP of eq. 4."""
        return self._token_embedding(ids)

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (B, context_length) to features (B, d), not normalised, as `clip.encode_text`, at less cost.

        Padding is cut to the longest text of the batch where the tower is causal: no token up to the end-of-text token,
        where the feature is read, ever attends to padding, so the result is exact.
        """
        text = self._text
        if not (isinstance(self.clip, CLIP) and self.causal_text and text.text_pool_type in ("argmax", "eos")):
            return self.clip.encode_text(ids)
        at_end = ids if text.text_pool_type == "argmax" else (ids == text.text_eos_id).int()
        ends = at_end.argmax(dim=-1)
        length = int(ends.max()) + 1 if ids.device.type != "meta" else ids.shape[1]
        ids = ids[:, :length]
        dtype = text.transformer.get_cast_dtype()
        x = text.token_embedding(ids).to(dtype) + text.positional_embedding[:length].to(dtype)
        x = text.transformer(x, attn_mask=text.attn_mask[:length, :length])
        x = text_global_pool(text.ln_final(x), ids, text.text_pool_type, eos_token_id=text.text_eos_id)
        if text.text_projection is None:
            return x
        return text.text_projection(x) if isinstance(text.text_projection, nn.Linear) else x @ text.text_projection

    # -- identity ---------------------------------------------------------------------------------------------------

    def weights_hash(self, tower: str = "both") -> str:
        """`weights_hash` of the CLIP."""
        return weights_hash(self.clip, self.quick_gelu, tower)


def unsupported_tower(seen: str) -> AmpError:
    """The error of an image tower, described by `seen`, that can't be prompted."""
    return AmpError(
        f"image tower is {seen}, expected open_clip's native VisionTransformer, or timm's VisionTransformer or Eva, "
        "pooled and with patches straight from the pixels: prompts are put between the blocks of a plain transformer. "
        f"{CHOOSE}"
    )


def weights_hash(clip: nn.Module, quick_gelu: bool, tower: str = "both") -> str:
    """SHA-256 over names, shapes and bytes of the weights of ``vision``, ``text`` or ``both`` towers of any CLIP.

    The temperature is left out: open_clip stores it as a scalar or as a vector of one.
    """
    digest = hashlib.sha256(f"quick_gelu={quick_gelu}".encode())
    for name, tensor in sorted(clip.state_dict().items()):
        is_vision = name.startswith("visual.")
        if name in ("logit_scale", "logit_bias") or (tower != "both" and is_vision != (tower == "vision")):
            continue
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if tensor.device.type != "meta":
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
