"""A naive implementation of the equations (arXiv 2506.23502, sec. 3) with open_clip's public calls.

This is the reference of the benchmarks. It is simple and not optimized: each candidate passes through all image blocks,
every text passes through the text tower at the full context length of open_clip's `encode_text`, and every attention
matrix is a tensor. It uses the weights of an `ActionAwareCLIP` with the interaction `aim`, so both give equal results.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from amp.knowledge.schema import Knowledge
from amp.knowledge.text import SLOT_TOKENS, tower_texts
from amp.model.clip import ActionAwareCLIP


class NaiveAIM:
    """Action-aware features of one image and one caption at a time; nothing is precomputed.

    Args:
        model: Model with the interaction `aim`, triplets and states, whose weights are used.
    """

    def __init__(self, model: ActionAwareCLIP):
        self.model, self.clip, self.visual = model, model.backbone.clip, model.backbone.visual

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        """Returns text features (C, d) of open_clip's `encode_text`."""
        with torch.no_grad():
            return self.clip.encode_text(self.model.tokenizer(list(texts)).to(self.model.logit_scale.device))

    def prompts(self, knowledge: Knowledge) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns triplet and state prompts of one caption, (K, d_v) each (eq. 3-6)."""
        model, rows = self.model, []
        for triplet in knowledge.triplets:
            slots = []
            for words in (triplet.subject, triplet.action, triplet.object):
                ids = torch.tensor(model.tokenizer.encode(words)[:SLOT_TOKENS])
                slots.append(self.clip.token_embedding(ids.to(model.logit_scale.device)).mean(dim=0))
            rows.append(torch.cat(slots))
        encoder = model.triplet_encoder
        p_t = encoder.project(encoder.norm(torch.stack(rows)))
        for block in encoder.blocks:
            p_t = block(p_t[None])[0]
        states = self.encode_text(tower_texts(knowledge, model.config.max_triplets, "both"))
        own = model.interaction
        return own.adapter(p_t), own.adapter(own.state_projection(states))

    def encode_pair(self, image: torch.Tensor, knowledge: Knowledge) -> torch.Tensor:
        """Returns the feature (d,) of one image (3, H, W), conditioned on one caption's knowledge (eq. 7-8)."""
        model, layer = self.model, self.model.tower.first
        with torch.no_grad():
            tokens = self.visual._embeds(image[None])
            for block in self.visual.transformer.resblocks[:layer]:
                tokens = block(tokens)
        p_t, p_s = self.prompts(knowledge)
        tokens = torch.cat([tokens[:, :1], self.interact(tokens[0, 1:], p_t, p_s)[None]], dim=1)
        length = tokens.shape[1]
        for index, block in enumerate(self.visual.transformer.resblocks[layer:]):
            tokens = torch.cat([tokens[:, :length], model.visual_prompts.prompts[index][None]], dim=1)
            tokens = block(tokens)
        pooled, _ = self.visual._pool(tokens[:, :length])
        return (pooled @ self.visual.proj)[0]

    def interact(self, patches: torch.Tensor, p_t: torch.Tensor, p_s: torch.Tensor) -> torch.Tensor:
        """Conditions patches (M, d_v) on prompts (K, d_v): eq. 7-8 with the residual form of docs/method.md."""
        aim = self.model.interaction.aim
        normed = aim.norm(patches)
        values, maps = [], []
        for cross, attend, p in ((aim.cross_triplet, aim.self_triplet, p_t), (aim.cross_state, aim.self_state, p_s)):
            k, v = cross.key_value(p).chunk(2, dim=-1)
            mixed = normed + cross.out(attention(cross.query(normed), k, v, cross.heads)[0])
            value, weights = attention(*attend.qkv(mixed).chunk(3, dim=-1), attend.heads)
            values.append(attend.out(value))
            maps.append(weights.mean(dim=0))
        mixed = (aim.lam * maps[0] + (1 - aim.lam) * maps[1]) @ aim.mlp(torch.cat(values, dim=-1))
        return patches + aim.gate * patches.square().mean().sqrt() * aim.norm_out(mixed)

    def similarity(self, image: torch.Tensor, caption: str, knowledge: Knowledge) -> torch.Tensor:
        """Returns the cosine similarity of a caption and an image conditioned on the caption's knowledge."""
        return F.cosine_similarity(self.encode_pair(image, knowledge), self.encode_text([caption])[0], dim=-1)

    def contrastive_step(
        self,
        images: torch.Tensor,
        captions: Sequence[str],
        items: Sequence[Knowledge],
        negatives: Sequence[Sequence[int]],
        scale: float,
    ) -> torch.Tensor:
        """Returns the loss of a step (docs/method.md, "contrastive").

        Each image is scored with its own caption and m others, each caption with m other images, and all images also
        without knowledge.
        """
        parts = []
        for n, drawn in enumerate(negatives):
            rows = [self.similarity(images[n], captions[c], items[c]) for c in [n, *drawn]]
            columns = [rows[0], *(self.similarity(images[i], captions[n], items[n]) for i in drawn)]
            for scores in (rows, columns):
                parts.append(-torch.log_softmax(scale * torch.stack(scores), dim=0)[0])
        plain = torch.stack([self._plain(image) for image in images])
        text = torch.stack([self.encode_text([caption])[0] for caption in captions])
        logits = scale * F.normalize(plain, dim=-1) @ F.normalize(text, dim=-1).T
        own = torch.arange(len(images), device=logits.device)
        coarse = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        return coarse + torch.stack(parts).mean()

    def _plain(self, image: torch.Tensor) -> torch.Tensor:
        return plain_prompt_tuning(self.model, image[None])[0]


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns softmax(q k^T / sqrt(d)) v and the attention matrices (heads, M, T), without a fused kernel."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return (weights @ v).transpose(0, 1).flatten(1), weights


def plain_prompt_tuning(
    model: ActionAwareCLIP, images: torch.Tensor, early: torch.Tensor | None = None
) -> torch.Tensor:
    """Computes features (B, d) by deep visual prompt tuning (arXiv 2203.12119) with open_clip's blocks.

    Args:
        model: Model whose visual prompts and first prompted block are used.
        images: Images (B, 3, H, W).
        early: Tokens before the first prompted block, if they are known already.
    """
    visual, layer = model.backbone.visual, model.tower.first
    if early is None:
        with torch.no_grad():
            early = visual._embeds(images)
            for block in visual.transformer.resblocks[:layer]:
                early = block(early)
    length, tokens = early.shape[1], early
    for index, block in enumerate(visual.transformer.resblocks[layer:]):
        prompts = model.visual_prompts.prompts[index].expand(len(tokens), -1, -1)
        tokens = block(torch.cat([tokens[:, :length], prompts], dim=1))
    return visual._pool(tokens[:, :length])[0] @ visual.proj
