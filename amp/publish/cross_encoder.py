"""Loads a published adapter in sentence-transformers, as `CrossEncoder(FOLDER, trust_remote_code=True)`.

`save_pretrained` writes a `modules.json` that names the class of this file. Sentence-transformers imports the class
from this installed package, and no code from the folder.
"""

import os
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modules import InputModule

from amp.data.images.formats import PHOTO_SUFFIXES
from amp.errors import AmpError
from amp.files import write_atomically
from amp.model.pretrained import CONFIG, WEIGHTS
from amp.search.reranker import Reranker

SETTINGS = ("base", "base_pretrained", "precision", "knowledge", "engine_options", "batch_size")
"""Arguments of `Reranker.from_pretrained` that `CrossEncoder(model_kwargs=...)` accepts."""


class RerankerModule(InputModule):
    """The only module of the `CrossEncoder`: scores pairs of a caption and an image with `amp.Reranker`.

    Args:
        reranker: The re-ranker.
        folder: Folder with the adapter, which `save` copies.
    """

    def __init__(self, reranker: Reranker, folder: Path):
        super().__init__()
        self.reranker, self.folder = reranker, folder
        self.clip = reranker.model  # registered, so that the CrossEncoder moves it to its device

    @property
    def modalities(self) -> list:
        """Kinds of inputs."""
        return ["text", "image"]

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", model_kwargs: dict | None = None, **options):
        """Loads the adapter of a folder or a repository of the Hugging Face hub.

        Args:
            model_name_or_path, subfolder: Folder or repository, and the folder inside it.
            model_kwargs: Arguments of `Reranker.from_pretrained`; see `SETTINGS`.
            **options: Of a download: `token`, `cache_folder`, `revision`, `local_files_only`. Others are ignored.

        Raises:
            AmpError: There is no adapter, an argument is unknown, or `Reranker.from_pretrained` rejects one.
        """
        settings = model_kwargs or {}
        if unknown := sorted(settings.keys() - set(SETTINGS)):
            raise AmpError(f"model_kwargs has {', '.join(unknown)}, expected only {', '.join(SETTINGS)}")
        names = ("token", "cache_folder", "revision", "local_files_only")
        download = {name: options[name] for name in names if name in options}
        cls.load_file_path(model_name_or_path, CONFIG, subfolder, **download)  # a download next to the weights
        file = cls.load_file_path(model_name_or_path, WEIGHTS, subfolder, **download)
        if file is None:
            raise AmpError(f"{model_name_or_path}: no {WEIGHTS}, expected a folder written by amp publish")
        return cls(Reranker.from_pretrained(file, **settings), Path(file).parent)

    def preprocess(self, inputs, prompt: str | None = None, **kwargs) -> dict[str, Any]:
        """Returns the pairs as (caption, image), with the prompt, if any, in front of the caption."""
        pairs = [_caption_and_image(*pair) for pair in inputs]
        return {"pairs": [((prompt or "") + caption, image) for caption, image in pairs]}

    def forward(self, features: dict[str, Any], **kwargs) -> dict[str, Any]:
        """Adds the `scores` (P,) of P pairs. An image that can't be read scores minus infinity and ranks last."""
        scores = torch.from_numpy(self.reranker.predict(features["pairs"])).nan_to_num(nan=-torch.inf)
        return features | {"scores": scores.to(self.reranker.device)}

    def save(self, output_path: str, *args, **kwargs) -> None:
        """Copies the adapter and its settings."""
        for name in (WEIGHTS, CONFIG):
            write_atomically(Path(output_path) / name, (self.folder / name).read_bytes())


def _caption_and_image(first, second) -> tuple[str, Any]:
    """Orders the parts of a pair. A part may also be a dict such as {"image": image}."""
    first, second = (next(iter(x.values())) if isinstance(x, dict) and len(x) == 1 else x for x in (first, second))
    if _is_image(first) and not _is_image(second):
        first, second = second, first
    if _is_image(first) or isinstance(second, dict):
        kinds = " and ".join(type(x).__name__ for x in (first, second))
        raise AmpError(f"a pair consists of {kinds}, expected a caption (str) and an image (path, PIL image, array)")
    return first, second


def _is_image(part) -> bool:
    return not isinstance(part, str) or (part.lower().endswith(PHOTO_SUFFIXES) and os.path.isfile(part))
