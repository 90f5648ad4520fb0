"""Computes the text features and the frozen image features of a run before it starts, over all ranks.

What is stored per shard is shared out by files (`amp.data.shared_work`), so it can also be computed by other jobs.

Both are computed without autocast, since runs of any precision share them and they give the base model's results.
"""

from collections.abc import Iterable
from pathlib import Path

from accelerate import Accelerator

from amp.data.frozen_features import FrozenFeatures, ImageBatches, compute_frozen_features, features_folders
from amp.data.shard_texts import ShardTexts
from amp.data.shared_work import make_missing
from amp.data.split import ShardSplit
from amp.data.stream import KnowledgeCollator
from amp.data.text_features import TextFeatureStore, encode_missing, encode_texts
from amp.knowledge.tensors import TripletTokenizer
from amp.model.clip import ActionAwareCLIP
from amp.terminal import Terminal


def knowledge_collator(model: ActionAwareCLIP, cache: str, dtype: str, setting: str | None = None) -> KnowledgeCollator:
    """A collator with a model's tokenizer and the store of its text tower's features.

    Args:
        model: The model.
        cache: Folder of the text feature stores.
        dtype: Type of stored features.
        setting: Value for `PromptConfig.knowledge`; None for the model's.
    """
    store = TextFeatureStore(cache, model.backbone.weights_hash("text"), model.backbone.embed_dim, dtype)
    tokenizer = TripletTokenizer(model.tokenizer, model.config.max_triplets)
    return KnowledgeCollator(tokenizer, store, setting or model.config.knowledge)


def prepare_texts(
    accelerator: Accelerator, terminal: Terminal, store: TextFeatureStore, model: ActionAwareCLIP, texts: Iterable[str]
) -> None:
    """Adds the features of missing texts to the store; each rank encodes a share."""
    accelerator.wait_for_everyone()  # no rank may add texts while another rank looks for missing ones
    missing = store.missing(texts)
    accelerator.wait_for_everyone()
    if missing:
        with terminal.progress("encoding texts", "texts") as report:
            encode_missing(
                store,
                missing,
                model.backbone,
                model.tokenizer,
                rank=accelerator.process_index,
                world=accelerator.num_processes,
                progress=report,
            )
    accelerator.wait_for_everyone()
    store.refresh()


def prepare_shard_texts(
    terminal: Terminal,
    split: ShardSplit,
    model: ActionAwareCLIP,
    cache: str,
    dtype: str,
    first: float = 0.0,
) -> ShardTexts:
    """Features of a split's texts, stored per shard. Missing ones are computed by all processes that call this.

    Args:
        terminal: Console for progress output.
        split: The split.
        model: The model; its settings decide which texts are needed.
        cache: Cache folder.
        dtype: Type of stored features.
        first: Where in the split this process starts, as a fraction.
    """
    backbone = model.backbone
    texts = ShardTexts(cache, backbone.weights_hash("text"), backbone.embed_dim, dtype, model.config.knowledge)
    with terminal.progress(f"encoding texts of {split.name}", "captions") as report:
        texts.make(
            split, lambda found, done: encode_texts(found, backbone, model.tokenizer, progress=done), first, report
        )
    return texts


def prepare_images(
    terminal: Terminal,
    split: ShardSplit,
    model: ActionAwareCLIP,
    preprocess,
    cache: str,
    dtype: str,
    batch_size: int,
    workers: int,
    tokens: bool = True,
    first: float = 0.0,
) -> FrozenFeatures:
    """Frozen features of a split, stored per shard. Missing ones are computed by all processes that call this.

    Args:
        terminal, split, model, cache, first: As in `prepare_shard_texts`.
        preprocess, batch_size, workers: See `ImageBatches`.
        tokens: See `compute_frozen_features`.
        dtype: Type of the stored early tokens.
    """
    folders = features_folders(cache, split, model, preprocess, dtype if tokens else "base")
    number_of = {folder.name: number for number, folder in enumerate(folders)}
    left = len(folders)
    batches = ImageBatches(split, preprocess, batch_size, workers, model.logit_scale.device.type == "cuda")

    def report(missing: float) -> None:
        show(round(len(split) * (1 - missing / len(folders))), len(split))

    def count(missing: int) -> None:
        nonlocal left
        left = missing
        report(left)

    def make(name: str) -> None:
        shards = range(number_of[name], number_of[name] + 1)
        done = lambda images, total: report(left - images / total)  # noqa: E731
        compute_frozen_features(batches, model, shards, Path(cache) / name, dtype, done, tokens)

    with terminal.progress(f"encoding {split.name} images", "images") as show:
        make_missing([folder.name for folder in folders], Path(cache), make, first, count)
    return FrozenFeatures.load(folders, split.sizes, tokens)
