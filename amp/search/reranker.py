"""Ranks any images for a text, or texts for an image, by action-aware similarity (paper, sec. 3.5)."""

import os
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from amp.data.images.formats import UnreadableImageError
from amp.data.images.inputs import read_rgb
from amp.errors import AmpError
from amp.generation.query import KnowledgeGenerator
from amp.knowledge.schema import Knowledge
from amp.model.clip import ActionAwareCLIP
from amp.model.pretrained import from_pretrained
from amp.model.similarity import pair_similarity
from amp.retrieval.metrics import require_finite
from amp.retrieval.scorer import PairScorer
from amp.search.image_states import ImageStates, StatePacker, StateType, is_packed

Generator = Callable[[Sequence[str]], list[Knowledge]]
IMAGES_AT_ONCE = 128  # bounds the memory of states that are unpacked or computed at once


class Ranking(list):
    """Ranked candidates, best first: dicts with `corpus_id` (position of the candidate) and `score`.

    Args:
        scores: Scores of the N candidates.
        top_k: Number of candidates to keep; None keeps all.
        documents: The candidates, to add them to the dicts; None adds none.
        field: Name of a candidate in the dicts.
        skipped: Reason for each candidate that can't be read, by its position.

    Attributes:
        skipped: See `skipped` above. These candidates are left out.

    Raises:
        AmpError: A score is not finite.
    """

    def __init__(
        self,
        scores: torch.Tensor,
        top_k: int | None,
        documents: Sequence[Any] | None,
        field: str,
        skipped: dict[int, str] | None = None,
    ):
        self.skipped = skipped or {}
        readable = torch.tensor([place for place in range(len(scores)) if place not in self.skipped], dtype=torch.int64)
        require_finite(scores[readable], "re-ranking scores")
        order = scores[readable].sort(descending=True, stable=True)
        ranked = list(zip(readable[order.indices].tolist(), order.values.tolist(), strict=True))[:top_k]
        super().__init__({"corpus_id": place, "score": score} for place, score in ranked)
        if documents is not None:
            for entry in self:
                entry[field] = documents[entry["corpus_id"]]


class Reranker:
    """Ranks candidates by action-aware similarity. `rank` and `predict` work like those of sentence-transformers'
    CrossEncoder.

    A score is the cosine of the image's feature under the text's knowledge and the text's feature. An image is a path,
    the bytes of an image file, a Pillow image, an array uint8 (H, W, 3), a tensor uint8 (3, H, W), a preprocessed float
    tensor, or a packed state (see `pack`), for which no image is decoded or encoded.

    Args:
        model: Model on its device; it is put into eval mode.
        preprocess: The validation transform.
        knowledge: Function that maps captions to their knowledge, such as `amp.generation.query.KnowledgeGenerator()`;
            None uses only knowledge that is given.
        batch_size: Images per forward pass.
    """

    def __init__(self, model: ActionAwareCLIP, preprocess, knowledge: Generator | None = None, batch_size: int = 32):
        if batch_size < 1:
            raise AmpError(f"batch_size is {batch_size}, expected at least 1")
        self.model, self.preprocess, self.batch_size = model.eval(), preprocess, batch_size
        self.knowledge = knowledge

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | os.PathLike,
        base: str | None = None,
        base_pretrained: str | None = None,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        knowledge: str = "rules",
        engine_options: dict[str, Any] | None = None,
        batch_size: int = 32,
        knowledge_timeout: float | None = None,
        **download,
    ) -> "Reranker":
        """Loads an adapter and its base model.

        Args:
            adapter, base, base_pretrained, device, precision, **download: See `amp.from_pretrained`.
            knowledge: Source of a query's knowledge: an engine of `amp generate_knowledge`, loaded when
                it is first needed, or `none`.
            engine_options: Options of that engine.
            batch_size: Images per forward pass.
            knowledge_timeout: Seconds after which the rules answer in place of a language model; None waits.
        """
        model, _, preprocess = from_pretrained(adapter, base, base_pretrained, device, precision, **download)
        generator = None if knowledge == "none" else _LazyGenerator(knowledge, engine_options, knowledge_timeout)
        return cls(model, preprocess, generator, batch_size)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.logit_scale.device

    @cached_property
    def packer(self) -> StatePacker:
        """Packs and unpacks the model's image states."""
        return StatePacker(self.model, repr(self.preprocess))

    def knowledge_of(self, texts: Sequence[str]) -> list[Knowledge]:
        """Generates the knowledge of texts; empty for models that read none."""
        config = self.model.config
        if self.knowledge is None or not (config.reads_triplets or config.reads_states):
            return [Knowledge()] * len(texts)
        return self.knowledge(texts)

    # -- image states -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_images(self, images: Sequence[Any]) -> ImageStates:
        """Computes the states of N images, to be kept and given to `rank` in place of the images.

        Raises:
            AmpError: There is no image, or one can't be read.
        """
        parts = []
        for low in range(0, len(images), IMAGES_AT_ONCE):
            states, _, skipped = self._states_of(images[low : low + IMAGES_AT_ONCE])
            for place, reason in skipped.items():
                raise AmpError(f"image {low + place} of {len(images)}: {reason}; leave it out")
            assert states is not None
            parts.append(states)
        if not parts:
            raise AmpError("there are 0 images, expected at least one")
        return ImageStates.cat(parts)

    @torch.no_grad()
    def encode_pixels(self, pixels: torch.Tensor) -> ImageStates:
        """Computes the states of preprocessed images (B, 3, H, W)."""
        seen = self.model(pixels.to(self.device))
        return ImageStates(seen.base, self.model(seen.early).images)

    def pack(self, states: ImageStates, kind: StateType = "int8") -> list[bytes]:
        """Packs states to bytes, one object per image, for example for a column of a database."""
        return [row.tobytes() for row in self.packer.pack(states, kind)]

    def unpack(self, rows: Sequence[bytes]) -> ImageStates:
        """Unpacks the return value of `pack`.

        Raises:
            AmpError: A row was packed with another adapter, or is damaged.
        """
        try:
            return self.packer.unpack(rows).to(self.device)
        except UnreadableImageError as error:
            raise AmpError(f"{error}; pack the images again") from None

    # -- ranking ----------------------------------------------------------------------------------------------------

    def rank(
        self,
        query: str | Sequence[str],
        images: Sequence[Any] | ImageStates,
        top_k: int | None = None,
        knowledge: Knowledge | Sequence[Knowledge] | None = None,
        fusion_weight: float = 0.0,
        first_scores: Any = None,
        return_documents: bool = False,
    ) -> Any:
        """Ranks images for a text.

        Args:
            query: A text, or a list of Q texts.
            images: N candidates, the same for all texts.
            top_k: Number of candidates to return; None returns all.
            knowledge: Knowledge of the text, or of each text; None generates it, and `Knowledge()` is none.
            fusion_weight: Weight of the first stage's score, which is added to the new score.
            first_scores: The first stage's scores (N,), or (Q, N) for a list; None takes the base CLIP's cosines.
            return_documents: Whether to add each candidate to its result, as `image`.

        Returns:
            A `Ranking`, or a list of Q. Candidates that can't be read are listed in its `skipped`.

        Raises:
            AmpError: A text is empty, an argument is invalid, or a score is not finite.
        """
        single = isinstance(query, str)
        texts = [query] if isinstance(query, str) else list(query)
        given = [knowledge] if isinstance(knowledge, Knowledge) else knowledge
        shape = len(texts), len(images)
        image_of = torch.arange(shape[1]).repeat(shape[0])
        text_of = torch.arange(shape[0]).repeat_interleave(shape[1])
        new, first, skipped = self._score(texts, given, images, image_of, text_of)
        if first_scores is not None:
            first = torch.as_tensor(np.asarray(first_scores, dtype=np.float32)).flatten()
            if len(first) != len(new):
                raise AmpError(f"first_scores has {len(first)} numbers, expected {shape[0]} x {shape[1]}, one per pair")
        fused = new if fusion_weight == 0 else new + fusion_weight * first
        documents: Any = images if return_documents else None
        rankings = [Ranking(row, top_k, documents, "image", skipped) for row in fused.view(shape)]
        return rankings[0] if single else rankings

    def predict(self, pairs: Sequence[tuple[str, Any]], knowledge: Sequence[Knowledge] | None = None) -> np.ndarray:
        """Scores P pairs of a text and an image. Texts and images that occur several times are encoded once.

        Args:
            pairs: The pairs.
            knowledge: Knowledge of each pair's text; None generates it.

        Returns:
            Scores, float32 (P,); NaN, with a warning, for images that can't be read.

        Raises:
            AmpError: A text is empty, or a score is not finite.
        """
        if knowledge is not None and len(knowledge) != len(pairs):
            raise AmpError(f"knowledge of {len(knowledge)} texts for {len(pairs)} pairs, expected one each")
        texts: dict[tuple[str, Knowledge | None], int] = {}
        images: dict[Any, int] = {}
        distinct, rows = [], []
        for number, (text, image) in enumerate(pairs):
            described = text, None if knowledge is None else knowledge[number]
            name = image if isinstance(image, str | bytes | os.PathLike) else (id(image),)
            if name not in images:
                distinct.append(image)
            rows.append((images.setdefault(name, len(images)), texts.setdefault(described, len(texts))))
        image_of, text_of = torch.tensor(rows, dtype=torch.int64).view(-1, 2).T
        given = None if knowledge is None else [item for _, item in texts if item is not None]
        scores, _, skipped = self._score([text for text, _ in texts], given, distinct, image_of, text_of)
        readable = torch.tensor([place not in skipped for place in image_of.tolist()], dtype=torch.bool)
        require_finite(scores[readable], "re-ranking scores")
        if skipped:
            reason = next(iter(skipped.values()))
            warnings.warn(f"{len(skipped)} images have no score; the first one: {reason}", stacklevel=2)
        return scores.numpy()

    def rank_texts(
        self,
        image: Any,
        captions: Sequence[str],
        top_k: int | None = None,
        knowledge: Sequence[Knowledge] | None = None,
        pooled: bool = False,
        return_documents: bool = False,
    ) -> Ranking:
        """Ranks texts for an image.

        Args:
            image: The image, or the states of one image.
            captions: N candidates.
            top_k: Number of candidates to return; None returns all.
            knowledge: Knowledge of each caption; None generates it.
            pooled: Whether to encode the image once, under the knowledge of all captions together, as `i2t: pooled` of
                `amp evaluate` does.
            return_documents: Whether to add each caption to its result, as `text`.

        Raises:
            AmpError: The image can't be read, a caption is empty, or a score is not finite.
        """
        captions = list(captions)
        states = image if isinstance(image, ImageStates) else self.encode_images([image])
        text_of = torch.arange(len(captions))
        pooled = pooled and self.model.interaction.conditioned  # a control's scores don't depend on the mode
        scores, _, _ = self._score(captions, knowledge, states, torch.zeros_like(text_of), text_of, pooled)
        return Ranking(scores, top_k, captions if return_documents else None, "text")

    @torch.no_grad()
    def _score(
        self,
        texts: Sequence[str],
        knowledge: Sequence[Knowledge] | None,
        images: Sequence[Any] | ImageStates,
        image_of: torch.Tensor,
        text_of: torch.Tensor,
        pooled: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[int, str]]:
        """Scores P pairs, given as indices of N images and C texts, int64 (P,).

        Returns:
            New scores and the base CLIP's cosines, float32 (P,) on the CPU, NaN for images that can't be read; and the
            reasons for these images.
        """
        for text in texts:
            if not text.strip():
                raise AmpError("a text is empty, expected a caption such as 'a dog jumps over a hurdle'")
        if knowledge is not None and len(knowledge) != len(texts):
            raise AmpError(f"knowledge of {len(knowledge)} texts for {len(texts)} texts, expected one each")
        skipped: dict[int, str] = {}
        new = torch.full((len(image_of),), torch.nan)
        first = new.clone()
        if not len(new):
            return new, first, skipped
        captions = self.model.prepare_captions(texts, self.knowledge_of(texts) if knowledge is None else knowledge)
        assert captions.text is not None
        for low in range(0, len(images), IMAGES_AT_ONCE):
            states, places, unread = self._states_of(images[low : low + IMAGES_AT_ONCE])
            skipped |= {low + place: reason for place, reason in unread.items()}
            if states is None:
                continue
            row_of = torch.full((len(images),), -1)
            row_of[low + torch.tensor(places)] = torch.arange(len(places))
            rows = (row_of[image_of] >= 0).nonzero()[:, 0]
            scorer = PairScorer(self.model, states.parts, captions.knowledge, captions.text, batch_size=self.batch_size)
            if pooled:
                new[rows] = scorer.pooled(row_of[image_of[:1]], text_of[None])[0].cpu()
            else:
                for part in rows.split(self.batch_size):
                    new[part] = scorer(row_of[image_of[part]], text_of[part]).cpu()
            base = states.base[row_of[image_of[rows]].to(self.device)]
            first[rows] = pair_similarity(base, captions.text[text_of[rows].to(self.device)]).cpu()
        return new, first, skipped

    def _states_of(self, images: Sequence[Any] | ImageStates) -> tuple[ImageStates | None, list[int], dict[int, str]]:
        """States of the images that can be read, their positions, and reasons for the others by position."""
        if isinstance(images, ImageStates):
            return images.to(self.device), list(range(len(images))), {}
        pixels: dict[int, torch.Tensor] = {}
        packed: dict[int, Any] = {}
        skipped: dict[int, str] = {}
        for place, image in enumerate(images):
            try:
                if is_packed(image):
                    self.packer.check(image)
                    packed[place] = image
                elif isinstance(image, torch.Tensor) and image.is_floating_point():
                    pixels[place] = self._checked(image)
                else:
                    pixels[place] = self.preprocess(read_rgb(image))
            except UnreadableImageError as error:
                skipped[place] = str(error)
        batches = torch.stack(list(pixels.values())).split(self.batch_size) if pixels else ()
        found = [self.encode_pixels(batch) for batch in batches]
        if packed:
            found.append(self.packer.unpack(list(packed.values())).to(self.device))
        return ImageStates.cat(found) if found else None, [*pixels, *packed], skipped

    def _checked(self, image: torch.Tensor) -> torch.Tensor:
        expected = (3, *self.packer.image_size)
        if tuple(image.shape) != expected:
            raise UnreadableImageError(f"a float tensor {tuple(image.shape)}, expected a preprocessed image {expected}")
        return image


class _LazyGenerator:
    """A `KnowledgeGenerator` that loads its engine, which takes seconds, when it is first called."""

    def __init__(self, engine: str, options: dict[str, Any] | None, timeout: float | None):
        self._settings = engine, options, timeout

    @cached_property
    def _generator(self) -> KnowledgeGenerator:
        engine, options, timeout = self._settings
        return KnowledgeGenerator(engine, engine_options=options, timeout=timeout)

    def __call__(self, captions: Sequence[str]) -> list[Knowledge]:
        return self._generator(captions)
