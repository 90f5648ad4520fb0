"""The interface of a frozen CLIP: the calls that prompting needs, and the text tower.

Only the files in this folder use internals of open_clip (here `token_embedding` and the attributes of the text tower)
and of timm, so changes upstream are handled here.
"""

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn as nn
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, VisionTransformer
from torch.utils.checkpoint import checkpoint

from amp.errors import AmpError
from amp.model.towers.residual_block import KeysValues, keys_values, residual_block
from amp.model.towers.text_tree import TextTree, split_texts

TREE_NODES = 256  # measured: smaller trees share less, the attention of larger ones costs more
CHOOSE = "Choose another model, for example ViT-B-16, ViT-B-16-SigLIP or EVA02-B-16"


class Backbone(nn.Module, ABC):
    """A frozen CLIP, always in eval mode: the text tower and the interface of the image tower.

    `make_backbone` builds the class that fits a model. The given model is kept and frozen, and its temperature is
    reshaped to a vector of one element.

    Args:
        clip: A model from `open_clip.create_model` with a native text transformer or a Hugging Face text tower. The
            three widths (vision, text, joint) may all differ.

    Attributes:
        vision_width, vision_heads, num_layers: Channels d_v, attention heads and blocks L of the image tower.
        grid_size, patch_size: Rows and columns of patches in an image; height and width of a patch in pixels.
        num_patches: Number of patches, M.
        num_prefix: Number of tokens before the patches, F: the class token and registers; 0 in SigLIP.
        text_width: Channels of the token embedding, d_t.
        embed_dim: Width of the joint embedding, d.
        context_length: Number of positions of the text tower.

    Raises:
        AmpError: The text tower is of an unknown class, whose token embedding can't be read.
    """

    clip: CLIP | CustomTextCLIP
    vision_width: int
    vision_heads: int
    num_layers: int
    grid_size: tuple[int, int]
    patch_size: tuple[int, int]
    num_prefix: int
    embed_dim: int
    _known_hash: str | None = None  # see `remember_hash`
    _beginning: tuple[torch.Tensor, list[KeysValues]] | None = None  # see `_known_tokens`

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
                # DeepSpeed can't send scalar parameters; open_clip loads and multiplies either shape.
                setattr(clip, name, nn.Parameter(value.detach().reshape(1)))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Backbone":
        """Does nothing: CLIP stays frozen, in eval mode, in both stages (paper, sec. 3.4)."""
        return super().train(False)

    @property
    def visual(self) -> VisionTransformer | TimmModel:
        return self.clip.visual

    @property
    def num_tokens(self) -> int:
        """Number of tokens per image without visual prompts, F + M."""
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
        """Type of the vision blocks' weights and of their input."""

    @property
    @abstractmethod
    def quick_gelu(self) -> bool:
        """Whether the image tower computes OpenAI's approximation of GELU."""

    @property
    @abstractmethod
    def masks_tokens(self) -> bool:
        """Whether single tokens can be masked out of the attention of the image blocks."""

    @property
    @abstractmethod
    def keeps_patches(self) -> bool:
        """Whether `pooled` returns the patches of the last block, changed only by a norm, as the readout needs."""

    @property
    @abstractmethod
    def pooled_width(self) -> int:
        """Channels of the input of `project`."""

    @property
    @abstractmethod
    def _layers(self) -> Sequence[nn.Module]:
        """The image tower's blocks."""

    # -- image tower ------------------------------------------------------------------------------------------------

    @abstractmethod
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) to the input of block 0, prefix tokens first and then patches, (B, F + M, d_v)."""

    @abstractmethod
    def blocks(self, tokens: torch.Tensor, start: int, stop: int, recompute: bool = False) -> torch.Tensor:
        """Runs blocks `start` to `stop - 1` on tokens (B, T, d_v). `recompute` saves memory by a second forward
        pass."""

    @abstractmethod
    def prompted_block(
        self,
        index: int,
        tokens: torch.Tensor,
        recompute: bool = False,
        absent: torch.Tensor | None = None,
        all_tokens: bool = False,
    ) -> torch.Tensor:
        """Runs one block on tokens (B, T, d_v). The last one may return only the class token, (B, 1, d_v).

        Args:
            index: Index of the block.
            tokens: Input of the block: the F + M tokens of an image, then any number of prompts.
            recompute: Save memory by a second forward pass.
            absent: Tokens that are masked out of the attention, bool (B, T). Needs `masks_tokens`.
            all_tokens: Make the last block return all tokens.
        """

    @staticmethod
    def _run(block, tokens: torch.Tensor, recompute: bool) -> torch.Tensor:
        if recompute and torch.is_grad_enabled():
            return checkpoint(block, tokens, use_reentrant=False)
        return block(tokens)

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens after the last block (B, T, d_v) to features (B, d), not normalised.

        Tokens after the M patches (visual prompts) are removed first, because average and attention pooling must not
        see them.
        """
        return self.project(self.pooled(tokens)[0])

    @abstractmethod
    def pooled(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens after the last block (B, T, d_v) to the input of `project` (B, d_v), and the patches (B, M, d_v)."""

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
        """Whether a text token attends only to earlier ones, so that padding after the end changes nothing."""
        return getattr(self._text, "attn_mask", None) is not None and getattr(self._text, "cls_emb", None) is None

    def embed_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """Vocabulary embedding of token ids, any shape (...) -> (..., d_t); WordEmb_CLIP of eq. 4."""
        return self._token_embedding(ids)

    def encode_text(self, ids: torch.Tensor, beginning: torch.Tensor | None = None) -> torch.Tensor:
        """Token ids (B, context_length) to features (B, d), not normalised. Like `clip.encode_text`, at lower cost.

        If the tower is causal, no token up to the end-of-text token, where the feature is read, attends to padding or
        depends on later tokens. So on the CPU, only distinct prefixes are computed; on a GPU, which computes one large
        batch faster than several small ones, padding is cut to the longest text. Both are exact.

        Args:
            ids: Token ids.
            beginning: Token ids (context_length,) of a text with which texts of many calls start. On the CPU, its
                tokens before the end-of-text token are computed only once.
        """
        if not self.cuts_padding:
            return self.clip.encode_text(ids)
        if ids.device.type == "meta":
            return self.encode_cut_text(ids)
        ends = self._text_ends(ids)
        ids = ids[:, : int(ends.max()) + 1]
        if ids.device.type != "cpu":
            return self.encode_cut_text(ids)
        parts, features = list(split_texts(ids, ends, TREE_NODES)), []
        for part in parts:
            known, past = self._known_tokens(ids[part], ends[part], beginning)
            tree = TextTree.of(ids[part], ends[part], known)
            mask = torch.zeros(tree.attends.shape).masked_fill(~tree.attends, -torch.inf)
            tokens = self._text_tokens(tree.ids[None], tree.positions, mask, tree.ends, past)
            features.append(self._project_text(tokens[0]))
        return torch.cat(features)[torch.cat(parts).argsort()]

    def _known_tokens(
        self, ids: torch.Tensor, ends: torch.Tensor, beginning: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[KeysValues]]:
        """The tokens of `beginning` (P,) and each text block's keys and values of them, if some text starts with them;
        otherwise none."""
        blocks = self._text.transformer.resblocks
        none: tuple[torch.Tensor, list[KeysValues]] = ids[0, :0], []
        if beginning is None or any(type(block) is not ResidualAttentionBlock for block in blocks):
            return none
        length = int(self._text_ends(beginning[None]))
        known = beginning[:length]
        starts = (ids[:, :length] == known).all(dim=1) if length <= ids.shape[1] else ids.new_zeros(0)
        if not starts.any() or torch.isin(ids[torch.arange(len(ids)), ends], known).any():  # a text may have no end
            return none
        if self._beginning is None or not torch.equal(self._beginning[0], known):
            inputs: list[torch.Tensor] = []
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                self._text_tokens(known[None], slice(length), self._text.attn_mask[:length, :length], into=inputs)
                self._beginning = known, [keys_values(*pair) for pair in zip(blocks, inputs, strict=True)]
        return self._beginning

    @property
    def cuts_padding(self) -> bool:
        """Whether texts can be encoded without the padding after their end."""
        return isinstance(self.clip, CLIP) and self.causal_text and self._text.text_pool_type in ("argmax", "eos")

    def encode_cut_text(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T) to features (B, d), with T at most the context length; needs `cuts_padding`."""
        length = ids.shape[1]
        tokens = self._text_tokens(ids, slice(length), self._text.attn_mask[:length, :length])
        return self._project_text(tokens[torch.arange(ids.shape[0], device=ids.device), self._text_ends(ids)])

    def _text_ends(self, ids: torch.Tensor) -> torch.Tensor:
        """Position of each text's end-of-text token (B,); 0 if there is none, as in open_clip."""
        is_eos = self._text.text_pool_type == "eos"
        return ((ids == self._text.text_eos_id).int() if is_eos else ids).argmax(dim=-1)

    def _text_tokens(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor | slice,
        mask: torch.Tensor,
        read: torch.Tensor | None = None,
        past: Sequence[KeysValues] = (),
        into: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Runs the text blocks, (B, T) -> (B, T, width), or (B, N, width) if only the tokens `read` (N,) are needed.

        Args:
            ids: Token ids.
            positions: Their positions (T,).
            mask: Added to the logits, (T, P + T).
            read: Indices of tokens; None returns all.
            past: Each block's keys and values of P tokens before these; empty for P = 0.
            into: Receives each block's input.
        """
        text = self._text
        dtype = text.transformer.get_cast_dtype()
        x = text.token_embedding(ids).to(dtype) + text.positional_embedding[positions].to(dtype)
        for index, block in enumerate(blocks := text.transformer.resblocks):
            if into is not None:
                into.append(x)
            wanted = read if index == len(blocks) - 1 else None
            if type(block) is ResidualAttentionBlock:
                rows = (mask if wanted is None else mask[wanted]).to(x.dtype)
                x = residual_block(block, x, rows, wanted, past[index] if past else None)
            else:
                x = block(x, attn_mask=mask)
                x = x if wanted is None else x[:, wanted]
        return text.ln_final(x)

    def _project_text(self, pooled: torch.Tensor) -> torch.Tensor:
        projection = self._text.text_projection
        if projection is None:
            return pooled
        return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection

    # -- identity ---------------------------------------------------------------------------------------------------

    def weights_hash(self, tower: str = "both") -> str:
        """The function `weights_hash`, for this CLIP."""
        if tower == "both" and self._known_hash is not None:
            return self._known_hash
        return weights_hash(self.clip, self.quick_gelu, tower)

    def remember_hash(self, known: str) -> None:
        """Makes `weights_hash` return a known hash of both towers until weights are loaded, cast or moved.

        Hashing takes a second per 500 MB, and a search needs the hash three times.
        """
        self._known_hash = known

    def _apply(self, *arguments, **options):
        self._known_hash = self._beginning = None
        return super()._apply(*arguments, **options)

    def _load_from_state_dict(self, *arguments, **options):
        self._known_hash = self._beginning = None
        return super()._load_from_state_dict(*arguments, **options)


def text_tower_of(backbone: Backbone) -> Backbone:
    """A copy of a backbone's text tower, which encodes texts even if ZeRO-3 partitions the model's own weights."""
    visual, backbone.clip.visual = backbone.clip.visual, nn.Identity()
    try:
        return copy.deepcopy(backbone)
    finally:
        backbone.clip.visual = visual


def unsupported_tower(seen: str) -> AmpError:
    """The error for an image tower, described by `seen`, that can't be prompted."""
    return AmpError(
        f"image tower is {seen}, expected open_clip's native VisionTransformer, or timm's VisionTransformer or Eva, "
        "with pooling and a plain patch embedding: prompts are inserted between the blocks of a plain transformer. "
        f"{CHOOSE}"
    )


def weights_hash(clip: nn.Module, quick_gelu: bool, tower: str = "both") -> str:
    """SHA-256 over names, shapes and bytes of the weights of `vision`, `text` or `both` towers of any CLIP.

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
