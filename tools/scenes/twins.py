"""Measures how often a model tells twins apart: same actors and place, swapped roles or another action (chance: 50 %).

    python tools/scenes/twins.py --shards data/demo/drawn-scenes --dataset data/demo/scenes/dataset.json \
        --out runs/demo/twins.json --adapters control=runs/demo/control/stage2/adapter.safetensors \
        action-aware=runs/demo/action-aware/stage2/adapter.safetensors

Each caption of both pictures gives one comparison, which is won if the caption scores its own picture above the twin's;
a tie counts half. An action-aware adapter conditions both pictures on the knowledge of that caption. Caption and
knowledge are the same on both sides, so only the pixels can decide. The grey probe verifies this: if a grey picture
replaces both, every comparison must be a tie.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from amp.errors import AmpError, exit_on_error

with exit_on_error():
    from amp.command_line import CommandLine
    from amp.commands.measuring import command_line, read_command_line
    from amp.evaluate.settings import BaseSettings, Kind


@dataclass
class TwinSettings:
    """Settings of the comparison.

    Args:
        dataset: dataset.json of tools/scenes/make_scenes.py, which marks the twins.
        shards: Folder of the drawn scenes' shards; null takes the folder that the adapters were trained on.
        split: Split of the shards.
        adapters: Adapters as `NAME=FILE`. Without adapters only the base model is measured.
        model: Base CLIP.
        kinds: Kinds of triplets to use; null takes those of the adapters' training.
        batch_size: Number of images per forward pass of the base model.
        workers: Number of decoding processes.
        cache: Folder for text features and frozen image features.
        mixed_precision: Autocast type of the comparisons, as for amp evaluate.
        out: JSON file of the result.
    """

    dataset: Path = Path("data/demo/scenes/dataset.json")
    shards: str | None = None
    split: str = "test"
    adapters: list[str] = field(default_factory=list)
    model: BaseSettings = field(default_factory=BaseSettings)
    kinds: list[Kind] | None = None
    batch_size: int = 64
    workers: int = 4
    cache: str = "data/cache"
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] | None = "auto"
    out: Path = Path("runs/twins.json")
    timeout_minutes: ClassVar[float] = 30.0  # required by start_accelerator; there is only one process


def measure(settings: TwinSettings) -> dict:
    """Measures twin accuracy of the base model and of each adapter, with the grey probe. Writes `settings.out`.

    Raises:
        AmpError: The input is wrong, such as an adapter of another base model.
    """
    from amp.terminal import Terminal, load_open_clip

    load_open_clip()
    import numpy as np
    import torch
    from comparisons import CHANGES, accuracy, base_score, twin_comparisons

    from amp.data.prepare import knowledge_collator, prepare_images, prepare_texts
    from amp.data.split import ShardSplit
    from amp.data.split_captions import SplitCaptions
    from amp.evaluate.adapters import base_of, kinds_of, load_adapters, load_base, read_adapters, shards_of
    from amp.evaluate.probes import probe
    from amp.files import check_writable, write_atomically
    from amp.launch import precision_problems, start_accelerator
    from amp.retrieval.figures import BASE, RowKey
    from amp.retrieval.settings import RetrievalSettings
    from amp.retrieval.split_search import SplitSearch

    adapters = read_adapters(settings.adapters)
    of_base = base_of(settings.model, adapters)
    check_writable(settings.out)
    for problem in precision_problems(settings, None, torch.cuda.is_available()):
        raise AmpError(problem)
    accelerator = start_accelerator(settings)
    if accelerator.num_processes > 1:
        raise AmpError(
            f"started with {accelerator.num_processes} processes, expected 1; start it with python, not with a launcher"
        )
    terminal = Terminal(True)
    split = ShardSplit(shards_of(settings.shards, adapters), settings.split)
    captions = SplitCaptions.read(split, kinds_of(settings.kinds, adapters))
    filenames = [record["filename"] for record in split.records()]
    comparisons = twin_comparisons(settings.dataset, filenames, captions.image)
    with terminal.progress(f"loading {of_base.name}"):
        base, _, preprocess = load_base(of_base, accelerator.device)
        models = load_adapters(base, str(of_base.name), adapters)
    rows: list[dict] = []
    result = {
        "split": settings.split,
        "images": captions.images,
        "captions": len(captions.texts),
        "chance": 50.0,
        "model": of_base.name,
        "rows": rows,
    }
    for name, model in {BASE.method: base, **models}.items():
        model.eval()
        collate = knowledge_collator(model, settings.cache, "float32")
        texts = captions.all_texts(model.config.max_triplets, model.config.knowledge)
        prepare_texts(accelerator, terminal, collate.store, model, texts)
        batch_size, workers = settings.batch_size, settings.workers
        frozen = prepare_images(terminal, split, model, preprocess, settings.cache, "float32", batch_size, workers)
        retrieval = SplitSearch.stored(captions, frozen, collate, RetrievalSettings(), accelerator.device)
        if model is base:
            image = torch.from_numpy(np.array(frozen.base))
            rows.append({"name": name, **accuracy(comparisons, base_score(image, retrieval.text.cpu()))})
        else:
            rows.append({"name": name, **accuracy(comparisons, retrieval.scorer(model, accelerator.autocast))})
            if model.interaction.conditioned:
                spoilt = probe(retrieval, "grey", model, preprocess).scorer(model, accelerator.autocast)
                rows.append({"name": str(RowKey(name, probe="grey")), **accuracy(comparisons, spoilt)})
        write_atomically(settings.out, (json.dumps(result, indent=2) + "\n").encode())  # keep the finished rows
    width = max(len(row["name"]) for row in rows)
    counts = ", ".join(f"{change}: {c.twins} twins, {len(c.caption)} captions" for change, c in comparisons.items())
    print(f"Captions that score their own picture above its twin, percent ± standard error (chance 50). {counts}")
    for row in rows:
        cells = (
            f"{change} {r['accuracy']:5.1f} ± {r['standard_error'] or 0:3.1f}"
            for change, r in ((change, row[change]) for change in CHANGES)
        )
        print(f"{row['name']:{width}}  {'   '.join(cells)}")
    return result


def parser() -> CommandLine:
    return command_line(__doc__, TwinSettings, "--shards DIR --dataset FILE --adapters NAME=FILE [...]")


@exit_on_error()
def main(arguments: list[str] | None = None) -> None:
    measure(read_command_line(parser(), arguments, TwinSettings))


if __name__ == "__main__":
    main()
