"""Computes the text features and the frozen image features of a run before it starts, over all ranks.

Both are computed without autocast, since runs of any precision share them and they give the base model's results.
"""

from collections.abc import Iterable

from accelerate import Accelerator

from amp.data.frozen_features import FrozenFeatures, compute_frozen_features, features_folder
from amp.data.split import ShardSplit
from amp.data.stream import KnowledgeCollator
from amp.data.text_features import TextFeatureStore, encode_texts
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
            encode_texts(
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


def prepare_images(
    accelerator: Accelerator,
    terminal: Terminal,
    split: ShardSplit,
    model: ActionAwareCLIP,
    preprocess,
    cache: str,
    dtype: str,
    batch_size: int,
    workers: int,
    tokens: bool = True,
) -> FrozenFeatures:
    """Frozen features of a split. The main process computes and stores them; the others wait and open them."""
    folder = features_folder(cache, split, model, preprocess, dtype if tokens else "base")
    with accelerator.main_process_first(), terminal.progress(f"encoding {split.name} images", "images") as report:
        return compute_frozen_features(
            split,
            model,
            preprocess,
            batch_size,
            workers,
            folder=folder,
            dtype=dtype,
            progress=report,
            tokens=tokens,
        )
