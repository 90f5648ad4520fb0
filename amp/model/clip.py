"""ActionAwareCLIP: a frozen CLIP whose image encoder is prompted with the action knowledge of a caption."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from amp.errors import AmpError
from amp.knowledge.schema import Knowledge
from amp.knowledge.tensors import KnowledgeBatch, TripletTokenizer
from amp.knowledge.text import tower_texts
from amp.model.config import PromptConfig
from amp.model.layers.interaction import ActionAwareInteraction
from amp.model.layers.prompt_adapter import PromptAdapter
from amp.model.layers.readout import KnowledgeReadout, in_type_of
from amp.model.layers.text_enrichment import TextEnrichment
from amp.model.layers.triplet_encoder import TripletEncoder, null_rows, with_null
from amp.model.layers.visual_prompts import VisualPrompts
from amp.model.towers.base import make_backbone


class Prompts(NamedTuple):
    """Prompts of C captions (eq. 6): of triplets (C, K, d_v), of states (C, K, d_v), and which exist, bool (C, K).

    A kind that the model doesn't read is None. A model with `readout` has `queries` (C, Q, d) instead.
    """

    triplets: torch.Tensor | None
    states: torch.Tensor | None
    mask: torch.Tensor
    queries: torch.Tensor | None = None

    def take(self, index: torch.Tensor) -> "Prompts":
        """Rows of captions, index int64 (P,)."""
        return Prompts._make(None if x is None else x[index] for x in self)

    def unite(self, captions: int) -> "Prompts":
        """Joins each run of n = `captions` rows into one: (C, K, ...) -> (C / n, n K, ...)."""
        return Prompts._make(None if x is None else x.unflatten(0, (-1, captions)).flatten(1, 2) for x in self)


class Features(NamedTuple):
    """What one forward pass returns; None where it was not asked for.

    Attributes:
        early: Tokens before block `interaction_layer` (B, F + M, d_v).
        base: The frozen CLIP's image features (B, d).
        prompted: Features under visual prompts alone, without knowledge (B, d).
        conditioned: Action-aware features, a row a pair (P, d), or of all pairs (B, C, d).
        text: Caption features that images are scored against, enriched where the model does that (C, d).
        logit_scale: Temperature 1 / tau, fp32 (1,).
        prompts: Prompts of C captions, for later calls.
    """

    early: torch.Tensor | None = None
    base: torch.Tensor | None = None
    prompted: torch.Tensor | None = None
    conditioned: torch.Tensor | None = None
    text: torch.Tensor | None = None
    logit_scale: torch.Tensor | None = None
    prompts: Prompts | None = None


class ActionAwareCLIP(nn.Module):
    """LLM-enhanced action-aware prompt tuning of a frozen CLIP (arXiv 2506.23502, sec. 3.3).

    Without knowledge it is its base CLIP: `encode_image(images)` and `encode_text` return the same bits.

    Args:
        clip: A model of `open_clip.create_model` that `make_backbone` takes.
        config: Settings of the prompts.
        tokenizer: The base model's tokenizer; needed where knowledge is given as text.

    Raises:
        AmpError: An image tower without plain transformer blocks, an `interaction_layer` outside the tower,
            `triplet_heads` that don't divide the text width, `cat` with image blocks that can't leave tokens out.
    """

    # Set by `amp.create_model_and_transforms`: what an adapter file says of its base model.
    base_name: str
    base_pretrained: str | None
    base_hash: str

    def __init__(self, clip: nn.Module, config: PromptConfig | None = None, tokenizer=None):
        super().__init__()
        self.config = config = config or PromptConfig()
        self.backbone = backbone = make_backbone(clip)
        self.tokenizer = tokenizer
        if config.interaction_layer >= backbone.num_layers:
            raise AmpError(
                f"interaction_layer is {config.interaction_layer}, expected 0 to {backbone.num_layers - 1}: the image "
                f"tower has {backbone.num_layers} blocks"
            )
        depth = backbone.num_layers - config.interaction_layer
        self.visual_prompts = VisualPrompts(depth, config.num_prompts, backbone.vision_width, backbone.patch_size)
        self.knowledge_aware = config.conditions
        d_t, d = backbone.text_width, backbone.embed_dim
        self.has_readout = config.interaction == "readout"
        if self.has_readout:
            if not backbone.keeps_patches:
                raise AmpError(
                    "interaction is 'readout' and the image tower pools by attention or average, expected the class "
                    "token, which leaves the patches as they are; choose interaction 'aim'"
                )
            self.readout = KnowledgeReadout(
                backbone.vision_width,
                d,
                d_t if config.reads_triplets else None,
                config.conditions,
                config.readout_blocks,
                backbone.vision_heads,
            )
        if config.reads_triplets and d_t % config.triplet_heads:
            raise AmpError(
                f"triplet_heads is {config.triplet_heads}, expected a divisor of the text width {d_t}; choose "
                f"{math.gcd(d_t, config.triplet_heads)}"
            )
        # What a variant doesn't read doesn't exist: distributed engines fail on parameters that take no part.
        if config.reads_triplets:
            self.triplet_encoder = TripletEncoder(d_t, config.triplet_layers, config.triplet_heads)
        if self.knowledge_aware and not self.has_readout:
            if config.interaction == "cat" and not backbone.masks_tokens:
                raise AmpError(
                    "interaction is 'cat' and the image tower's blocks are not open_clip's ResidualAttentionBlock, "
                    "expected that class, which can leave padding prompts out; choose interaction 'aim'"
                )
            if config.reads_states:
                self.null_state = nn.Parameter(0.02 * torch.randn(d))
                # Eq. 6 shares W_down and W_up between triplets and states, which asks for one width.
                self.state_projection = nn.Linear(d, d_t) if d != d_t else nn.Identity()
            self.adapter = PromptAdapter(d_t, max(1, d_t // config.bottleneck), backbone.vision_width)
            if config.interaction == "aim":
                self.interaction = ActionAwareInteraction(
                    backbone.vision_width,
                    backbone.vision_heads,
                    config.lam,
                    config.residual,
                    config.reads_triplets,
                    config.reads_states,
                )
        self._reads_last_patches = self.has_readout and self.readout.blocks is None
        self.text_enrichment = None
        if config.text_enrichment:
            self.text_enrichment = TextEnrichment(d, config.reads_states, d_t if config.enriches_by_triplets else None)
        self.image_projection = nn.Linear(backbone.pooled_width, d, bias=False) if config.image_projection else None
        if self.image_projection is not None:
            nn.init.zeros_(self.image_projection.weight)
        # A vector of one, not a scalar: DeepSpeed can't partition parameters without dimensions.
        self.logit_scale = nn.Parameter(backbone.clip.logit_scale.detach().clone().float().reshape(1))
        self.activation_checkpointing = False

    # -- what open_clip's users call --------------------------------------------------------------------------------

    def encode_image(
        self,
        images: torch.Tensor,
        knowledge: KnowledgeBatch | Sequence[Knowledge] | None = None,
        normalize: bool = False,
        text: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Image features (B, d): the base CLIP's, or action-aware ones under `knowledge`, one caption's an image.

        Args:
            images: Preprocessed images (B, 3, H, W).
            knowledge: None for the base CLIP; else knowledge of B captions.
            normalize: Scale features to unit length.
            text: The captions' features `encode_text(tokens)` (B, d), which models with `readout` ask with.
        """
        if knowledge is None:
            return self.backbone.clip.encode_image(images.to(self.backbone.dtype), normalize=normalize)
        knowledge = self._prepared(knowledge, len(images), "images")
        features = self(images, knowledge, text=text).conditioned
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(
        self,
        text: torch.Tensor,
        normalize: bool = False,
        knowledge: KnowledgeBatch | Sequence[Knowledge] | None = None,
    ) -> torch.Tensor:
        """Text features (B, d): the base CLIP's own call, or with `knowledge` what action-aware images are scored
        against, which differs only in models with `text_enrichment`."""
        if knowledge is None:
            return self.backbone.clip.encode_text(text, normalize=normalize)
        knowledge = self._prepared(knowledge, len(text), "texts")
        features = self(None, knowledge, text=self.backbone.clip.encode_text(text)).text
        return F.normalize(features, dim=-1) if normalize else features

    @torch.no_grad()
    def prepare_knowledge(self, knowledge: Sequence[Knowledge]) -> KnowledgeBatch:
        """Turns knowledge of C captions into tensors on the model's device, encoding the texts that the model reads
        (states, or sentences in their place) with the text tower."""
        if self.tokenizer is None:
            raise AmpError("this model was built without a tokenizer; pass tokenizer=amp.get_tokenizer(model_name)")
        for item in knowledge:
            if not isinstance(item, Knowledge):
                raise AmpError(f"knowledge holds {item!r}, expected amp.Knowledge; amp.Knowledge() if there is none")
        device, k = self.logit_scale.device, self.config.max_triplets
        tokens, token_mask, mask = TripletTokenizer(self.tokenizer, k, self.config.slot_tokens)(knowledge)
        states = torch.zeros(*mask.shape, self.backbone.embed_dim, device=device)
        texts = [text for item in knowledge for text in tower_texts(item, k, self.config.knowledge)]
        if texts:
            encoded = self.backbone.encode_text(self.tokenizer(texts).to(device))
            states = states.to(encoded.dtype)
            states[mask.to(device)] = encoded
        return KnowledgeBatch(tokens.to(device), token_mask.to(device), states, mask.to(device))

    def _prepared(self, knowledge: KnowledgeBatch | Sequence[Knowledge], count: int, of: str) -> KnowledgeBatch:
        if len(knowledge) != count:
            raise AmpError(f"knowledge of {len(knowledge)} captions for {count} {of}, expected one each")
        return knowledge if isinstance(knowledge, KnowledgeBatch) else self.prepare_knowledge(knowledge)

    # -- the pieces -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_early(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) to tokens before block `interaction_layer` (B, F + M, d_v), whatever the caption."""
        return self.backbone.blocks(self.backbone.embed(images), 0, self.config.interaction_layer)

    def encode_triplets(self, knowledge: KnowledgeBatch) -> torch.Tensor | None:
        """Triplet prompts of C captions (C, K, d_t) (eq. 4-5); None where the model reads none."""
        if not self.config.reads_triplets:
            return None
        embedded = self.backbone.embed_tokens(knowledge.triplet_tokens).to(self.triplet_encoder.null.dtype)
        return self.triplet_encoder(embedded, knowledge.token_mask, knowledge.mask)

    def encode_knowledge(
        self, knowledge: KnowledgeBatch, text: torch.Tensor | None = None, triplets: torch.Tensor | None = None
    ) -> Prompts:
        """Action-aware prompts of C captions, after the adapter (eq. 4-6), or the readout's queries, which need the
        frozen caption features `text` (C, d) too. `triplets`: of `encode_triplets`, if they are known already."""
        self._require_knowledge_aware()
        states = None
        if triplets is None:
            triplets = self.encode_triplets(knowledge)
        if self.has_readout:
            if text is None:
                raise AmpError(
                    "text is None, expected the captions' features (C, d): this model has interaction='readout', which "
                    "asks with them too. Pass text=model.encode_text(tokens)"
                )
            states = knowledge.states if self.config.reads_states else None
            queries, mask = self.readout.queries(text, states, triplets, knowledge.mask)
            return Prompts(None, None, mask, queries)
        if triplets is not None:
            triplets = self.adapter(triplets)
        if self.config.reads_states:
            states, _ = with_null(knowledge.states.to(self.null_state.dtype), knowledge.mask, self.null_state)
            states = self.adapter(self.state_projection(states))
        return Prompts(triplets, states, knowledge.mask | null_rows(knowledge.mask))

    def encode_pairs(self, early: torch.Tensor, prompts: Prompts, image_index: torch.Tensor) -> torch.Tensor:
        """Action-aware features of P pairs of an image and a caption.

        Args:
            early: Tokens of B images from `encode_early` (B, F + M, d_v).
            prompts: Prompts of the pairs' captions, P rows.
            image_index: The image of each pair, int64 (P,) with values below B.

        Returns:
            (P, d), not normalised.
        """
        self._require_knowledge_aware()
        if self.has_readout:
            assert prompts.queries is not None, "these prompts are of a model without readout"
            features, patches = self.read_patches(early)
            return features[image_index] + self.readout.pairs(patches, prompts.queries, prompts.mask, image_index)
        if self.config.interaction == "cat":
            kinds = [x for x in (prompts.triplets, prompts.states) if x is not None]
            absent = (~prompts.mask).repeat(1, len(kinds))
            tokens = self._prompted_blocks(early[image_index], torch.cat(kinds, dim=1).to(early.dtype), absent)
        else:
            front = self.backbone.num_prefix  # class token and registers see the knowledge in the blocks
            patches = self.interaction(early[:, front:], prompts.triplets, prompts.states, prompts.mask, image_index)
            tokens = self._prompted_blocks(torch.cat([early[image_index, :front], patches.to(early.dtype)], dim=1))
        return self._pool(tokens)[0]

    def encode_all_pairs(self, early: torch.Tensor, prompts: Prompts) -> torch.Tensor:
        """Action-aware features of B images with C captions each, (B, C, d); only with `readout`, where blocks run
        once an image."""
        assert prompts.queries is not None, "these prompts are of a model without readout"
        features, patches = self.read_patches(early)
        return features[:, None] + self.readout.all_pairs(patches, prompts.queries, prompts.mask)

    def encode_prompted(self, early: torch.Tensor) -> torch.Tensor:
        """Features without knowledge (B, d): visual prompts, the control of Table 3 "w/o action knowledge", and in the
        control of `readout` its learned query."""
        if self.has_readout and not self.knowledge_aware:
            features, patches = self.read_patches(early)
            return features + self.readout.unconditioned(patches)
        return self._pool(self._prompted_blocks(early))[0]

    def read_patches(self, early: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Early tokens to features without knowledge (B, d) and to the patches (B, M, d_v) that a readout reads."""
        features, last = self._pool(self._prompted_blocks(early))
        return features, self.readout.patches(early[:, self.backbone.num_prefix :], last)

    def _pool(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens behind the last block to image features (B, d) and patches (B, M, d_v)."""
        pooled, patches = self.backbone.pooled(tokens)
        features = self.backbone.project(pooled)
        if self.image_projection is not None:
            features = features + self.image_projection(in_type_of(self.image_projection.weight, pooled))
        return features, patches

    def _prompted_blocks(
        self, tokens: torch.Tensor, joined: torch.Tensor | None = None, absent: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens before block `interaction_layer` to those behind the last, or to its class token alone.

        `joined` (B, E, d_v) stands behind the patches in all blocks (`cat`), but for its rows `absent`, bool (B, E).
        """
        backbone, first = self.backbone, self.config.interaction_layer
        if self.config.num_prompts == 0 and joined is None:  # the base CLIP's own calls: its features bit for bit
            return backbone.blocks(tokens, first, backbone.num_layers, self.activation_checkpointing)
        if joined is not None and absent is not None:
            absent = F.pad(absent, (tokens.shape[1], self.config.num_prompts))
            tokens = torch.cat([tokens, joined], dim=1)
        length = tokens.shape[1]  # visual prompts are replaced behind it, at each block
        for index in range(backbone.num_layers - first):
            tokens = self.visual_prompts(tokens, index, length)
            tokens = backbone.prompted_block(
                first + index, tokens, self.activation_checkpointing, absent, self._reads_last_patches
            )
        return tokens

    def _require_knowledge_aware(self) -> None:
        if not self.knowledge_aware:
            raise AmpError(
                "this model's images see no knowledge (knowledge='none' or condition_images=False, controls); build it "
                "with knowledge='both', or score with encode_prompted"
            )

    # -- one entry for engines --------------------------------------------------------------------------------------

    def forward(
        self,
        images: torch.Tensor | None,
        knowledge: KnowledgeBatch | Prompts | None = None,
        image_index: torch.Tensor | None = None,
        knowledge_index: torch.Tensor | None = None,
        captions_a_pair: int = 1,
        all_pairs: bool = False,
        prompted: bool | torch.Tensor | None = False,
        only_frozen: bool = False,
        only_prompts: bool = False,
        text: torch.Tensor | None = None,
    ) -> Features:
        """All computation of training and re-ranking passes here, where DDP's and ZeRO's hooks can see it.

        Args:
            images: Images (B, 3, H, W), or tokens (B, F + M, d_v) of an earlier call with `only_frozen`; None for texts
                alone.
            knowledge: Knowledge of C captions, or their prompts.
            image_index, knowledge_index: The P pairs to encode; by default pair i is image i with caption i.
            captions_a_pair: With n > 1 each pair is conditioned on the union of n consecutive captions' knowledge.
            all_pairs: Encode every image with every caption instead; only with `readout`.
            prompted: Also return features without knowledge: of all images, or of those an int64 tensor names.
            only_frozen: Return only what the frozen blocks give, `early` and `base`, without gradients.
            only_prompts: Return only `prompts` of the C captions, which take the place of `knowledge` in later calls.
            text: The frozen features of the C captions (C, d); returned as `text`, enriched.
        """
        if only_prompts:
            assert isinstance(knowledge, KnowledgeBatch), "prompts are made of knowledge"
            return Features(prompts=self.encode_knowledge(knowledge, text))
        frozen_text, triplets = text, None
        if text is not None and isinstance(knowledge, KnowledgeBatch) and self.text_enrichment is not None:
            triplets = self.encode_triplets(knowledge) if self.config.enriches_by_triplets else None
            text = self.text_enrichment(text, knowledge.states, triplets, knowledge.mask)
        if images is None:
            return Features(text=text)
        # Stored tokens may have another type than the blocks: float16 on disk, or weights that DeepSpeed has cast.
        early = self.encode_early(images) if images.ndim == 4 else images.to(self.backbone.dtype)
        if only_frozen:
            with torch.no_grad():
                rest = self.backbone.blocks(early, self.config.interaction_layer, self.backbone.num_layers)
                return Features(early=early, base=self.backbone.pool(rest))
        plain = None
        if isinstance(prompted, torch.Tensor):
            plain = self.encode_prompted(early[prompted])
        elif prompted:
            plain = self.encode_prompted(early)
        conditioned = None
        if knowledge is not None and (self.knowledge_aware or prompted is False):
            if isinstance(knowledge, KnowledgeBatch):
                knowledge = self.encode_knowledge(knowledge, frozen_text, triplets)
            prompts = knowledge
            if all_pairs:
                return Features(
                    early=early,
                    conditioned=self.encode_all_pairs(early, prompts),
                    text=text,
                    logit_scale=self._temperature(),
                )
            if knowledge_index is not None:
                prompts = prompts.take(knowledge_index)
            if captions_a_pair > 1:
                prompts = prompts.unite(captions_a_pair)
            if image_index is None:
                image_index = torch.arange(early.shape[0], device=early.device)  # `len` would fix an export to one B
            conditioned = self.encode_pairs(early, prompts, image_index)
        return Features(
            early=early,
            prompted=plain,
            conditioned=conditioned,
            text=text,
            logit_scale=self._temperature(),
        )

    def _temperature(self) -> torch.Tensor:
        return self.logit_scale.float().exp().clamp(1.0, 100.0)

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """The parameters this project adds, by name; the frozen CLIP's are not among them."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("backbone.")}
