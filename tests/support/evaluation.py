"""A model and all inputs for searching the drawn test split."""

from pathlib import Path

import torch

import amp
from amp.data.frozen_features import ImageBatches, compute_frozen_features
from amp.data.prepare import knowledge_collator
from amp.data.split import ShardSplit
from amp.data.split_captions import SplitCaptions
from amp.data.text_features import encode_missing
from amp.model.adapter import save_adapter
from amp.retrieval.settings import RetrievalSettings
from amp.retrieval.split_search import Ranking, SplitSearch

KINDS = ("action", "attribute")
TOP_K = 8


def make_far_model(clip_folder: str, **prompt):
    """A model on a tiny CLIP and its transform. Its weights are far from the start, so knowledge changes the scores."""
    torch.manual_seed(3)
    settings = {"interaction": "aim", "depth": 0.34, "num_prompts": 2, "max_triplets": 3, "enrich": False}
    config = amp.PromptConfig(**{**settings, **prompt})
    model, _, preprocess = amp.create_model_and_transforms(clip_folder, prompt_config=config)
    if hasattr(model.interaction, "aim"):
        model.interaction.aim.gate.data.normal_(std=2.0)
    return model.eval(), preprocess


class World:
    """A model, its transform and all inputs of a `SplitSearch` of the test split."""

    def __init__(self, clip_folder: str, shards: Path, cache_folder: Path, knowledge: str = "both", **prompt):
        self.model, self.preprocess = make_far_model(clip_folder, knowledge=knowledge, **prompt)
        self.split = ShardSplit(shards, "test")
        self.captions = SplitCaptions.read(self.split, KINDS)
        self.collate = knowledge_collator(self.model, str(cache_folder), "float32")
        encode_missing(self.collate.store, self.captions.all_texts(3), self.model.backbone, self.model.tokenizer)
        self.frozen = compute_frozen_features(ImageBatches(self.split, self.preprocess, 5, 0, False), self.model)
        self.images = torch.stack([self.preprocess(self.split.image(i)) for i in range(len(self.split))])
        with torch.no_grad():
            self.text = [self.model.encode_text(self.model.tokenizer([text]))[0] for text in self.captions.texts]

    def retrieval(self, captions=None, **settings) -> SplitSearch:
        """Search of the test split, by default with its own captions."""
        settings = RetrievalSettings(**{"top_k": TOP_K, **settings})
        return SplitSearch.stored(captions or self.captions, self.frozen, self.collate, settings, torch.device("cpu"))


def write_world_adapter(clip_folder: str, shards: Path, folder: Path) -> Path:
    """Writes the adapter of a `World` to the file that a run in `folder` would write."""
    world = World(clip_folder, shards, folder / "cache")
    adapter = folder / "run" / "stage1" / "adapter.safetensors"
    adapter.parent.mkdir(parents=True)
    save_adapter(adapter, world.model)
    return adapter


def ranked(retrieval: SplitSearch, model, *arguments, **options) -> dict[str, Ranking]:
    """Rankings by direction and mode: "t2i", "i2t pairwise", "i2t pooled", or "i2t" of a control."""
    found = retrieval.rank(model, *arguments, **options)
    return {"t2i": found.t2i, **{f"i2t {mode}".strip(): ranking for mode, ranking in found.i2t.items()}}
