"""The frozen open_clip model behind the few calls that prompting needs.

This is the only file that touches open_clip's internals (`visual._embeds`, `visual.transformer.resblocks`,
`visual._pool`, `visual.proj`, `token_embedding`, and the text tower's tables): a change upstream is mended here.
"""

import hashlib
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import (
    QuickGELU,
    ResidualAttentionBlock,
    TextTransformer,
    VisionTransformer,
    text_global_pool,
)
from torch.utils.checkpoint import checkpoint

from amp.errors import AmpError


class Backbone(nn.Module):
    """A frozen CLIP, always in eval mode. The model given is kept, frozen, and its temperature made a vector of one.

    Args:
        clip: A model of `open_clip.create_model` with a native `VisionTransformer` and a native text transformer;
            the three widths (vision, text, joint) may all differ.

    Raises:
        AmpError: The image tower is not open_clip's own VisionTransformer (timm, ResNet), or the text tower has no
            token embedding of its own (Hugging Face towers).
    """

    clip: CLIP | CustomTextCLIP

    def __init__(self, clip: CLIP | CustomTextCLIP):
        super().__init__()
        visual = getattr(clip, "visual", None)
        if not isinstance(visual, VisionTransformer):
            inner = type(getattr(visual, "trunk", visual)).__name__
            raise AmpError(
                f"image tower is {type(visual).__name__} ({inner}), expected open_clip's native "
                "VisionTransformer: prompts are put between its blocks. Choose a model whose config has no "
                "'timm_model_name', such as ViT-B-16"
            )
        if not visual.transformer.batch_first:
            raise AmpError("image tower has batch_first=False, expected True, the default of open_clip")
        self.clip = clip
        if not hasattr(self._text, "token_embedding"):
            raise AmpError(
                f"text tower is {type(self._text).__name__}, expected open_clip's native TextTransformer, whose token "
                "embedding the triplet encoder reads (eq. 4). Choose a model without 'hf_model_name' in its config"
            )
        self.vision_width: int = visual.conv1.out_channels
        self.vision_heads: int = visual.transformer.resblocks[0].attn.num_heads
        self.num_layers: int = len(visual.transformer.resblocks)
        self.num_patches: int = visual.grid_size[0] * visual.grid_size[1]
        self.patch_size: tuple[int, int] = tuple(visual.patch_size)
        self.text_width: int = self._text.token_embedding.weight.shape[1]
        self.embed_dim: int = visual.output_dim
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
    def visual(self) -> VisionTransformer:
        return self.clip.visual

    @property
    def _text(self) -> CLIP | TextTransformer:
        return self.clip if isinstance(self.clip, CLIP) else self.clip.text

    @property
    def dtype(self) -> torch.dtype:
        """Type of the vision blocks' weights, in which tokens enter them."""
        return self.visual.conv1.weight.dtype

    @property
    def quick_gelu(self) -> bool:
        """Whether the image tower computes OpenAI's approximation of GELU."""
        return isinstance(self.visual.transformer.resblocks[0].mlp.gelu, QuickGELU)

    @property
    def causal_text(self) -> bool:
        """Whether a text token sees only those before it, so that padding after the end changes nothing."""
        return getattr(self._text, "attn_mask", None) is not None and getattr(self._text, "cls_emb", None) is None

    def compile_blocks(self) -> None:
        """Compiles each image block in place with `torch.compile`; names, weights and checkpoints stay as they are."""
        for block in self.visual.transformer.resblocks:
            block.compile()

    # -- image tower ------------------------------------------------------------------------------------------------

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) to what enters block 0: class token and patches after ln_pre, (B, 1 + M, d_v)."""
        return self.visual._embeds(images.to(self.dtype))

    def blocks(self, tokens: torch.Tensor, start: int, stop: int, recompute: bool = False) -> torch.Tensor:
        """Runs blocks `start` to `stop - 1` on tokens (B, T, d_v); `recompute` trades memory for a second forward."""
        for block in self.visual.transformer.resblocks[start:stop]:
            tokens = self._run(block, tokens, recompute)
        return tokens

    def prompted_block(self, index: int, tokens: torch.Tensor, recompute: bool = False,
                       absent: torch.Tensor | None = None, all_tokens: bool = False) -> torch.Tensor:  # fmt: skip
        """Runs one block on tokens (B, T, d_v); the last one may return the class token alone, (B, 1, d_v).

        Args:
            index: Of the block.
            tokens: What enters it.
            recompute: Trades memory for a second forward.
            absent: Which tokens nobody attends to, bool (B, T); needs `masks_tokens`.
            all_tokens: The last block returns them all.
        """
        block = self.visual.transformer.resblocks[index]
        if index == self.num_layers - 1 and self._reads_only_class_token and not all_tokens:
            block = partial(self._last_block, absent=absent)
        elif absent is not None:
            block = partial(self._plain_block, block, absent=absent)
        return self._run(block, tokens, recompute)

    @staticmethod
    def _run(block, tokens: torch.Tensor, recompute: bool) -> torch.Tensor:
        if recompute and torch.is_grad_enabled():
            return checkpoint(block, tokens, use_reentrant=False)
        return block(tokens)

    @property
    def _reads_only_class_token(self) -> bool:
        """Whether features come from the class token of the last block and from nothing else."""
        return type(self.visual.transformer.resblocks[-1]) is ResidualAttentionBlock and self.reads_class_token

    @property
    def reads_class_token(self) -> bool:
        """Whether CLIP pools the class token."""
        return self.visual.attn_pool is None and self.visual.pool_type == "tok"

    @property
    def masks_tokens(self) -> bool:
        """Whether single tokens can be taken out of the image blocks' attention."""
        return all(type(block) is ResidualAttentionBlock for block in self.visual.transformer.resblocks)

    def _last_block(self, tokens: torch.Tensor, absent: torch.Tensor | None = None) -> torch.Tensor:
        """The last block for the class token alone, (B, T, d_v) -> (B, 1, d_v).

        Every token is a key and a value, only the class token asks and passes through the MLP: about a fifth of a
        block's work, which counts where few blocks run a pair. Equal to the whole block but for rounding.
        """
        return self._plain_block(self.visual.transformer.resblocks[-1], tokens, 1, absent)

    @staticmethod
    def _plain_block(block: ResidualAttentionBlock, tokens: torch.Tensor, queries: int | None = None,
                     absent: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
        """A block for the first `queries` tokens or all, (B, T, d_v) -> (B, queries, d_v); nobody attends to `absent`
        ones, bool (B, T)."""
        attention = block.attn
        normed = block.ln_1(tokens)
        # nn.MultiheadAttention with fewer queries than keys copies its weights once a token on the CPU (a third of the
        # time of a pair), so its projections are applied here.
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        width, heads = normed.shape[-1], attention.num_heads
        query = F.linear(normed[:, :queries], weight[:width], bias[:width])
        key, value = F.linear(normed, weight[width:], bias[width:]).chunk(2, dim=-1)
        query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
        present = None if absent is None else ~absent[:, None, None, :]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=present)
        x = tokens[:, :queries] + block.ls_1(attention.out_proj(attended.transpose(1, 2).flatten(2)))
        return x + block.ls_2(block.mlp(block.ln_2(x)))

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens after the last block (B, T, d_v) to features (B, d), not normalised.

        Tokens behind the M patches (visual prompts) are cut off first: average and attention pooling must not see them.
        """
        return self.project(self.pooled(tokens)[0])

    def pooled(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens after the last block (B, T, d_v) to what CLIP projects (B, d_v), and the patches (B, M, d_v)."""
        return self.visual._pool(tokens[:, : 1 + self.num_patches])

    def project(self, pooled: torch.Tensor) -> torch.Tensor:
        """CLIP's projection into the joint space, (B, d_v) -> (B, d)."""
        return pooled if self.visual.proj is None else pooled @ self.visual.proj

    @property
    def pooled_width(self) -> int:
        """Channels of what `project` takes."""
        return self.embed_dim if self.visual.proj is None else self.visual.proj.shape[0]

    # -- text tower -------------------------------------------------------------------------------------------------

    def embed_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """Vocabulary embedding of token ids, any shape (...) -> (..., d_t); WordEmb_CLIP of eq. 4."""
        return self._text.token_embedding(ids)

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
