"""An evaluation run: one split, the base model and any number of adapters, one table."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import accelerate
import open_clip
import torch
from accelerate import Accelerator
from rich.console import Console

from amp.checkpoint import load_adapter_state, read_adapter
from amp.data.prepare import knowledge_collator, prepare_images, prepare_texts
from amp.data.shards import ShardManifest
from amp.data.split import ShardSplit
from amp.errors import AmpError
from amp.factory import create_model_and_transforms
from amp.model import ActionAwareCLIP
from amp.retrieval.evaluate import Retrieval, RetrievalSettings, SplitCaptions
from amp.retrieval.picture import draw_retrievals
from amp.retrieval.probes import Probe, enriched_text, probe
from amp.retrieval.results import ResultFile
from amp.terminal import Terminal
from amp.train.config import TrainConfig
from amp.train.launch import make_accelerator
from amp.version import __version__


def evaluate(config: TrainConfig, split_name: str, adapters: list[str], search: RetrievalSettings, out: Path,
             gallery: str | None = None, probes: Sequence[Probe] = (), text_only: bool = False,
             ) -> ResultFile:  # fmt: skip
    """Evaluates the base model and adapters, prints the table and writes JSON, CSV and the picture.

    Args:
        config: Of it `model`, `data` and `mixed_precision` are read.
        split_name: Split of the shards.
        adapters: ``NAME=FILE`` each.
        search: How the split is searched.
        out: JSON file; the CSV file takes its name.
        gallery: PNG file with retrievals of the last adapter.
        probes: Each adds rows of every knowledge-aware adapter with one input spoilt.
        text_only: Add the row of the text-only control: captions with their states, without any action-aware image.

    Raises:
        AmpError: Wrong input, such as an adapter of another base model.
    """
    named = [named_adapter(text) for text in adapters]
    if gallery is not None and not named:
        raise AmpError("gallery needs an adapter to compare with the base model; add --adapters NAME=FILE")
    accelerator = make_accelerator(config, training=False)
    terminal = Terminal(accelerator.is_main_process)
    split = ShardSplit(config.data.shards, split_name)
    base, _, preprocess = create_model_and_transforms(
        config.model.name, config.model.pretrained, precision=config.model.precision, device=accelerator.device,
        prompt_config=config.prompt, image_resize_mode=config.model.resize_mode,
    )  # fmt: skip
    captions = SplitCaptions.read(split, config.data.kinds, search.captions_per_image)
    models = {name: adapted(base, config.model.name, path) for name, path in named} or {"base": base}
    result = ResultFile(protocol(config, split, captions, search, base, dict(named), accelerator))
    first_hash = None
    for name, model in models.items():
        collate = knowledge_collator(model, config.data.cache, config.data.cache_dtype)
        k = model.config.max_triplets
        texts = captions.all_texts(k, model.config.knowledge)
        prepare_texts(accelerator, terminal, collate.store, model, texts)
        frozen = prepare_images(accelerator, terminal, split, model, preprocess, config.data.cache,
                                config.data.cache_dtype, config.data.batch_size, config.data.workers)  # fmt: skip
        retrieval = Retrieval(captions, frozen, collate, search, accelerator.device)
        if first_hash is None:
            result.rows.append(retrieval.base_row())
            if text_only:
                # The first model need not read states.
                states = knowledge_collator(model, config.data.cache, config.data.cache_dtype, "states")
                prepare_texts(accelerator, terminal, states.store, model, captions.all_texts(k, "states"))
                text = enriched_text(retrieval.text, states(captions.knowledge))
                result.rows += retrieval.rows("captions with states", retrieval.rank_text(text))
            first_hash = base.base_hash
        if not named:
            break
        model.eval()
        with terminal.progress(f"re-ranking with {name}") as report:
            rankings = retrieval.rank(model, accelerator.autocast, lambda _, done, total, r=report: r(done, total))
        result.rows += retrieval.rows(name, rankings)
        for kind in probes if model.knowledge_aware else ():
            with terminal.progress(f"probe {kind} of {name}") as report:
                spoilt = probe(retrieval, kind, model, preprocess, config.seed).rank(
                    model, accelerator.autocast, lambda _, done, total, r=report: r(done, total)
                )
            result.rows += retrieval.rows(f"{name}, {kind}", spoilt)
        if accelerator.is_main_process:  # after each adapter, so that a stop loses one at most
            result.save_json(out)
    if accelerator.is_main_process:
        result.save_json(out)
        result.save_csv(out.with_suffix(".csv"))
        result.print_table(Console())
        if gallery is not None:
            draw_retrievals(Path(gallery), split, captions, rankings)
    accelerator.end_training()
    return result


def named_adapter(text: str) -> tuple[str, str]:
    """Splits ``NAME=FILE``; a bare file is named after its run's folder."""
    name, equals, path = text.partition("=")
    if not equals:
        name, path = Path(text).resolve().parent.parent.name, text
    if not Path(path).is_file():
        raise AmpError(
            f"adapter {text!r}: no file {path}, expected NAME=FILE with an adapter.safetensors of launchers/train.py"
        )
    return name, path


def adapted(base: ActionAwareCLIP, model_name: str, path: str) -> ActionAwareCLIP:
    """A model with an adapter's weights around the base model that is already in memory."""
    header, weights = read_adapter(path)
    header.check_base(model_name, base.base_hash, where=path)
    model = ActionAwareCLIP(base.backbone.clip, header.prompt_config, base.tokenizer)
    load_adapter_state(model, weights, where=path)
    return model.to(base.logit_scale.device)


def protocol(config: TrainConfig, split: ShardSplit, captions: SplitCaptions, search: RetrievalSettings,
             base: ActionAwareCLIP, adapters: dict[str, str], accelerator: Accelerator) -> dict:  # fmt: skip
    """All that the figures depend on, as JSON values."""
    manifest = ShardManifest.load(config.data.shards)
    return {
        "dataset": Path(config.data.shards).name,
        "split": split.name,
        "images": captions.images,
        "captions": len(captions.texts),
        "captions_per_image": search.captions_per_image or "all",
        "queries": search.max_queries or "all",
        "model": config.model.name,
        "pretrained": config.model.pretrained,
        "weights_sha256": base.base_hash,
        "quick_gelu": base.backbone.quick_gelu,
        "adapters": {name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for name, path in adapters.items()},
        "top_k": search.top_k,
        "i2t": search.i2t,
        "fusion_weight": search.fusion_weight,
        "tie_rule": "equal scores keep the gallery's order",
        "prompt_prefix": "",
        "resize": config.model.resize_mode or "model default",
        "image_size": list(base.backbone.visual.image_size),
        "kinds": config.data.kinds,
        "precision": f"{config.model.precision}, autocast {accelerator.mixed_precision}",
        "knowledge": manifest.provenance.get("knowledge"),
        "versions": {
            "open-clip-amp": __version__, "open_clip": open_clip.__version__, "torch": torch.__version__,
            "accelerate": accelerate.__version__,
        },
    }  # fmt: skip
