"""ActionAwareCLIP: a frozen CLIP whose image encoder is prompted with the action knowledge of a caption."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from amp.errors import AmpError
from amp.knowledge.schema import Knowledge
from amp.knowledge.tensors import Captions, KnowledgeBatch, TripletTokenizer
from amp.knowledge.text import STATE_BEGINNING, tower_texts
from amp.model.config import PromptConfig
from amp.model.interactions import make_interaction
from amp.model.interactions.base import Prompts
from amp.model.layers.text_enrichment import TextEnrichment
from amp.model.layers.triplet_encoder import TripletEncoder
from amp.model.layers.visual_prompts import VisualPrompts
from amp.model.prompted_tower import PromptedTower
from amp.model.towers import make_backbone

TRIPLET_LAYERS, TRIPLET_HEADS = 2, 8  # of the triplet encoder (our choice)
Images = torch.Tensor | tuple[torch.Tensor, ...]


class EncodedCaptions(NamedTuple):
    """The model's encoding of C captions, computed once per caption.

    Attributes:
        prompts: Prompts of the interaction.
        text: Features that images are scored against (C, d), enriched if the model has `enrich`; None without text.
    """

    prompts: Prompts
    text: torch.Tensor | None


class Features(NamedTuple):
    """Outputs of one forward pass; None for those that were not requested.

    Attributes:
        early: Tokens before the first prompted block (B, F + M, d_v).
        base: The frozen CLIP's image features (B, d).
        images: The interaction's encoding of B images.
        captions: The model's encoding of C captions.
        conditioned: Action-aware image features of P pairs (P, d), or of all pairs (B, C, d).
        plain: Image features without knowledge (B', d).
        logit_scale: Temperature 1 / tau, fp32 (1,).
    """

    early: torch.Tensor | None = None
    base: torch.Tensor | None = None
    images: tuple[torch.Tensor, ...] | None = None
    captions: EncodedCaptions | None = None
    conditioned: torch.Tensor | None = None
    plain: torch.Tensor | None = None
    logit_scale: torch.Tensor | None = None


class ActionAwareCLIP(nn.Module):
    """A frozen CLIP with LLM-enhanced action-aware prompt tuning (arXiv 2506.23502, sec. 3.3).

    Without knowledge it equals its base CLIP: `encode_image(images)` and `encode_text(text)` are bit-identical.

    Args:
        clip: A model from `open_clip.create_model` that `make_backbone` supports.
        config: Settings of the prompts.
        tokenizer: The base model's tokenizer; only needed if knowledge is given as text.

    Attributes:
        interaction: Combines images with knowledge.
        tower: The prompted image tower.

    Raises:
        AmpError: The image tower has no plain transformer blocks, or lacks what the interaction needs.
    """

    # Set by `amp.create_model_and_transforms`: the identity of the base model, stored in adapter files.
    base_name: str
    base_pretrained: str | None
    base_hash: str

    def __init__(self, clip: nn.Module, config: PromptConfig | None = None, tokenizer=None):
        super().__init__()
        self.config = config = config or PromptConfig()
        self.backbone = backbone = make_backbone(clip)
        self.tokenizer = tokenizer
        d_t, d = backbone.text_width, backbone.embed_dim
        first = config.first_block(backbone.num_layers)
        self.visual_prompts = VisualPrompts(
            backbone.num_layers - first, config.num_prompts, backbone.vision_width, backbone.patch_size
        )
        self.interaction = make_interaction(config, backbone)
        # Only the modules that a variant uses are built: distributed engines fail on unused parameters.
        self.triplet_encoder = self.text_enrichment = self.image_projection = None
        if config.reads_triplets and (self.interaction.reads_triplets or config.enrich):
            self.triplet_encoder = TripletEncoder(d_t, TRIPLET_LAYERS, math.gcd(d_t, TRIPLET_HEADS))
        if config.enrich:
            self.text_enrichment = TextEnrichment(d, config.reads_states, d_t if config.reads_triplets else None)
            self.image_projection = nn.Linear(backbone.pooled_width, d, bias=False)
            nn.init.zeros_(self.image_projection.weight)
        # A vector of one element, because DeepSpeed can't partition scalars.
        self.logit_scale = nn.Parameter(backbone.clip.logit_scale.detach().clone().float().reshape(1))
        self.tower = PromptedTower(backbone, self.visual_prompts, first, self.image_projection)

    # -- interface of open_clip -------------------------------------------------------------------------------------

    def encode_image(
        self,
        images: torch.Tensor,
        knowledge: KnowledgeBatch | Sequence[Knowledge] | None = None,
        normalize: bool = False,
        text: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Image features (B, d): the base CLIP's, or action-aware ones with the `knowledge` of one caption per image.

        Args:
            images: Preprocessed images (B, 3, H, W).
            knowledge: Knowledge of B captions; None for the base CLIP's features.
            normalize: Scale features to unit length.
            text: Features of the captions, `encode_text(tokens)` (B, d), which `readout` also reads.
        """
        if knowledge is None:
            return self.backbone.clip.encode_image(images.to(self.backbone.dtype), normalize=normalize)
        knowledge = self._prepared(knowledge, len(images), "images")
        features = self(images, Captions(knowledge, text)).conditioned
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(
        self,
        text: torch.Tensor,
        normalize: bool = False,
        knowledge: KnowledgeBatch | Sequence[Knowledge] | None = None,
    ) -> torch.Tensor:
        """Text features (B, d): the base CLIP's, or with `knowledge` those that action-aware images are scored against.

        The two differ only in models with `enrich`.
        """
        if knowledge is None:
            return self.backbone.clip.encode_text(text, normalize=normalize)
        knowledge = self._prepared(knowledge, len(text), "texts")
        features = self(None, Captions(knowledge, self.backbone.clip.encode_text(text))).captions.text
        return F.normalize(features, dim=-1) if normalize else features

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, d) of images (B, 3, H, W) without knowledge, with visual prompts."""
        return self.interaction.image_features(self.tower, self.tower.early(images))

    def prepare_knowledge(self, knowledge: Sequence[Knowledge]) -> KnowledgeBatch:
        """Converts knowledge of C captions to tensors on the model's device.

        The text tower encodes the texts that the model reads (states or template sentences).
        """
        return self.prepare_captions([], knowledge).knowledge

    @torch.no_grad()
    def prepare_captions(self, texts: Sequence[str], knowledge: Sequence[Knowledge]) -> Captions:
        """Converts C captions and their knowledge to tensors on the model's device, in one pass of the text tower."""
        if self.tokenizer is None:
            raise AmpError("this model was built without a tokenizer; pass tokenizer=amp.get_tokenizer(model_name)")
        for item in knowledge:
            if not isinstance(item, Knowledge):
                raise AmpError(f"knowledge holds {item!r}, expected amp.Knowledge; give amp.Knowledge() if empty")
        device, k = self.logit_scale.device, self.config.max_triplets
        tokens, token_mask, mask = TripletTokenizer(self.tokenizer, k)(knowledge)
        states = torch.zeros(*mask.shape, self.backbone.embed_dim, device=device)
        read = [*texts, *(text for item in knowledge for text in tower_texts(item, k, self.config.knowledge))]
        features = states[:0, 0]
        if read:
            beginning, *ids = self.tokenizer([STATE_BEGINNING, *read]).to(device)
            encoded = self.backbone.encode_text(torch.stack(ids), beginning)
            features, states = encoded[: len(texts)], states.to(encoded.dtype)
            if len(read) > len(texts):
                states[mask.to(device)] = encoded[len(texts) :]
        return Captions(KnowledgeBatch(tokens.to(device), token_mask.to(device), states, mask.to(device)), features)

    def _prepared(self, knowledge: KnowledgeBatch | Sequence[Knowledge], count: int, of: str) -> KnowledgeBatch:
        if len(knowledge) != count:
            raise AmpError(f"knowledge of {len(knowledge)} captions for {count} {of}, expected one each")
        return knowledge if isinstance(knowledge, KnowledgeBatch) else self.prepare_knowledge(knowledge)

    # -- entry point for engines ------------------------------------------------------------------------------------

    def forward(
        self,
        images: Images | None = None,
        captions: Captions | EncodedCaptions | None = None,
        pairs: tuple[torch.Tensor, torch.Tensor] | Literal["all"] | None = None,
        plain: torch.Tensor | None = None,
    ) -> Features:
        """Runs all computation of training and re-ranking, so that the hooks of DDP and ZeRO see it.

        Images and captions can be given in any state that an earlier call returned, so nothing is computed twice.
        `model(pixels)` returns `early` and `base`, the outputs of the frozen blocks, without gradients. `model(early)`
        returns `images`, `model(None, captions)` returns `captions`, and both together return `conditioned`.

        Args:
            images: Pixels (B, 3, H, W), tokens `early` (B, F + M, d_v), or `images` from an earlier call.
            captions: C captions, or `captions` from an earlier call.
            pairs: Which images and captions are paired: None for image i with caption i, indices of P images and of P
                captions, int64 (P,) each, or `all`.
            plain: Indices of images whose features without knowledge are also returned, int64 (B',); needs pixels or
                tokens.
        """
        encoded = self._encode_captions(captions) if isinstance(captions, Captions) else captions
        if images is None:
            return Features(captions=encoded)
        features = None
        if isinstance(images, tuple):
            parts = images
        else:
            if images.ndim == 4:
                early = self.tower.early(images)
                if captions is None:
                    return Features(early=early, base=self.tower.base(early))
            else:
                # Stored tokens may differ in type from the blocks: float16 on disk, or weights cast by DeepSpeed.
                early = images.to(self.backbone.dtype)
            parts = self.interaction.encode_images(self.tower, early)
            features = None if plain is None else self.interaction.image_features(self.tower, early[plain])
        if encoded is None:
            return Features(images=parts)
        if isinstance(pairs, str):
            conditioned = self.interaction.all_pairs(self.tower, parts, encoded.prompts)
        else:
            prompts = encoded.prompts
            if pairs is None:
                # Not `len`, which would make B constant in exports.
                image_index = torch.arange(parts[0].shape[0], device=parts[0].device)
            else:
                image_index, prompts = pairs[0], prompts.take(pairs[1])
            conditioned = self.interaction.pairs(self.tower, parts, prompts, image_index)
        scale = self.logit_scale.float().exp().clamp(1.0, 100.0)
        return Features(captions=encoded, conditioned=conditioned, plain=features, logit_scale=scale)

    def _encode_captions(self, captions: Captions) -> EncodedCaptions:
        knowledge, text = captions
        triplets = self.encode_triplets(knowledge)
        prompts = self.interaction.encode_captions(captions, triplets)
        if text is not None and self.text_enrichment is not None:
            text = self.text_enrichment(text, knowledge.states, triplets, knowledge.mask)
        return EncodedCaptions(prompts, text)

    def encode_triplets(self, knowledge: KnowledgeBatch) -> torch.Tensor | None:
        """Triplet prompts of C captions (C, K, d_t) (eq. 4-5); None if the model reads none."""
        if self.triplet_encoder is None:
            return None
        embedded = self.backbone.embed_tokens(knowledge.triplet_tokens).to(self.triplet_encoder.null.dtype)
        return self.triplet_encoder(embedded, knowledge.token_mask, knowledge.mask)

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """The parameters that this project adds, by name, without those of the frozen CLIP."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("backbone.")}
