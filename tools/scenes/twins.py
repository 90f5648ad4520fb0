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
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from amp.errors import AmpError, exit_on_error, shorten

with exit_on_error():
    import numpy as np
    import torch

    from amp.command_line import CommandLine
    from amp.commands.measuring import command_line, read_command_line
    from amp.evaluate.settings import BaseSettings, Kind
    from amp.model.similarity import pair_similarity

CHANGES = ("roles", "action")
BATCH = 256  # comparisons per forward pass, two pairs each
TIE = 1e-6  # cosines this close are equal: matrix products round differently from row to row


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


@dataclass(frozen=True)
class Comparisons:
    """Comparisons of one kind of change: caption, own image and twin's image, each int64 (N,).

    `twins` is the number of pairs of scenes, which are the units of the standard error.
    """

    caption: torch.Tensor
    own: torch.Tensor
    other: torch.Tensor
    twins: int


def twin_comparisons(dataset: Path, filenames: Sequence[str], owner: torch.Tensor) -> dict[str, Comparisons]:
    """Finds the comparisons of a split, by what differs between the twins.

    Args:
        dataset: dataset.json with the keys "twin" and "change".
        filenames: Filenames of the split's images, in the order of the shards.
        owner: Image of each caption, int64 (C,).

    Raises:
        AmpError: The file can't be read, has no twins of this split, or names images that the shards lack.
    """
    try:
        images = json.loads(dataset.read_text(encoding="utf-8"))["images"]
        changed = [(image["filename"], image["twin"], image["change"]) for image in images if "twin" in image]
    except OSError as error:
        raise AmpError(
            f"{dataset}: can't be read ({error.strerror}), expected the dataset.json that tools/scenes/make_scenes.py "
            "writes; run it, or give --dataset FILE"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise AmpError(
            f"{dataset}: not a dataset.json of drawn scenes ({type(error).__name__}: {error}), expected a key 'images' "
            "whose twins have 'filename', 'twin' and 'change'; run tools/scenes/make_scenes.py again"
        ) from error
    row = {name: index for index, name in enumerate(filenames)}
    captions = {}
    for caption, image in enumerate(owner.tolist()):
        captions.setdefault(image, []).append(caption)
    found, pairs = {change: [] for change in CHANGES}, dict.fromkeys(CHANGES, 0)
    for one, other, change in changed:
        if change not in found:
            raise AmpError(f"{dataset}: change of {one} is {shorten(change)}, expected one of {', '.join(CHANGES)}")
        if one not in row and other not in row:  # both are in another split
            continue
        if one not in row or other not in row:
            missing = one if one not in row else other
            raise AmpError(
                f"{dataset}: {missing} is not in the shards, expected both pictures of the twins {one} and {other}; "
                "make the shards from this data set"
            )
        pairs[change] += 1
        for own, twin in ((row[one], row[other]), (row[other], row[one])):
            found[change] += [(caption, own, twin) for caption in captions.get(own, [])]
    if empty := [change for change, rows in found.items() if not rows]:
        raise AmpError(
            f"{dataset}: no twins with another {' or '.join(empty)} among the {len(row)} images of the split, expected "
            "some of each; draw at least 8 scenes per split (tools/scenes/make_scenes.py)"
        )
    return {
        change: Comparisons(*torch.tensor(rows, dtype=torch.int64).T, pairs[change]) for change, rows in found.items()
    }


Scorer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def accuracy(comparisons: dict[str, Comparisons], score: Scorer) -> dict[str, dict]:
    """Computes the fraction of won comparisons by kind of change.

    Args:
        comparisons: Comparisons from `twin_comparisons`.
        score: Maps images (P,) and captions (P,), int64, to scores (P,).

    Returns:
        For each change: `accuracy` in percent, ties counted as half; `standard_error` in percentage points, clustered
        by twins, since the captions of one pair of pictures are not independent; `won`, `ties`, `comparisons` and
        `twins`.

    Raises:
        AmpError: A score is not finite.
    """
    rows = {}
    for change, c in comparisons.items():
        difference = differences(score, c)
        if not bool(difference.isfinite().all()):
            raise AmpError(
                f"scores of the twins with another {change} are not all finite numbers, expected cosines; train the "
                "adapter again with a lower learning rate"
            )
        won, tie = difference > TIE, difference.abs() <= TIE
        gain = won.double() + 0.5 * tie.double()
        # The captions of both pictures of a pair form one unit.
        low, high = torch.minimum(c.own, c.other), torch.maximum(c.own, c.other)
        _, unit = torch.stack([low, high]).unique(dim=1, return_inverse=True)
        size = torch.bincount(unit).double()
        mean = gain.mean()
        # Ratio estimator, because pairs may have different numbers of captions.
        residual = torch.zeros(len(size), dtype=torch.float64).index_add_(0, unit, gain - mean)
        units = len(size)
        error = math.sqrt(float(residual.square().sum()) * units / max(1, units - 1)) / len(gain)
        rows[change] = {
            "accuracy": 100 * float(mean),
            "standard_error": 100 * error if units > 1 else None,
            "won": int(won.sum()),
            "ties": int(tie.sum()),
            "comparisons": len(gain),
            "twins": c.twins,
        }
    return rows


def base_score(image: torch.Tensor, text: torch.Tensor) -> Scorer:
    """Scores pairs by the cosine of the frozen features of images (I, d) and captions (C, d)."""
    return lambda images, captions: pair_similarity(image[images], text[captions])


def differences(score: Scorer, comparisons: Comparisons) -> torch.Tensor:
    """Score of each caption's own picture minus the score of the twin's (N,)."""
    parts = []
    for rows in torch.arange(len(comparisons.caption)).split(BATCH):
        images = torch.cat([comparisons.own[rows], comparisons.other[rows]])
        own, other = score(images, comparisons.caption[rows].repeat(2)).chunk(2)
        parts.append(own - other)
    return torch.cat(parts)


def measure(settings: TwinSettings) -> dict:
    """Measures twin accuracy of the base model and of each adapter, with the grey probe. Writes `settings.out`.

    Raises:
        AmpError: The input is wrong, such as an adapter of another base model.
    """
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
    from amp.terminal import Terminal

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
        frozen = prepare_images(
            accelerator, terminal, split, model, preprocess, settings.cache, "float32", batch_size, workers
        )
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
