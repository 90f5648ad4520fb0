"""Image-to-caption choice: a model scores several captions of a photo, and the right one should score best."""

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
    """A photo and the captions to choose from.

    Attributes:
        image: File name of the photo, or its index in a split.
        captions: Captions to choose from, the right one first.
        group: Group for which accuracy is also reported separately, such as ARO's relation. Empty for no group.
        box: Crop of the photo (left, top, right, bottom) in pixels; None uses the whole photo.
        knowledge: Knowledge of each caption; None if it has to be generated.
    """

    image: str
    captions: tuple[str, ...]
    group: str = ""
    box: tuple[int, int, int, int] | None = None
    knowledge: tuple[Knowledge, ...] | None = None


@dataclass(frozen=True)
class Choices:
    """Results of one model on one test.

    Attributes:
        scores: Scores of the captions of each choice, the right one first.
        groups: Group of each choice.
        skipped: Photos that can't be read, with the reason. Their choices are left out.
    """

    scores: list[list[float]]
    groups: list[str]
    skipped: dict[str, str]

    @property
    def right(self) -> list[bool]:
        """Whether the right caption of each choice scores best. A tie counts as wrong."""
        return [row[0] > max(row[1:]) for row in self.scores]

    @property
    def accuracy(self) -> float:
        """Percentage of right choices."""
        return 100.0 * sum(self.right) / len(self.right)

    @property
    def group_mean(self) -> float:
        """Mean accuracy of the groups in percent, as ARO reports it."""
        return sum(right / n for n, right in self.by_group().values()) * 100.0 / len(self.by_group())

    def by_group(self) -> dict[str, tuple[int, int]]:
        """Number of choices and of right choices, by group."""
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
        models: Models by name, in eval mode, all with the same base CLIP.
        preprocess: Validation transform.
        open_image: Returns the photo for the `image` of a choice. An OSError or AmpError skips the choice.
        generate: Returns the knowledge of a list of captions, for choices without knowledge.
        batch_size: Choices per batch.
        progress: Called as progress(done, total).
        max_skipped: Largest fraction of the choices that may be skipped.

    Returns:
        Results by model name. The first entry, "base CLIP", is the base model.

    Raises:
        AmpError: Too many photos can't be read, a score is not finite, or the GPU is out of memory.
    """
    scores: dict[str, list[list[float]]] = {BASE.method: [], **{name: [] for name in models}}
    groups, skipped, reasons = [], {}, []
    first = next(iter(models.values()))
    device = first.logit_scale.device
    for low in range(0, len(choices), batch_size):
        part, images = [], {}  # each photo is preprocessed once per batch
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
                    f"the GPU is out of memory with --choices_a_batch {batch_size}; give a smaller number"
                ) from error
            for name, values in found.items():
                scores[name] += values
            groups += [choice.group for choice in part]
        if progress is not None:
            progress(min(low + batch_size, len(choices)), len(choices))
    if not groups:
        raise AmpError(
            f"none of {len(choices):,} choices has a photo that can be read, expected at least one; first: "
            f"{next(iter(reasons), 'no choice')}; give the folder of the photos with --images"
        )
    return {name: Choices(rows, groups, skipped) for name, rows in scores.items()}


def _cropped(image: Image.Image, box: tuple[int, int, int, int] | None) -> Image.Image:
    if box is None:
        return image
    left, top, right, bottom = box
    if left >= image.width or top >= image.height or right <= 0 or bottom <= 0:  # the crop would be all black
        raise ValueError(f"the box {box} is outside the photo of {image.width} x {image.height} pixels")
    return image.crop(box)


def _scores(
    choices: list[Choice], images: torch.Tensor, image: torch.Tensor, models: dict[str, ActionAwareCLIP], generate
) -> dict[str, list[list[float]]]:
    """Returns the scores of each choice's captions by model. `image` is the row in `images` of each caption."""
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
            raise AmpError(f"{name}: a score is NaN or infinite, expected finite scores; check the model's weights")
    return {name: [row.tolist() for row in values.split(sizes)] for name, values in found.items()}


def check_skipped(where: object, reasons: Sequence[str], entries: int, max_skipped: float) -> None:
    """Raises `AmpError` if more than the fraction `max_skipped` of a test's entries was skipped for these `reasons`."""
    lost = {"entries": (len(reasons), entries)}
    if message := too_many_skipped(where, lost, "--max_skipped_entries", max_skipped, reasons):
        raise AmpError(message)
