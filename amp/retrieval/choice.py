"""Image-to-caption choice: which of a photo's captions is right? The files of SugarCrepe and ARO, and our swaps.

SugarCrepe: Hsieh et al., arXiv 2306.14610. ARO: Yuksekgonul et al., arXiv 2210.01936.
"""

import csv
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
import torch.nn.functional as F
from PIL import Image

from amp.errors import AmpError, shorten
from amp.json_text import parse_json
from amp.knowledge.schema import Knowledge, is_unicode
from amp.model import ActionAwareCLIP
from amp.retrieval.csv_cell import csv_cell
from amp.retrieval.pair_scorer import PairScorer, scored_text
from amp.retrieval.results import write_atomically


@dataclass(frozen=True)
class Choice:
    """A photo and its captions.

    Attributes:
        image: Name of the photo's file, or its number in a split.
        captions: The right one first.
        group: What accuracy is counted by besides, such as ARO's relation; may be empty.
        box: Part of the photo that is looked at (left, top, right, bottom), pixels; None for all of it.
        knowledge: Of each caption; None where it is to be generated.
    """

    image: str
    captions: tuple[str, ...]
    group: str = ""
    box: tuple[int, int, int, int] | None = None
    knowledge: tuple[Knowledge, ...] | None = None


def load_choices(path: str | os.PathLike) -> list[Choice]:
    """Reads SugarCrepe's format (an object of ``filename``, ``caption``, ``negative_caption``) or ARO's (a list with
    ``image_path`` and either ``true_caption`` and ``false_caption``, a box, and ``relation_name`` or ``attributes``, or
    ``caption_options`` with the right one first).

    Raises:
        AmpError: The file can't be read, or an entry lacks a key or has another type than expected.
    """
    try:
        content = parse_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise AmpError(f"{path}: can't be read ({error.strerror}), expected SugarCrepe's or ARO's JSON") from error
    except ValueError as error:
        raise AmpError(f"{path}: not JSON ({error}), expected SugarCrepe's or ARO's") from error
    if not isinstance(content, dict | list) or not content:
        raise AmpError(f"{path}: holds {type(content).__name__}, expected an object or a list with entries")
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    choices = []
    for number, entry in entries:
        where = f"{path}: entry {number}"
        if not isinstance(entry, dict):
            raise AmpError(f"{where} is {type(entry).__name__}, expected an object")
        try:
            choices.append(_sugarcrepe(entry) if "filename" in entry else _aro(entry))
        except KeyError as error:
            raise AmpError(f"{where}: key {error} is missing; keys seen: {shorten(', '.join(entry))}") from error
        except (TypeError, ValueError) as error:
            raise AmpError(f"{where}: {error}") from error
        photo = PurePosixPath(choices[-1].image)
        if photo.is_absolute() or ".." in photo.parts or "\0" in choices[-1].image:
            raise AmpError(f"{where}: image is {shorten(choices[-1].image)}, expected a path inside the images folder")
        if not all(
            isinstance(caption, str) and caption.strip() and is_unicode(caption) for caption in choices[-1].captions
        ):
            raise AmpError(f"{where}: captions are {choices[-1].captions}, expected texts")
    return choices


def _sugarcrepe(entry: dict) -> Choice:
    return Choice(str(entry["filename"]), (entry["caption"], entry["negative_caption"]))


def _aro(entry: dict) -> Choice:
    image = str(entry["image_path"])
    if "caption_options" in entry:
        options = tuple(entry["caption_options"])
        if len(options) < 2:
            raise ValueError(f"caption_options has {len(options)} texts, expected 2 or more")
        return Choice(image, options)
    group = entry.get("relation_name") or "_".join(entry.get("attributes", ()))
    box = None
    if "bbox_x" in entry:
        left, top, width, height = (int(entry[f"bbox_{key}"]) for key in "xywh")
        if width < 1 or height < 1:
            raise ValueError(f"the box is {width} x {height} pixels, expected at least 1 x 1")
        box = left, top, left + width, top + height
    return Choice(image, (entry["true_caption"], entry["false_caption"]), group, box)


@dataclass(frozen=True)
class Choices:
    """What a model chose.

    Attributes:
        scores: Of each choice's captions, the right one first.
        groups: Of each choice.
        skipped: Photos that are missing or can't be read, with the reason; their choices are left out.
    """

    scores: list[list[float]]
    groups: list[str]
    skipped: dict[str, str]

    @property
    def right(self) -> list[bool]:
        """Whether the right caption has the best score; a tie is wrong."""
        return [row[0] > max(row[1:]) for row in self.scores]

    @property
    def accuracy(self) -> float:
        """Percent of right choices."""
        return 100.0 * sum(self.right) / len(self.right)

    @property
    def group_mean(self) -> float:
        """Mean of the groups' accuracies, as ARO reports it."""
        return sum(right / n for n, right in self.by_group().values()) * 100.0 / len(self.by_group())

    def by_group(self) -> dict[str, tuple[int, int]]:
        """Choices and right choices by group."""
        counts: dict[str, list[int]] = {}
        for group, right in zip(self.groups, self.right, strict=True):
            count = counts.setdefault(group, [0, 0])
            count[0] += 1
            count[1] += right
        return {group: (number, right) for group, (number, right) in counts.items()}


@torch.no_grad()
def choose(
    choices: Sequence[Choice],
    models: dict[str, ActionAwareCLIP],
    preprocess,
    open_image: Callable[[str], Image.Image],
    generate: Callable[[Sequence[str]], list[Knowledge]] | None = None,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Choices]:
    """Scores every caption of every choice.

    Args:
        choices: Of one test.
        models: By name, in eval mode around one base CLIP, whose own choice comes first, as "base CLIP".
        preprocess: The validation transform.
        open_image: Name to photo; an OSError or AmpError skips the choice.
        generate: Captions to knowledge, for choices that bring none.
        batch_size: Choices at a time.
        progress: Called as progress(done, total).

    Raises:
        AmpError: Not one photo could be read, or a score is not finite.
    """
    scores: dict[str, list[list[float]]] = {"base CLIP": [], **{name: [] for name in models}}
    groups, skipped = [], {}
    first = next(iter(models.values()))
    device = first.logit_scale.device
    for low in range(0, len(choices), batch_size):
        part, images = [], {}  # choices of one photo share it
        for choice in choices[low : low + batch_size]:
            try:
                if (choice.image, choice.box) not in images:
                    image = open_image(choice.image)
                    image = image.crop(choice.box) if choice.box else image
                    images[choice.image, choice.box] = preprocess(image)
                part.append(choice)
            except (
                OSError,
                ValueError,
                SyntaxError,
                Image.DecompressionBombError,
            ) as error:  # AmpError is a ValueError
                skipped[choice.image] = str(error)
        if part:
            places = {key: place for place, key in enumerate(images)}
            rows = torch.tensor([places[choice.image, choice.box] for choice in part for _ in choice.captions])
            found = _scores(part, torch.stack(list(images.values())).to(device), rows, models, generate)
            for name, values in found.items():
                scores[name] += values
            groups += [choice.group for choice in part]
        if progress is not None:
            progress(min(low + batch_size, len(choices)), len(choices))
    if not groups:
        raise AmpError(f"none of {len(choices):,} choices has a photo that can be read, expected one at least; first: "
                       f"{next(iter(skipped.items()), 'no choice')}; give the folder with --images")  # fmt: skip
    return {name: Choices(rows, groups, skipped) for name, rows in scores.items()}


def _scores(choices: list[Choice], images: torch.Tensor, image: torch.Tensor, models: dict[str, ActionAwareCLIP],
            generate) -> dict[str, list[list[float]]]:  # fmt: skip
    """Scores of the captions of each choice; `image` is the row in `images` of each caption."""
    captions = [caption for choice in choices for caption in choice.captions]
    sizes = [len(choice.captions) for choice in choices]
    given = [k for choice in choices for k in choice.knowledge or [None] * len(choice.captions)]
    missing = [i for i, item in enumerate(given) if item is None]
    generated = generate([captions[i] for i in missing]) if generate is not None and missing else []
    made = dict(zip(missing, generated or [Knowledge()] * len(missing), strict=True))
    knowledge = [made[i] if item is None else item for i, item in enumerate(given)]
    first = next(iter(models.values()))
    text = first.encode_text(first.tokenizer(captions).to(images.device))
    base = first(images, only_frozen=True).base
    found = {"base CLIP": F.cosine_similarity(base[image].float(), text.float(), dim=-1).cpu()}
    everything = torch.arange(len(captions))
    for name, model in models.items():
        batch = model.prepare_knowledge(knowledge)
        if model.knowledge_aware:
            scorer = PairScorer(model, model.encode_early(images).float().cpu().numpy(), batch, text)
            scorer.prepare(everything)
            found[name] = scorer(image, everything)
        else:
            features = model(images, prompted=True).prompted[image]
            found[name] = F.cosine_similarity(features.float(), scored_text(model, batch, text).float(), dim=-1).cpu()
    for name, values in found.items():
        if not torch.isfinite(values).all():
            raise AmpError(f"{name}: a score is not finite, expected none; look for NaN in its weights")
    return {name: [row.tolist() for row in values.split(sizes)] for name, values in found.items()}


def save_choices(path: str | os.PathLike, tests: dict[str, dict[str, Choices]]) -> Path:
    """Writes a line a test, method and group, the group "all" first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("test", "method", "group", "choices", "right", "accuracy"))
    for test, methods in tests.items():
        for name, found in methods.items():
            groups = {"all": (len(found.scores), sum(found.right)), **found.by_group()}
            for group, (count, right) in groups.items():
                if group:
                    writer.writerow((*map(csv_cell, (test, name, group)), count, right, f"{100 * right / count:.2f}"))
    return write_atomically(path, text.getvalue().encode())
