"""Image-to-caption choice: which of a photo's captions is right?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from amp.errors import AmpError, too_many_skipped
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
        group: What accuracy is also counted by, such as ARO's relation; may be empty.
        box: Part of the photo that is looked at (left, top, right, bottom), pixels; None for all of it.
        knowledge: Of each caption; None where it is to be generated.
    """

    image: str
    captions: tuple[str, ...]
    group: str = ""
    box: tuple[int, int, int, int] | None = None
    knowledge: tuple[Knowledge, ...] | None = None


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
        choices: Choices of one test.
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


def check_skipped(where: object, reasons: Sequence[str], entries: int, max_skipped: float) -> None:
    """Raises AmpError if more than the fraction `max_skipped` of a test's entries is left out, for these reasons."""
    lost = {"entries": (len(reasons), entries)}
    if message := too_many_skipped(where, lost, "--max_skipped_entries", max_skipped, reasons):
        raise AmpError(message)
