"""Reads choices from the files of SugarCrepe and ARO.

SugarCrepe: Hsieh et al., arXiv 2306.14610. ARO: Yuksekgonul et al., arXiv 2210.01936.
"""

import os
from pathlib import Path, PurePosixPath

from amp.data.images.names import find_file
from amp.errors import AmpError, shorten
from amp.evaluate.choice import Choice
from amp.json_text import parse_json
from amp.knowledge.schema import is_unicode


def load_choices(
    path: str | os.PathLike, images: str | os.PathLike | None = None
) -> tuple[list[Choice], dict[str, str]]:
    """Reads a file in the format of SugarCrepe or ARO.

    SugarCrepe: an object whose entries have the keys `filename`, `caption` and `negative_caption`. ARO: a list of
    entries with `image_path` and either `caption_options`, the right caption first, or `true_caption`, `false_caption`,
    optionally a box, and `relation_name` or `attributes`.

    Args:
        path: JSON file.
        images: Folder that must contain the photos; None skips this check.

    Returns:
        The choices, and the entries that are left out, with the reason: a key is missing, a caption is empty or not a
        text, the right caption is among the wrong ones, or the photo is missing.

    Raises:
        AmpError: The file can't be read or has no entries.
    """
    try:
        content = parse_json(Path(path).read_bytes())
    except OSError as error:
        raise AmpError(f"{path}: can't be read ({error.strerror}), expected JSON of SugarCrepe or ARO") from error
    except ValueError as error:
        raise AmpError(f"{path}: not JSON ({error}), expected JSON of SugarCrepe or ARO") from error
    if not isinstance(content, dict | list) or not content:
        raise AmpError(f"{path}: contains {type(content).__name__}, expected an object or a list with entries")
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
    """Converts an entry to a choice; raises KeyError, TypeError, ValueError or OverflowError if it is unusable."""
    if not isinstance(entry, dict):
        raise ValueError(f"is {type(entry).__name__}, expected an object")
    choice = _sugarcrepe(entry) if "filename" in entry else _aro(entry)
    photo = PurePosixPath(choice.image)
    if photo.is_absolute() or ".." in photo.parts or "\0" in choice.image:
        raise ValueError(f"image is {shorten(choice.image)}, expected a path inside the images folder")
    # Text towers that lower-case their input give captions that differ only in case the same score.
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
            raise ValueError(f"caption_options is {shorten(options)}, expected a list of at least 2 texts")
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
