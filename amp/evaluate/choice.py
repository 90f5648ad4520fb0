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
from PIL import Image

from amp.csv_cell import csv_cell
from amp.data.images.names import find_file
from amp.errors import AmpError, shorten, too_many_skipped
from amp.files import write_atomically
from amp.json_text import is_unicode, parse_json
from amp.knowledge.schema import Knowledge
from amp.model.clip import ActionAwareCLIP
from amp.model.similarity import pair_similarity
from amp.retrieval.figures import BASE
from amp.retrieval.scorer import PairScorer


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


def load_choices(
    path: str | os.PathLike, images: str | os.PathLike | None = None
) -> tuple[list[Choice], dict[str, str]]:
    """Reads SugarCrepe's format (an object of ``filename``, ``caption``, ``negative_caption``) or ARO's (a list with
    ``image_path`` and either ``true_caption`` and ``false_caption``, a box, and ``relation_name`` or ``attributes``, or
    ``caption_options`` with the right one first).

    Args:
        path: JSON file.
        images: Folder in which each photo must be; None does not look.

    Returns:
        The choices, and why entries are left out, by entry: a key is missing, a caption is empty or no text, the right
        caption is among the wrong ones, or the photo is missing.

    Raises:
        AmpError: The file can't be read or has no entries.
    """
    try:
        content = parse_json(Path(path).read_bytes())
    except OSError as error:
        raise AmpError(f"{path}: can't be read ({error.strerror}), expected SugarCrepe's or ARO's JSON") from error
    except ValueError as error:
        raise AmpError(f"{path}: not JSON ({error}), expected SugarCrepe's or ARO's") from error
    if not isinstance(content, dict | list) or not content:
        raise AmpError(f"{path}: holds {type(content).__name__}, expected an object or a list with entries")
    choices, skipped = [], {}
    for number, entry in content.items() if isinstance(content, dict) else enumerate(content):
        try:
            choices.append(_read(entry, images))
        except KeyError as error:
            skipped[f"entry {number}"] = f"key {error} is missing; keys seen: {shorten(', '.join(entry))}"
        except (TypeError, ValueError, OverflowError) as error:
            skipped[f"entry {number}"] = str(error)
    return choices, skipped


def _read(entry, images: str | os.PathLike | None) -> Choice:
    """A choice of an entry; raises KeyError, TypeError, ValueError or OverflowError where it can't be used."""
    if not isinstance(entry, dict):
        raise ValueError(f"is {type(entry).__name__}, expected an object")
    choice = _sugarcrepe(entry) if "filename" in entry else _aro(entry)
    photo = PurePosixPath(choice.image)
    if photo.is_absolute() or ".." in photo.parts or "\0" in choice.image:
        raise ValueError(f"image is {shorten(choice.image)}, expected a path inside the images folder")
    # Towers that read lower case give both the same score.
    right, *wrong = (" ".join(caption.casefold().split()) for caption in choice.captions)
    if right in wrong:
        raise ValueError(f"a wrong caption is the right one: {shorten(choice.captions[0])}")
    if images is not None and not os.path.isfile(find_file(Path(images), choice.image)):
        raise ValueError(f"no photo {choice.image} in {images}")
    return choice


def _sugarcrepe(entry: dict) -> Choice:
    return Choice(_text(entry, "filename"), (_text(entry, "caption"), _text(entry, "negative_caption")))


def _aro(entry: dict) -> Choice:
    image = _text(entry, "image_path")
    if "caption_options" in entry:
        options = entry["caption_options"]
        if not isinstance(options, list) or len(options) < 2:
            raise ValueError(f"caption_options is {shorten(options)}, expected a list of 2 texts or more")
        return Choice(image, tuple(_text(options, number, "caption_options") for number in range(len(options))))
    group = entry.get("relation_name") or "_".join(entry.get("attributes", ()))
    if not isinstance(group, str):
        raise ValueError(f"relation_name is {shorten(group)}, expected a text")
    box = None
    if "bbox_x" in entry:
        left, top, width, height = (int(entry[f"bbox_{key}"]) for key in "xywh")
        if width < 1 or height < 1:
            raise ValueError(f"the box is {width} x {height} pixels, expected at least 1 x 1")
        box = left, top, left + width, top + height
    return Choice(image, (_text(entry, "true_caption"), _text(entry, "false_caption")), group, box)


def _text(entry, key: str | int, of: str = "") -> str:
    value = entry[key]
    if not (isinstance(value, str) and value.strip() and is_unicode(value)):
        raise ValueError(f"{f'{of}[{key}]' if of else key} is {shorten(value)}, expected a text")
    return value


def check_skipped(where: object, reasons: Sequence[str], entries: int, max_skipped: float) -> None:
    """Raises AmpError if more than the fraction `max_skipped` of a test's entries is left out, for these reasons."""
    lost = {"entries": (len(reasons), entries)}
    if message := too_many_skipped(where, lost, "--max_skipped_entries", max_skipped, reasons):
        raise AmpError(message)


@dataclass(frozen=True)
class Choices:
    """What a model chose.

    Attributes:
        scores: Of each choice's captions, the right one first.
        groups: Of each choice.
        skipped: Photos that can't be read, with the reason; their choices are left out.
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
    max_skipped: float = 0.01,
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
        max_skipped: Largest fraction of the choices that may be skipped.

    Raises:
        AmpError: More choices have a photo that can't be read, a score is not finite, or memory of the GPU is full.
    """
    scores: dict[str, list[list[float]]] = {BASE.method: [], **{name: [] for name in models}}
    groups, skipped, reasons = [], {}, []
    first = next(iter(models.values()))
    device = first.logit_scale.device
    for low in range(0, len(choices), batch_size):
        part, images = [], {}  # choices of one photo share it
        for choice in choices[low : low + batch_size]:
            try:
                if (choice.image, choice.box) not in images:
                    images[choice.image, choice.box] = preprocess(_cropped(open_image(choice.image), choice.box))
                part.append(choice)
            except (
                OSError,
                ValueError,
                SyntaxError,
                Image.DecompressionBombError,
            ) as error:  # AmpError is a ValueError
                skipped[choice.image] = str(error)
                reasons.append(f"{choice.image}: {error}")
                check_skipped("photos", reasons, len(choices), max_skipped)
        if part:
            places = {key: place for place, key in enumerate(images)}
            rows = torch.tensor([places[choice.image, choice.box] for choice in part for _ in choice.captions])
            try:
                found = _scores(part, torch.stack(list(images.values())).to(device), rows, models, generate)
            except torch.OutOfMemoryError as error:
                raise AmpError(
                    f"the GPU's memory is full with {batch_size} choices at a time; give fewer with --choices_a_batch"
                ) from error
            for name, values in found.items():
                scores[name] += values
            groups += [choice.group for choice in part]
        if progress is not None:
            progress(min(low + batch_size, len(choices)), len(choices))
    if not groups:
        raise AmpError(
            f"none of {len(choices):,} choices has a photo that can be read, expected one at least; first: "
            f"{next(iter(reasons), 'no choice')}; give the folder with --images"
        )
    return {name: Choices(rows, groups, skipped) for name, rows in scores.items()}


def _cropped(image: Image.Image, box: tuple[int, int, int, int] | None) -> Image.Image:
    if box is None:
        return image
    left, top, right, bottom = box
    if left >= image.width or top >= image.height or right <= 0 or bottom <= 0:  # all of it would be black
        raise ValueError(f"the box {box} lies outside the photo of {image.width} x {image.height} pixels")
    return image.crop(box)


def _scores(
    choices: list[Choice], images: torch.Tensor, image: torch.Tensor, models: dict[str, ActionAwareCLIP], generate
) -> dict[str, list[list[float]]]:
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
    found = {BASE.method: pair_similarity(first(images).base[image], text)}
    for name, model in models.items():
        scorer = PairScorer(model, model.tower.early(images), model.prepare_knowledge(knowledge), text)
        found[name] = scorer(image, torch.arange(len(captions)))
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


def save_skipped(path: str | os.PathLike, tests: dict[str, dict[str, str]]) -> Path:
    """Writes one line per test and entry or photo that was left out, with the reason."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("test", "skipped", "reason"))
    for test, skipped in tests.items():
        writer.writerows(map(csv_cell, (test, *line)) for line in skipped.items())
    return write_atomically(path, text.getvalue().encode())
