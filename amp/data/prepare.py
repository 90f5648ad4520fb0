"""What a run computes once before it starts: features of texts and of the frozen image blocks, over all ranks.

Both are computed without autocast: they are the base model's row of the table, and runs of any precision share them.
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
    """Tokenizer and text store that belong to a model: its tokenizer and the weights of its text tower.

    The texts are those of the model's `knowledge`, or of another `setting` of it.
    """
    store = TextFeatureStore(cache, model.backbone.weights_hash("text"), model.backbone.embed_dim, dtype)
    tokenizer = TripletTokenizer(model.tokenizer, model.config.max_triplets)
    return KnowledgeCollator(tokenizer, store, setting or model.config.knowledge)


def prepare_texts(
    accelerator: Accelerator, terminal: Terminal, store: TextFeatureStore, model: ActionAwareCLIP, texts: Iterable[str]
) -> None:
    """Fills the store with the texts that it lacks, one share per rank."""
    accelerator.wait_for_everyone()  # no rank may add texts while another still counts them
    missing = store.missing(texts)
    accelerator.wait_for_everyone()
    if missing:
        with terminal.progress("encoding texts", "texts") as report:
            # Not under autocast: runs of any precision share the store.
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
    """Frozen features of a split: the main process computes and stores them, the others wait and open them."""
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
